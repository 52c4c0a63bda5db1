"""Cutting channels: what is kept computes what it computed before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search.exceptions import PlanError
from compress_search.surgery import can_keep_channels, carries_channels, channel_count, keep_channels

KEPT = [0, 2, 5]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 5)),
        (nn.Linear(4, 6), (2, 4)),
    ],
)
def test_kept_outputs_are_the_dense_ones(layer, shape):
    inputs = torch.randn(shape)
    dense = layer(inputs)
    keep_channels(layer, outputs=KEPT)
    torch.testing.assert_close(layer(inputs), dense[:, KEPT])
    assert channel_count(layer, "outputs") == 3
    assert channel_count(layer, "inputs") == 4


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(6, 4, 3), (2, 6, 5, 5)), (nn.Linear(6, 4), (2, 6))])
def test_kept_inputs_act_as_if_the_others_were_zero(layer, shape):
    inputs = torch.randn(shape)
    masked = torch.zeros(shape)
    masked[:, KEPT] = inputs[:, KEPT]
    dense = layer(masked)
    keep_channels(layer, inputs=KEPT)
    torch.testing.assert_close(layer(inputs[:, KEPT]), dense)
    assert channel_count(layer, "inputs") == 3
    assert channel_count(layer, "outputs") == 4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm2d(6), (2, 6, 5, 5)),
        (nn.BatchNorm1d(6, affine=False), (2, 6)),
        (nn.BatchNorm2d(6, track_running_stats=False), (2, 6, 5, 5)),
        (nn.PReLU(6), (2, 6, 5)),
        (nn.PReLU(), (2, 6, 5)),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    ],
)
def test_channelwise_modules_keep_their_channels(layer, shape):
    for name, tensor in layer.state_dict().items():
        if name != "num_batches_tracked":
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    layer.eval()
    inputs = torch.randn(shape)
    dense = layer(inputs)
    keep_channels(layer, outputs=KEPT)
    torch.testing.assert_close(layer(inputs[:, KEPT]), dense[:, KEPT])


def test_cut_parameters_stay_trainable_or_frozen():
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    keep_channels(layer, inputs=[1, 3], outputs=KEPT)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.weight.shape == (3, 2, 3, 3)


def test_a_depthwise_convolution_is_cut_as_one():
    layer = nn.Conv2d(6, 6, 3, groups=6)
    keep_channels(layer, outputs=KEPT)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (3, 3, 3)
    assert carries_channels(layer)


@pytest.mark.parametrize(
    ("layer", "can", "carries"),
    [
        (nn.Conv2d(4, 6, 3), True, False),
        (nn.Conv2d(4, 4, 3, groups=4), True, True),
        (nn.Conv2d(4, 8, 3, groups=4), True, True),
        (nn.Conv2d(8, 8, 3, groups=4), True, True),
        (nn.Conv2d(8, 8, 3, groups=2), True, False),
        (nn.Conv2d(1, 1, 3), True, False),
        (nn.Linear(4, 6), True, False),
        (nn.BatchNorm2d(4), True, True),
        (nn.InstanceNorm2d(4, affine=True), True, True),
        (nn.LayerNorm(4), True, True),
        (nn.LayerNorm((4, 3)), False, False),
        (nn.PReLU(4), True, True),
        (nn.GroupNorm(2, 4), True, True),
        (nn.ConvTranspose2d(4, 6, 3), True, False),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), False, False),
        (nn.Embedding(4, 6), False, False),
    ],
    ids=str,
)
def test_what_can_be_cut_and_what_carries(layer, can, carries):
    assert can_keep_channels(layer) == can
    assert carries_channels(layer) == carries


def test_a_transposed_convolution_has_its_axes_the_other_way_round():
    layer = nn.ConvTranspose2d(4, 6, 3)
    inputs = torch.randn(2, 4, 5, 5)
    inputs[:, 1] = 0.0
    dense = layer(inputs)
    keep_channels(layer, inputs=[0, 2, 3], outputs=[1, 4])
    torch.testing.assert_close(layer(inputs[:, [0, 2, 3]]), dense[:, [1, 4]])


def test_small_groups_come_and_go_as_wholes():
    layer = nn.Conv2d(8, 12, 3, groups=4)
    inputs = torch.randn(2, 8, 5, 5)
    dense = layer(inputs)
    kept = [0, 1, 2, 9, 10, 11]
    keep_channels(layer, outputs=kept)
    assert (layer.groups, layer.in_channels, layer.out_channels) == (2, 4, 6)
    torch.testing.assert_close(layer(inputs[:, [0, 1, 6, 7]]), dense[:, kept])
    with pytest.raises(PlanError, match="whole groups of 3"):
        keep_channels(layer, outputs=[0, 1])


def test_large_groups_keep_the_same_positions():
    layer = nn.Conv2d(8, 12, 3, groups=2)
    inputs = torch.randn(2, 8, 5, 5)
    inputs[:, [1, 5]] = 0.0
    dense = layer(inputs)
    keep_channels(layer, inputs=[0, 2, 3, 4, 6, 7], outputs=[0, 3, 7, 8])
    torch.testing.assert_close(layer(inputs[:, [0, 2, 3, 4, 6, 7]]), dense[:, [0, 3, 7, 8]])
    assert (channel_count(layer, "inputs"), channel_count(layer, "outputs"), layer.groups) == (6, 4, 2)


@pytest.mark.parametrize("rest", [{"outputs": [0, 1, 7, 11]}, {"inputs": [0, 2]}])
def test_large_groups_that_were_cut_small_are_still_cut_as_large_ones(rest):
    layer = nn.Conv2d(8, 12, 3, groups=2)
    keep_channels(layer, inputs=[0, 1, 4, 5])
    assert carries_channels(layer), "by its shape alone it would be one of many small groups"
    inputs = torch.randn(2, 4, 5, 5)
    inputs[:, [1, 3]] = 0.0
    dense = layer(inputs)
    outputs = rest.get("outputs", range(12))
    keep_channels(layer, **rest)
    torch.testing.assert_close(layer(inputs[:, rest.get("inputs", range(4))]), dense[:, outputs])
    assert layer.groups == 2


@pytest.mark.parametrize("kept", [{"inputs": [0, 1, 2, 5, 6, 7]}, {"outputs": [0, 1, 2]}])
def test_groups_that_would_become_unequal_are_refused(kept):
    with pytest.raises(PlanError, match="2 groups of a Conv2d"):
        keep_channels(nn.Conv2d(8, 12, 3, groups=2), **kept)


def test_group_norm_keeps_its_groups():
    layer = nn.GroupNorm(2, 6)
    inputs = torch.randn(2, 6, 5, 5)
    # Where both channels of a group are alike, dropping one changes neither mean nor variance.
    inputs[:, [1, 2, 4, 5]] = inputs[:, [0, 0, 3, 3]]
    dense = layer(inputs)
    keep_channels(layer, outputs=[0, 2, 3, 5])
    torch.testing.assert_close(layer(inputs[:, [0, 2, 3, 5]]), dense[:, [0, 2, 3, 5]])


def test_other_modules_are_refused():
    with pytest.raises(PlanError, match="Embedding"):
        keep_channels(nn.Embedding(4, 3), outputs=[0])
