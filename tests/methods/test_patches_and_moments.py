"""The regression view of layers, against the layers themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from compress_search.calibration import (
    check_weights,
    divergence,
    gram_matrices,
    reestimated_batchnorm,
    with_best_batchnorm,
)
from compress_search.exceptions import ModelError
from compress_search.moments import MomentSums
from compress_search.patches import add_to_weights, input_patches, output_rows


@st.composite
def convolutions(draw):
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    pick = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dimensions))  # noqa: E731
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return kind(
        2 * groups,
        3 * groups,
        pick(1, 3),
        stride=1 if same else pick(1, 2),
        padding="same" if same else pick(0, 2),
        dilation=pick(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


# PyTorch says that it pads one side more than the other; that is what is tested.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60, deadline=None)
@given(layer=convolutions(), seed=st.integers(0, 10))
def test_patches_times_weights_are_the_outputs(layer, seed):
    torch.manual_seed(seed)
    spatial = len(layer.kernel_size)
    inputs = torch.randn(2, layer.in_channels, *(7,) * spatial)
    weights = layer.weight.detach().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    outputs = input_patches(layer, inputs) @ weights.transpose(1, 2)
    if layer.bias is not None:
        outputs = outputs + layer.bias.detach().reshape(layer.groups, 1, -1)
    torch.testing.assert_close(outputs, output_rows(layer, layer(inputs).detach()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60, deadline=None)
@given(
    layer=convolutions(),
    seed=st.integers(0, 10),
    size=st.sampled_from([5, 7]),
    chunk=st.sampled_from([1, 2**24]),
)
def test_moments_by_shifts_are_those_of_all_rows(layer, seed, size, chunk):
    torch.manual_seed(seed)
    inputs = torch.randn(3, layer.in_channels, *(size,) * len(layer.kernel_size), dtype=torch.float64)
    residual = torch.randn_like(layer.double()(inputs))
    rows, wanted = input_patches(layer, inputs), output_rows(layer, residual)
    if layer.bias is not None:
        rows = functional.pad(rows, (0, 1), value=1.0)
    sums = MomentSums(layer, has_bias=layer.bias is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress_search.moments._CHUNK_ELEMENTS", chunk)
        sums.add(inputs, residual)
        sums.add(2 * inputs, residual)
    moments = sums.moments()
    assert moments.rows == 2 * rows.shape[1]
    twice = 2 * rows
    if layer.bias is not None:
        twice[..., -1] = 1.0
    both = torch.cat([rows, twice], dim=1)
    torch.testing.assert_close(moments.gram, both.mT @ both)
    torch.testing.assert_close(moments.cross, both.mT @ torch.cat([wanted, wanted], dim=1))


def test_moments_of_linear_rows_on_a_sequence():
    layer = nn.Linear(4, 3)
    inputs, residual = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    sums = MomentSums(layer, has_bias=True)
    sums.add(inputs, residual)
    rows = functional.pad(inputs.reshape(10, 4), (0, 1), value=1.0).double()
    torch.testing.assert_close(sums.moments().gram[0], rows.T @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sums.moments().cross[0], rows.T @ residual.reshape(10, 3).double(), rtol=1e-5, atol=1e-5
    )


def test_linear_rows_on_a_sequence():
    layer = nn.Linear(4, 3)
    inputs = torch.randn(2, 5, 4)
    rows = input_patches(layer, inputs) @ layer.weight.detach().T + layer.bias.detach()
    torch.testing.assert_close(rows, output_rows(layer, layer(inputs).detach()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_are_changed_in_the_layout_of_the_rows(memory_format):
    layer = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=memory_format)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    change = torch.randn(2, 19, 3)
    add_to_weights(layer, slice(0, 7), change[:, :7])
    add_to_weights(layer, slice(7, 19), change[:, 7:])
    added = (layer.weight.detach() - before).reshape(2, 3, 18).transpose(1, 2)
    torch.testing.assert_close(added, change[:, :18])
    torch.testing.assert_close(layer.bias.detach() - bias, change[:, 18].reshape(-1))


def test_patches_of_an_unknown_layer_are_refused():
    with pytest.raises(ModelError, match="BatchNorm2d"):
        input_patches(nn.BatchNorm2d(3), torch.randn(1, 3, 4, 4))


def test_streamed_gram_equals_the_gram_of_all_rows_at_once(monkeypatch):
    monkeypatch.setattr("compress_search.moments._CHUNK_ELEMENTS", 100)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3))
    batches = [torch.randn(n, 2, 6, 6) for n in (3, 1, 4)]
    layer = model[2]
    gram = gram_matrices(model, {"2": layer}, batches)["2"][0]
    rows = input_patches(layer, model[:2](torch.cat(batches)).detach())[0].double()
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_activations_that_are_not_finite_name_the_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    model[0].weight.data[0] = float("nan")
    layer = model[1]
    with pytest.raises(ModelError, match="layer '1' are not finite"):
        gram_matrices(model, {"1": layer}, [torch.randn(2, 1, 8, 8)])


def test_divergence_is_the_kl_divergence_of_the_softmax():
    reference, model = nn.Linear(3, 4), nn.Linear(3, 4)
    batches = [torch.randn(5, 3), torch.randn(2, 3)]
    inputs = torch.cat(batches)
    p, q = reference(inputs).softmax(1), model(inputs).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean().detach()
    assert divergence(model, reference, batches) == pytest.approx(float(expected), rel=1e-4)
    assert divergence(reference, reference, batches) == 0.0


def test_divergence_of_maps_is_the_relative_squared_error():
    reference, model = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
    inputs = torch.randn(4, 1, 6, 6)
    wanted = reference(inputs)
    expected = ((model(inputs) - wanted).square().sum() / wanted.square().sum()).detach()
    assert divergence(model, reference, [inputs]) == pytest.approx(float(expected), rel=1e-4)


def test_reestimated_batchnorm_holds_the_statistics_of_the_data():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    batches = [torch.randn(8, 1, 6, 6) for _ in range(3)]
    estimated = reestimated_batchnorm(model, batches)
    outputs = [model[0](batch).detach() for batch in batches]
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(estimated[1].running_mean, mean)
    assert estimated[1].momentum == model[1].momentum
    assert torch.equal(model[1].running_mean, torch.zeros(3))


def test_batchnorm_is_reestimated_only_where_that_helps():
    torch.manual_seed(0)
    batches = [torch.randn(16, 1, 6, 6) for _ in range(4)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)]
    untrained = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), *head).eval()
    reference = reestimated_batchnorm(untrained, batches)
    assert with_best_batchnorm(reference, reference, batches) is reference
    off = reestimated_batchnorm(untrained, batches)
    off[1].running_mean += 5.0
    mended = with_best_batchnorm(off, reference, batches)
    assert divergence(mended, reference, batches) < 1e-6 < divergence(off, reference, batches)
    assert with_best_batchnorm(off, reference, []) is off


def test_statistics_that_do_not_help_are_estimated_on_a_part_alone():
    torch.manual_seed(0)
    batches = [torch.randn(16, 1, 6, 6) for _ in range(8)]
    untrained = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4)).eval()
    reference = reestimated_batchnorm(untrained, batches)
    off = reestimated_batchnorm(untrained, batches)
    off[1].running_mean += 5.0
    runs = []
    for model in (reference, off):
        model.register_forward_pre_hook(lambda model, inputs: runs.append((model[1].training, inputs[0])))

    def estimated_on(model):
        runs.clear()
        best = with_best_batchnorm(model, reference, batches)
        return best, [images for training, images in runs if training], runs[-1][1]

    best, seen, compared = estimated_on(reference)
    assert best is reference
    assert len(seen) == 2 and all(a is b for a, b in zip(seen, batches, strict=False))
    assert compared is batches[-1]
    best, seen, _ = estimated_on(off)
    assert len(seen) == 2 + 8
    assert torch.equal(best[1].running_mean, reestimated_batchnorm(off, batches)[1].running_mean)


class PooledNorm(nn.Module):
    """Batch norm of a map of one pixel, as in the pooling branch of an ASPP."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.head(self.norm(functional.adaptive_avg_pool2d(self.conv(x), 1))).flatten(1)


@pytest.mark.parametrize(
    ("sizes", "estimated_on"),
    [
        ((1,) * 16, {2}),
        ((1,) * 7, {2, 3}),
        ((2, 2, 2, 1), {2, 3}),
        ((8,) * 4 + (1,), {8, 5, 4}),
        ((1,) + (8,) * 4, {8, 5, 4}),
        ((8, 8, 1, 3, 8, 8), {8, 4}),
        ((8, 8, 8, 5), {8, 5}),
        ((8,) * 4, {8}),
        ((2,) * 8, {2}),
    ],
)
def test_statistics_are_estimated_on_batches_of_like_sizes_without_single_examples(
    sizes, estimated_on, monkeypatch
):
    # As if the activations of two examples were all that fits into memory.
    monkeypatch.setattr("compress_search.calibration.examples_within_memory", lambda peak: 2)
    torch.manual_seed(0)
    data = torch.randn(sum(sizes), 1, 6, 6)
    reference = reestimated_batchnorm(PooledNorm().eval(), [data])
    off = reestimated_batchnorm(reference, [data])
    off.norm.running_mean += 5.0
    seen = []
    off.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]) if net.norm.training else None)
    best = with_best_batchnorm(off, reference, torch.split(data, sizes))
    assert best is not off
    assert {len(batch) for batch in seen} == estimated_on
    # A quarter was tried first; then came all of them, in their order.
    assert torch.equal(torch.cat(seen)[-len(data) :], data)


def test_single_examples_are_joined_as_far_as_memory_allows():
    data = torch.randn(80, 1, 6, 6)
    reference = reestimated_batchnorm(PooledNorm().eval(), [data])
    off = reestimated_batchnorm(reference, [data])
    off.norm.running_mean += 5.0
    seen = []
    off.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]) if net.norm.training else None)
    with_best_batchnorm(off, reference, torch.split(data, 1))
    assert {len(batch) for batch in seen} == {16}


@pytest.mark.parametrize("sides", [(6,), (6, 7, 8, 9)])
def test_statistics_stay_where_examples_cannot_be_joined(sides, caplog):
    caplog.set_level("INFO", logger="compress_search")
    reference = PooledNorm().eval()
    off = reestimated_batchnorm(reference, [torch.randn(8, 1, 6, 6)])
    batches = [torch.randn(1, 1, side, side) for side in sides]
    assert with_best_batchnorm(off, reference, batches) is off
    assert "The BatchNorm statistics stay as they are (Expected more than 1 value per channel" in caplog.text


class Masked(nn.Module):
    """A causal mask, and a state that is no tensor."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.head, self.norm, self.inner = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Identity()
        self.register_buffer("mask", torch.full((4, 4), mask).triu(1))
        self.inner.register_buffer("mask", self.mask.clone())

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_a_mask_may_be_infinite_and_a_state_need_not_be_a_tensor():
    check_weights(Masked(-torch.inf))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask", torch.nan),
        ("inner.mask", torch.nan),
        ("norm.running_var", torch.inf),
        ("norm.running_mean", -torch.inf),
        ("head.weight", torch.inf),
        ("head.bias", torch.nan),
    ],
)
def test_what_a_model_computes_with_must_be_finite(name, value):
    model = Masked(-torch.inf)
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ModelError, match=f"The weights '{name}' are not finite"):
        check_weights(model)


class StateElsewhere(nn.Linear):
    def get_extra_state(self):
        return torch.empty(3, device="meta")

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_a_tensor_may_lie_elsewhere():
    check_weights(StateElsewhere(2, 2))


def test_layers_share_as_many_passes_as_memory_needs(monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    batches = [torch.randn(8, 1, 9, 9) for _ in range(2)]
    views = dict(model.named_children())
    together = gram_matrices(model, views, batches)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr("compress_search.calibration._GRAM_ELEMENTS", 36**2)
    apart = gram_matrices(model, views, batches)
    # One to measure, then the layers of 9, 36 and 4 features in three passes over two batches each.
    assert len(runs) == 1 + 3 * 2
    for name, gram in together.items():
        assert torch.equal(apart[name], gram)


def test_of_a_layer_too_wide_for_a_gram_matrix_rows_are_kept(monkeypatch, caplog):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    views = dict(model.named_children())
    batches = [torch.randn(2, 1, 7, 6) for _ in range(2)]
    expected = gram_matrices(model, views, batches)
    monkeypatch.setattr("compress_search.calibration.WIDEST", 20)
    found = gram_matrices(model, views, batches)
    assert torch.equal(found["0"], expected["0"])
    rows = found["1"].values.double()
    assert rows.shape == (2, 4 * 3 * 2, 18)
    torch.testing.assert_close(rows.mT @ rows / 24, expected["1"][:, :-1, :-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["1"].mean, expected["1"][:, :-1, -1], rtol=1e-5, atol=1e-6)
    energy = expected["1"][:, :-1, :-1].diagonal(dim1=1, dim2=2).mean(dim=1)
    torch.testing.assert_close(found["1"].mean_energy, energy, rtol=1e-5, atol=0)
    assert "fewer calibration rows than input features" not in caplog.text
    gram_matrices(model, views, [torch.randn(1, 1, 6, 6)])
    assert "fewer calibration rows than input features in: 1." in caplog.text
