"""Factorised layers over random geometries: exact at full rank, exact in cost, better with more rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_search.calibration import divergence
from compress_search.methods import METHODS, factorisation
from compress_search.profile import profile_model

# PyTorch says that it pads one side more than the other; the geometry is to be tested all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def layers(draw):
    """A random convolution, transposed convolution or linear layer, and an input shape for it."""
    dimensions = draw(st.integers(0, 3))
    bias = draw(st.booleans())
    if dimensions == 0:
        layer = nn.Linear(draw(st.integers(2, 12)), draw(st.integers(2, 12)), bias=bias)
        return layer, (2, *draw(st.sampled_from([(), (5,)])), layer.in_features)
    pick = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dimensions))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 6))
    geometry = {"kernel_size": pick(1, 3), "dilation": pick(1, 2), "groups": groups, "bias": bias}
    shape = (2, channels[0], *(9,) * dimensions)
    if draw(st.integers(0, 3)) == 0:
        stride = pick(1, 2)
        return TRANSPOSED[dimensions](*channels, stride=stride, padding=pick(0, 1), **geometry), shape
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    placed = {"padding": "same"} if same else {"padding": pick(0, 2), "stride": pick(1, 3)}
    return CONVOLUTIONS[dimensions](*channels, padding_mode=mode, **placed, **geometry), shape


@settings(max_examples=150, deadline=None)
@given(drawn=layers(), method=st.sampled_from(["spatial_svd", "weight_svd"]), data=st.booleans())
def test_full_rank_is_exact_and_the_cost_is_predicted(drawn, method, data):
    layer, shape = drawn
    model = nn.Sequential(layer).double().eval()
    inputs = torch.randn(shape, dtype=torch.float64)
    analysis = METHODS[method].analyse(model, inputs)
    for unit in analysis.units:
        for rank in (1, unit.full_size):
            compressed = analysis.apply({unit.name: rank}, [inputs] if data else [])
            counted = profile_model(compressed.model, inputs)
            assert counted.macs == analysis.predict_macs({unit.name: rank})
            assert compressed.model(inputs).shape == model(inputs).shape
        with torch.no_grad():
            torch.testing.assert_close(compressed.model(inputs), model(inputs), rtol=1e-6, atol=1e-6)
    if not analysis.units:
        assert analysis.left_alone["0"]


@settings(max_examples=25, deadline=None)
@given(drawn=layers(), method=st.sampled_from(["spatial_svd", "weight_svd"]), seed=st.integers(0, 20))
def test_more_rank_never_diverges_more_without_data(drawn, method, seed):
    layer, shape = drawn
    torch.manual_seed(seed)
    model = nn.Sequential(layer).double().eval()
    analysis = METHODS[method].analyse(model, torch.zeros(shape, dtype=torch.float64))
    weight = layer.weight.detach()
    for unit in analysis.units:
        split = analysis.split_of(layer)
        errors = []
        for rank in range(1, unit.full_size + 1):
            pair = analysis.apply({unit.name: rank}, []).model[0]
            first, second = pair
            # The pair as one kernel, by sending every unit impulse of the matrix through both factors.
            errors.append(_weight_error(split, first, second, weight))
        assert errors == sorted(errors, reverse=True) or max(errors) < 1e-12


def _weight_error(split, first, second, weight) -> float:
    groups = split.matrix().shape[0]
    rank = first.weight.shape[0] // groups
    left = first.weight.detach().reshape(groups, rank, -1).transpose(1, 2)
    if isinstance(second, tuple(TRANSPOSED.values())):
        right = second.weight.detach().reshape(groups, rank, -1)
    else:
        columns = second.weight.detach().reshape(groups, -1, rank, *second.weight.shape[2:])
        right = columns.transpose(1, 2).reshape(groups, rank, -1)
    return round(float((split.matrix() - left @ right).square().sum()), 9)


def test_the_spatial_cost_is_the_papers_with_the_input_width():
    convolution = nn.Conv2d(6, 10, (3, 5), stride=(2, 3), padding=0)
    analysis = METHODS["spatial_svd"].analyse(nn.Sequential(convolution), torch.zeros(1, 6, 21, 23))
    height_out, width_out, width_in = 10, 7, 23
    for rank in (1, 4, 18):
        expected = rank * 6 * 3 * height_out * width_in + 10 * rank * 5 * height_out * width_out
        assert analysis.predict_macs({"0": rank}) == expected


def test_a_pointwise_convolution_under_spatial_svd_is_the_weight_svd():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2))
    analyses = [
        METHODS[name].analyse(model, torch.zeros(1, 8, 6, 6)) for name in ("spatial_svd", "weight_svd")
    ]
    edits = [analysis.apply({"0": 3}, []).step.edits for analysis in analyses]
    assert edits[0] == edits[1]
    assert [part.name for part in edits[0][0].parts] == ["reduce", "expand"]
    # The stride comes first: the positions that it skips are never computed.
    assert analyses[0].predict_macs({"0": 3}) == 3 * (8 + 8) * 9


def test_a_depthwise_kernel_is_separated_where_that_saves():
    model = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8))
    analysis = METHODS["spatial_svd"].analyse(model, torch.zeros(1, 8, 6, 6))
    assert analysis.predict_macs({"0": 1}) == 8 * (5 + 5) * 36
    with torch.no_grad():
        outer = torch.outer(torch.arange(1.0, 6.0), torch.tensor([1.0, -1.0, 2.0, 0.5, 3.0]))
        model[0].weight.copy_(outer.expand(8, 1, 5, 5))
    inputs = torch.randn(2, 8, 6, 6)
    separated = analysis.apply({"0": 1}, []).model
    torch.testing.assert_close(separated(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert METHODS["weight_svd"].analyse(model, inputs).left_alone == {
        "0": "rank 1 already costs as many MACs as the layer itself"
    }


@pytest.mark.parametrize("method", ["spatial_svd", "weight_svd"])
def test_data_aware_truncation_beats_the_plain_one_on_the_data(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1)).eval()
    inputs = torch.randn(32, 6, 8, 8) * torch.logspace(0, 1.5, 6)[:, None, None]
    analysis = METHODS[method].analyse(model, inputs)
    aware, plain = (analysis.apply({"0": 3}, data).model for data in (list(inputs.split(4)), []))
    assert divergence(aware, model, [inputs]) < 0.7 * divergence(plain, model, [inputs])


@pytest.mark.parametrize(("method", "kernel", "rank"), [("spatial_svd", 3, 9), ("weight_svd", 1, 3)])
def test_rank_goes_to_the_channels_that_the_output_hears(method, kernel, rank, monkeypatch):
    torch.manual_seed(0)
    first, last = nn.Conv2d(6, 8, kernel, bias=False), nn.Conv2d(8, 3, 1)
    with torch.no_grad():
        last.weight[:, 2:] = 0.0
    network = nn.Sequential(first, nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    batches = list(torch.randn(6, 20, 6, 9, 9))

    def error_of_heard_channels():
        analysis = METHODS[method].analyse(network, batches[0][:1])
        (imitation,) = analysis.imitations({"0": [rank]}, batches)
        return float((imitation.parameters[rank]["0.weight"] - first.weight).detach()[:2].norm())

    weighed = error_of_heard_channels()
    monkeypatch.setattr(factorisation, "output_sensitivities", lambda *_: {})
    assert weighed < 0.3 * error_of_heard_channels()


def test_what_follows_a_transposed_convolution_is_refitted():
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 8, 2, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), up, nn.Conv2d(8, 4, 3)).eval()
    batches = list(torch.randn(6, 16, 3, 8, 8))
    analysis = METHODS["weight_svd"].analyse(model, batches[0])
    factorised = analysis.apply({"2": 3}, batches).model
    # The layer after it makes good part of what was lost, and the one before it has nothing to make good.
    assert not torch.equal(factorised[3].weight, model[3].weight)
    assert torch.equal(factorised[0].weight, model[0].weight)
    refitted = divergence(factorised, model, batches)
    factorised[3].load_state_dict(model[3].state_dict())
    assert refitted < 0.95 * divergence(factorised, model, batches)
