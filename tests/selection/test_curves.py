"""Loss curves: what is measured stays, what is between falls, what is not known is dear."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search.selection.curves import curve, falling, loss_curves
from compress_search.selection.table import Cell, SensitivityTable


def test_falling_losses_are_met_exactly_and_the_full_size_loses_nothing():
    measured = {10: 1.0, 20: 0.1, 40: 0.01}
    values = curve(measured, 64, np.array([10, 20, 40, 64]), floor=1e-4)
    assert values == pytest.approx([1.0, 0.1, 0.01, 0.0])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_a_power_of_what_is_missing_is_found_at_all_sizes(power):
    def loss(size):
        return ((100 - size) / 100) ** power

    sizes = np.arange(10, 101)
    values = curve({size: loss(size) for size in (10, 40, 80)}, 100, sizes, floor=1e-9)
    assert values == pytest.approx([loss(size) for size in sizes])


def test_below_the_smallest_measured_size_the_loss_rises_with_the_fourth_power():
    values = curve({32: 0.1, 48: 0.01}, 64, np.array([4, 16]), floor=1e-4)
    assert values == pytest.approx([0.1 * 8**4, 0.1 * 2**4])


def test_noise_is_averaged_where_it_makes_the_loss_rise():
    assert falling({1: 0.5, 2: 0.1, 3: 0.3, 4: -0.1, 5: 0.0}) == pytest.approx(
        {1: 0.5, 2: 0.2, 3: 0.2, 4: -0.05, 5: -0.05}
    )


@settings(max_examples=200, deadline=None)
@given(
    losses=st.dictionaries(st.integers(1, 60), st.floats(-0.1, 5), min_size=1, max_size=10),
    floor=st.floats(1e-9, 1e-2),
)
def test_no_curve_rises_with_the_size_or_is_negative_or_free(losses, floor):
    values = curve(losses, 60, np.arange(1, 61), floor=floor)
    assert np.isfinite(values).all()
    assert (np.diff(values) <= 1e-12 + 1e-9 * values[:-1]).all()
    assert values[-1] == 0
    assert (values[:-1] > 0).all() or set(losses) == {60}


def test_what_a_unit_may_not_take_and_what_failed_is_not_in_the_curves():
    cells = (Cell("a", 2, 0.5), Cell("a", 4, math.nan), Cell("a", 6, 0.1), Cell("b", 4, math.nan))
    choices = {"a": range(2, 9, 2), "b": range(1, 9), "c": range(1, 9)}
    curves = loss_curves(SensitivityTable(cells), {"a": 8, "b": 8, "c": 8}, choices)
    assert np.isfinite(curves.values[0]).nonzero()[0].tolist() == [0, 2, 4, 6, 8]
    assert 0.1 < curves.values[0, 4] < 0.5
    # Nothing is known of b, whose evaluation failed, and of c: they may only stay as they are.
    assert np.isfinite(curves.values[1:]).nonzero()[1].tolist() == [0, 0]
    assert curves.of_rows(np.array([[2, 0, 0], [0, 0, 0]])).tolist() == pytest.approx([0.5, 0.0])
