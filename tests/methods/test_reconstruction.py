"""Reconstruction by least squares, against torch.linalg.lstsq and against doing nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_search.reconstruction import Moments, Refit, refit_in_forward_order, ridge_correction


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


def test_only_the_kept_output_channels_are_fitted():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(2, 4, 3)).eval()
    model = nn.Sequential(nn.Conv2d(2, 2, 3)).eval()
    data = [torch.randn(8, 2, 8, 8) for _ in range(8)]
    refit_in_forward_order(model, original, [Refit("0", "0", outputs=(1, 3))], data)
    torch.testing.assert_close(model[0].weight, original[0].weight[[1, 3]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batches", [[]])
def test_without_data_nothing_changes(batches):
    original = nn.Sequential(nn.Conv2d(1, 1, 3))
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    before = model[0].weight.clone()
    refit_in_forward_order(model, original, [Refit("0", "0")], batches)
    assert torch.equal(model[0].weight, before)
