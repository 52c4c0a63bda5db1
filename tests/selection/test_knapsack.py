"""The knapsack, against trying everything and against HiGHS."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from compress_search.selection.knapsack import pack


def _problem(seed, classes, most, *, convex):
    """Costs that rise, losses that fall with them; padded where a class has fewer choices."""
    draw = np.random.default_rng(seed)
    costs = np.zeros((classes, most), dtype=np.int64)
    losses = np.full((classes, most), np.inf)
    for place in range(classes):
        number = int(draw.integers(1, most + 1))
        costs[place, :number] = np.cumsum(draw.integers(1, 10**6, number))
        height, decay = 10 ** draw.uniform(-3, 1), draw.uniform(1, 8)
        loss = height * np.exp(-decay * np.arange(number) / most)
        noisy = loss if convex else loss * np.exp(draw.normal(0, 0.7, number))
        losses[place, :number] = np.minimum.accumulate(noisy)
    least, all_of_it = (pick(costs, axis=1).sum() for pick in (_first, np.max))
    return costs, losses, int(least + draw.random() * (all_of_it - least))


def _first(costs, axis):
    return costs[:, 0]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(1, 5),
    most=st.integers(1, 7),
    convex=st.booleans(),
    gap=st.sampled_from([0.0, 0.001, 0.1]),
)
def test_no_choice_within_the_budget_loses_less(seed, classes, most, convex, gap):
    costs, losses, budget = _problem(seed, classes, most, convex=convex)
    best = min(
        losses[range(classes), picked].sum()
        for picked in itertools.product(range(most), repeat=classes)
        if costs[range(classes), picked].sum() <= budget
    )
    packing = pack(costs, losses, budget, gap=gap)
    assert costs[range(classes), packing.picked].sum() <= budget
    assert packing.loss == pytest.approx(losses[range(classes), packing.picked].sum())
    assert best * (1 - 1e-9) <= packing.loss <= best * (1 + gap) * (1 + 1e-9)
    assert packing.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_large_problem_is_solved_as_highs_solves_it_and_fast(seed):
    costs, losses, budget = _problem(seed, 60, 40, convex=False)
    started = time.perf_counter()
    packing = pack(costs, losses, budget, gap=1e-3)
    # It takes some hundredths of a second; the limit allows for a busy machine.
    assert time.perf_counter() - started < 5
    assert costs[range(60), packing.picked].sum() <= budget
    assert packing.loss <= 1.001 * _loss_of_highs(costs, losses, budget)


def _loss_of_highs(costs, losses, budget):
    place, choice = np.nonzero(np.isfinite(losses))
    one_each = sparse.csr_array((np.ones(len(place)), (place, np.arange(len(place)))))
    spent = sparse.csr_array(costs[place, choice][None] / budget)
    rows = LinearConstraint(
        sparse.vstack([one_each, spent]),
        np.append(np.ones(len(losses)), -np.inf),
        np.append(np.ones(len(losses)), 1.0),
    )
    solution = milp(
        losses[place, choice],
        constraints=rows,
        integrality=np.ones(len(place)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    assert solution.success
    return solution.fun


def test_choices_that_are_all_worth_their_cost_do_not_hold_it_up():
    # Every choice is on one line: there are astronomically many optima.
    costs = np.tile(np.arange(200, dtype=np.int64) * 1000, (60, 1))
    losses = (200.0 - np.arange(200)) * np.ones((60, 1))
    started = time.perf_counter()
    packing = pack(costs, losses, int(costs[:, -1].sum()) // 2 + 37, gap=1e-3)
    assert time.perf_counter() - started < 5
    assert packing.loss <= 1.001 * packing.bound


def test_everything_may_be_had_where_the_budget_allows_it():
    costs, losses, _ = _problem(1, 5, 6, convex=True)
    packing = pack(costs, losses, int(costs.max(axis=1).sum()))
    assert packing.loss == pytest.approx(np.where(np.isfinite(losses), losses, np.inf).min(axis=1).sum())
