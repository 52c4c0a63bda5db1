"""Reconstruction by least squares, against torch.linalg.lstsq and against doing nothing."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_search.exceptions import ModelError
from compress_search.least_squares import DualRegression, PrimalRegression, ridge_correction
from compress_search.methods import METHODS
from compress_search.moments import Moments
from compress_search.pausing import PausablePass
from compress_search.reconstruction import (
    Refit,
    RunAgain,
    WaitAndGoOn,
    _road,
    refit_in_forward_order,
    refit_on,
    with_following,
)

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)


def _moments(rows: torch.Tensor, residual: torch.Tensor, *, has_bias: bool) -> Moments:
    return Moments((rows.T @ rows)[None], (rows.T @ residual)[None], len(rows), has_bias)


def test_the_correction_is_the_least_squares_solution():
    rows, residual = torch.randn(200, 6).double(), torch.randn(200, 3).double()
    fitted, held_out = (
        _moments(rows[part], residual[part], has_bias=False) for part in (slice(150), slice(150, 200))
    )
    signal = rows @ torch.randn(6, 3).double()
    with_signal = [
        _moments(rows[part], (signal + 1e-3 * residual)[part], has_bias=False)
        for part in (slice(150), slice(150, 200))
    ]
    expected = torch.linalg.lstsq(rows, signal + 1e-3 * residual).solution
    torch.testing.assert_close(ridge_correction(*with_signal)[0], expected, rtol=1e-3, atol=1e-3)
    # Pure noise: whatever is chosen must not make the held-out samples worse.
    assert held_out.change_of_error(ridge_correction(fitted, held_out)) <= 0.0


def test_nothing_changes_where_no_ridge_helps_on_held_out_samples():
    rows = torch.randn(50, 4).double()
    fitted = _moments(rows, rows @ torch.ones(4, 2).double(), has_bias=False)
    held_out = _moments(rows, -rows @ torch.ones(4, 2).double(), has_bias=False)
    assert torch.equal(ridge_correction(fitted, held_out), torch.zeros(1, 4, 2, dtype=torch.float64))


def test_a_rank_deficient_gram_gives_a_finite_answer():
    rows = torch.zeros(20, 5).double()
    rows[:, 0] = 1.0
    correction = ridge_correction(_moments(rows, torch.randn(20, 2).double(), has_bias=True), None)
    assert torch.isfinite(correction).all()


def _error(model: nn.Module, original: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(batch) - original(batch)).square().sum()) for batch in batches)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    stride=st.integers(1, 2),
    batches=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_refit_never_raises_the_error_on_the_calibration_data(groups, bias, stride, batches, seed):
    torch.manual_seed(seed)
    original = nn.Sequential(nn.Conv2d(2, 4, 3, stride=stride, groups=groups, bias=bias)).eval()
    model = copy.deepcopy(original)
    model[0].weight.data += 0.3 * torch.randn_like(model[0].weight)
    data = [torch.randn(3, 2, 7, 7) for _ in range(batches)]
    before = _error(model, original, data)
    refit_in_forward_order(model, original, [Refit("0", "0")], data)
    assert _error(model, original, data) <= before * (1 + 1e-6)


def test_refit_recovers_a_layer_whose_inputs_were_changed():
    torch.manual_seed(1)
    original = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)).eval()
    model = copy.deepcopy(original)
    model[0].weight.data *= torch.tensor([0.5, 2.0, 1.0, -1.0])[:, None, None, None]
    data = [torch.randn(8, 2, 9, 9) for _ in range(8)]
    before = _error(model, original, data)
    refit_in_forward_order(model, original, [Refit("1", "1")], data)
    assert _error(model, original, data) < 1e-3 * before


def test_each_call_of_a_reused_layer_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    original = Twice().eval()
    model = copy.deepcopy(original)
    model.layer.weight.data += 0.1 * torch.randn_like(model.layer.weight)
    data = [torch.randn(8, 2, 8, 8) for _ in range(8)]
    before = _error(model, original, data)
    refit_in_forward_order(model, original, [Refit("layer", "layer", calls=2)], data)
    assert _error(model, original, data) < 0.1 * before


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_layers_that_share_a_parameter_keep_their_weights(parameter):
    torch.manual_seed(0)
    original = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))).eval()
    for other in (2, 3):
        setattr(original[other], parameter, getattr(original[1], parameter))
    model = copy.deepcopy(original)
    model[0].weight.data += 0.3 * torch.randn_like(model[0].weight)
    before = copy.deepcopy(model)
    refits = [Refit(name, name) for name in "0123"]
    refit_in_forward_order(model, original, refits, [torch.randn(8, 2, 8, 8) for _ in range(8)])
    for kept, layer in zip(before[1:], model[1:], strict=True):
        assert torch.equal(kept.weight, layer.weight) and torch.equal(kept.bias, layer.bias)
    assert not torch.equal(before[0].weight, model[0].weight)


def test_the_shared_weights_behind_a_factorised_layer_do_no_harm():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
    layers[2].weight = layers[3].weight = layers[1].weight
    steps = [step for layer in layers for step in (layer, nn.ReLU())]
    model = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    analysis = METHODS["spatial_svd"].analyse(model, torch.zeros(1, 3, 16, 16))
    fitted, unseen = list(torch.randn(6, 16, 3, 16, 16)), list(torch.randn(1, 64, 3, 16, 16))
    refitted = analysis.apply({"0": 2}, fitted).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress_search.methods.factorisation.refit_in_forward_order", lambda *_: None)
        plain = analysis.apply({"0": 2}, fitted).model
    assert _error(refitted, model, unseen) < 0.5 * _error(plain, model, unseen)


def test_only_the_kept_output_channels_are_fitted():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(2, 4, 3)).eval()
    model = nn.Sequential(nn.Conv2d(2, 2, 3)).eval()
    data = [torch.randn(8, 2, 8, 8) for _ in range(8)]
    refit_in_forward_order(model, original, [Refit("0", "0", outputs=(1, 3))], data)
    torch.testing.assert_close(model[0].weight, original[0].weight[[1, 3]], rtol=1e-3, atol=1e-3)


def _refitted(road, method, net, batches):
    """The weights of a network at half its MACs, refitted on a road given the compressed model."""
    model = zoo.build(net)
    analysis = METHODS[method].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress_search.reconstruction._road", road)
        sizes = {unit.name: max(1, unit.full_size // 2) for unit in analysis.units}
        return analysis.apply(sizes, batches).model.state_dict()


def _again(model, original, refits, batches):
    return RunAgain(model, original, [[batch] for batch in batches])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", zoo.ZOO)
def test_waiting_passes_give_the_weights_of_running_again(method, net):
    batches = [torch.randn(4, *zoo.EXAMPLE_SHAPE[1:]) for _ in range(5)]
    roads = []

    def waiting(*args):
        roads.append(_road(*args))
        return roads[-1]

    expected, found = (_refitted(road, method, net, batches) for road in (_again, waiting))
    assert isinstance(roads[0], WaitAndGoOn)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("waiting", "starts_a_pass"), [(0, 7), (100_000, 5.5), (2**20, 1)])
def test_passes_that_do_not_fit_into_memory_run_again(waiting, starts_a_pass, monkeypatch):
    batches = [torch.randn(2, *zoo.EXAMPLE_SHAPE[1:]) for _ in range(5)]
    expected = _refitted(_again, "spatial_svd", "Residual", batches)
    starts = []
    monkeypatch.setattr("compress_search.reconstruction._WAITING_BYTES", waiting)
    monkeypatch.setattr(
        "compress_search.reconstruction.PausablePass", lambda *args: starts.append(1) or PausablePass(*args)
    )
    found = _refitted(_road, "spatial_svd", "Residual", batches)
    # Seven layers, two models and five batches.
    assert len(starts) == starts_a_pass * 2 * len(batches)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_batches_cut_to_fit_into_memory_give_the_same_weights(monkeypatch):
    batches = [torch.randn(5, *zoo.EXAMPLE_SHAPE[1:]) for _ in range(5)]
    expected = _refitted(_again, "channel_pruning", "DepthwiseWithGate", batches)
    monkeypatch.setattr("compress_search.activations._PASS_BYTES", 50_000)
    found = _refitted(_road, "channel_pruning", "DepthwiseWithGate", batches)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def _refit_on_both_roads(original, names, batches):
    """Refit copies whose weights were disturbed, on either road; return them."""
    torch.manual_seed(1)
    model = copy.deepcopy(original)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    refits = [Refit(name, name) for name in names]
    refit_in_forward_order(fast, original, refits, batches)
    with torch.no_grad():
        refits = with_following(refits, original, batches[0])
        refit_on(_again(slow, original, refits, batches), slow, refits)
    return fast, slow


class Backwards(nn.Module):
    """Calls its layers in another order than they are named in, and one of them only for some batches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = self.c(torch.relu(self.b(x)))
        if x.shape[0] == 3:
            x = self.d(x)
        return self.a(torch.relu(x))


def test_layers_called_in_another_order_or_not_at_all():
    original = Backwards().eval()
    batches = [torch.randn(n, 2, 8, 8) for n in (4, 3, 4, 3, 4, 3)]
    fast, slow = _refit_on_both_roads(original, ["a", "b", "d", "c"], batches)
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Remembering(nn.Module):
    """Leaves activations in itself, as U-Nets on hooks of their encoders do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        self.kept = self.first(x)
        return self.second(torch.relu(self.kept)) + self.kept


def test_a_model_that_leaves_activations_in_itself():
    torch.manual_seed(0)
    original = nn.Sequential(Remembering(), nn.Conv2d(2, 2, 3)).eval()
    batches = [torch.randn(4, 2, 8, 8) for _ in range(5)]
    fast, slow = _refit_on_both_roads(original, ["0.first", "0.second", "1"], batches)
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_casts_of_the_weights_as_they_were_are_not_used():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 3, 3)).eval()
    batches = [torch.randn(8, 2, 12, 12) for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = _refit_on_both_roads(original, ["0", "2", "3"], batches)
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    energy = sum(float(original(batch).detach().square().sum()) for batch in batches)
    assert _error(fast, original, batches) < 1e-2 * energy


class Failing(nn.Module):
    """Cannot take one batch."""

    def forward(self, x):
        if x.shape[0] == 3:
            raise ZeroDivisionError("three examples")
        return x


def test_what_a_model_raises_surfaces_and_no_hook_stays():
    original = nn.Sequential(nn.Conv2d(2, 2, 3), Failing(), nn.Conv2d(2, 2, 3)).eval()
    model = copy.deepcopy(original).train()
    batches = [torch.randn(n, 2, 8, 8) for n in (4, 3)]
    with pytest.raises(ZeroDivisionError, match="three examples"):
        refit_in_forward_order(model, original, [Refit("0", "0"), Refit("2", "2")], batches)
    assert model.training and not original.training and torch.is_grad_enabled()
    hooks = [
        m for net in (model, original) for m in net.modules() if m._forward_hooks or m._forward_pre_hooks
    ]
    assert not hooks


def test_activations_that_are_not_finite_name_the_layer():
    original = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)).eval()
    model = copy.deepcopy(original)
    model[0].weight.data[0] = torch.inf
    with pytest.raises(ModelError, match="layer '1' are not finite"):
        refit_in_forward_order(model, original, [Refit("1", "1")], [torch.randn(4, 2, 8, 8)])


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    linear=st.booleans(),
    examples=st.integers(1, 6),
    batches=st.sampled_from([1, 5]),
    seed=st.integers(0, 100),
)
def test_the_dual_gives_what_the_normal_equations_give(groups, bias, linear, examples, batches, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(9, 3, bias=bias) if linear else nn.Conv2d(2, 4, 3, groups=groups, bias=bias)
    layer = layer.double()
    shape = (9,) if linear else (2, 5, 4)
    inputs = [torch.randn(examples, *shape).double() + 0.5 for _ in range(batches)]
    residuals = [0.3 * layer(each).detach() + 0.1 for each in inputs]
    primal, dual = PrimalRegression(layer, "layer"), DualRegression(layer, "layer")
    for number, (given_, left) in enumerate(zip(inputs, residuals, strict=True)):
        primal.add(given_, left, held_out=number == 3)
        dual.add(given_, left, held_out=number == 3)
    assert primal.is_underdetermined == dual.is_underdetermined
    ((_, expected),) = primal.changes()
    found = torch.zeros_like(expected)
    for regressors, change in dual.changes():
        found[:, regressors] = change
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def _refit_wide(monkeypatch, *, most, data):
    """Refit a disturbed layer as if it were a wide one; return both, and how many rows were solved with."""
    monkeypatch.setattr("compress_search.least_squares.WIDEST", 20)
    monkeypatch.setattr("compress_search.least_squares._MOST_ROWS", most)
    monkeypatch.setattr("compress_search.least_squares._FEATURES_AT_A_TIME", 5)
    original = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)).eval()
    model = copy.deepcopy(original)
    model[0].weight.data += 0.1 * torch.randn_like(model[0].weight)
    disturbed = copy.deepcopy(model)
    sizes = []
    solve = DualRegression._solve
    monkeypatch.setattr(
        DualRegression,
        "_solve",
        lambda self, kernel, *rest: sizes.append(len(kernel[0])) or solve(self, kernel, *rest),
    )
    refit_in_forward_order(model, original, [Refit("0", "0")], data)
    return model, original, _error(disturbed, original, data), sizes[-1]


def test_a_wide_layer_is_refitted_on_some_of_its_rows(monkeypatch):
    torch.manual_seed(0)
    data = [torch.randn(4, 4, 9, 9) for _ in range(8)]
    model, original, before, rows = _refit_wide(monkeypatch, most=64, data=data)
    assert rows == 64
    # 64 rows for 37 unknowns without noise: they are found, but for the ridge.
    assert _error(model, original, data) < 1e-3 * before


@pytest.mark.parametrize("side", [7, 8])
def test_rows_of_a_wide_layer_come_from_everywhere_in_an_image(side, monkeypatch):
    torch.manual_seed(0)
    data = [torch.randn(4, 4, side, side) for _ in range(8)]
    # Every seventh or eighth row would be of the first column alone, where a third of the taps see padding.
    model, original, before, rows = _refit_wide(monkeypatch, most=4 * 8 * side, data=data)
    assert rows == 4 * 8 * side
    assert _error(model, original, data) < 1e-3 * before


def test_the_same_rows_of_a_wide_layer_are_drawn_again(monkeypatch):
    data = list(torch.randn(8, 4, 4, 9, 9))
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(_refit_wide(monkeypatch, most=64, data=data)[0][0])
    assert torch.equal(found[0].weight, found[1].weight) and torch.equal(found[0].bias, found[1].bias)


@pytest.mark.parametrize("batches", [[]])
def test_without_data_nothing_changes(batches):
    original = nn.Sequential(nn.Conv2d(1, 1, 3))
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    before = model[0].weight.clone()
    refit_in_forward_order(model, original, [Refit("0", "0")], batches)
    assert torch.equal(model[0].weight, before)
