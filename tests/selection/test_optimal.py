"""Optimal selection, against trying every combination of sizes, and against uniform sizes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search.methods.cost import Cost, CostTerm, LinearForm
from compress_search.selection.choices import size_choices
from compress_search.selection.curves import LossCurves, loss_curves
from compress_search.selection.optimal import Optimal, least_loss
from compress_search.selection.request import SelectionRequest
from compress_search.selection.uniform import Uniform, uniform_sizes


def _curves(draw, cost):
    """Rough curves over all sizes, convex or not."""
    values = np.full((len(cost.full), max(cost.full.values()) + 1), np.inf)
    values[:, 0] = 0
    for place, full in enumerate(cost.full.values()):
        sizes = np.arange(1, full + 1)
        height, decay = 10 ** draw.uniform(-3, 0), draw.uniform(1, 6)
        loss = height * (np.exp(-decay * sizes / full) - np.exp(-decay))
        loss[:-1] *= np.exp(draw.normal(0, 0.3, full - 1))
        values[place, sizes] = np.maximum.accumulate(loss[::-1])[::-1]
    return LossCurves(values)


def _coupled(draw, units, width):
    """A chain of groups of channels with some layers that skip."""
    names = [f"u{number}" for number in range(units)]
    full = {name: int(draw.integers(width // 2, width + 1)) for name in names}
    layers = [(None, names[0]), *itertools.pairwise(names), (names[-1], None)]
    layers += [tuple(draw.choice(names, 2)) for _ in range(units // 2)]
    terms = [
        CostTerm(
            int(draw.integers(1, 200)),
            forms=tuple(LinearForm(0, {str(name): 1}) for name in layer if name is not None),
        )
        for layer in layers
    ]
    return Cost(tuple(terms), full)


def _separable(draw, units, width):
    """Layers that are factorised, or are left dense."""
    full = {f"u{number}": int(draw.integers(width // 2, width + 1)) for number in range(units)}
    rates = {name: int(draw.integers(1, 50)) for name in full}
    terms = [CostTerm(rate, forms=(LinearForm(0, {name: 1}),)) for name, rate in rates.items()]
    dense = {name: int(rate * full[name] * draw.uniform(0.5, 0.9)) for name, rate in rates.items()}
    return Cost((CostTerm(30), *terms), full, dense)


def _best(cost, curves, choices, budget):
    rows = np.array(list(itertools.product(*([0, *choices[name]] for name in cost.full))))
    return curves.of_rows(rows[cost.of_rows(rows) <= budget]).min()


def _instance(make, seed):
    draw = np.random.default_rng(seed)
    units = int(draw.integers(2, 6))
    cost = make(draw, units, 8 if units > 4 else 12)
    choices = {name: range(1, (cost.size_at(name, 1.0) or 0) + 1) for name in cost.full}
    least = cost.of({name: sizes[0] for name, sizes in choices.items()})
    budget = int(least + draw.uniform(0.1, 0.9) * (cost.of({}) - least))
    return cost, _curves(draw, cost), choices, budget


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_units_that_cost_each_for_itself_lose_least(seed):
    cost, curves, choices, budget = _instance(_separable, seed)
    assert cost.is_separable
    sizes = least_loss(cost, curves, choices, budget)
    assert cost.of(sizes) <= budget
    loss = curves.of_rows(cost.row(sizes)[None])[0]
    assert loss <= 1.001 * _best(cost, curves, choices, budget)


def test_coupled_units_lose_nearly_the_least():
    gaps = []
    for seed in range(60):
        cost, curves, choices, budget = _instance(_coupled, seed)
        assert not cost.is_separable
        sizes = least_loss(cost, curves, choices, budget)
        assert cost.of(sizes) <= budget
        loss, best = curves.of_rows(cost.row(sizes)[None])[0], _best(cost, curves, choices, budget)
        gaps.append(loss / best - 1)
    # Seen on 300 others: 98 % within 1e-9, a mean of 0.15 %, the worst 29 %.
    assert np.mean(np.array(gaps) < 1e-9) > 0.9
    assert np.mean(gaps) < 0.02


@pytest.mark.parametrize("method", ["spatial_svd", "channel_pruning"])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_it_loses_less_than_uniform_sizes_do(analysed, make_table, method, kind, ratio):
    analysis = analysed(method, [32, 32, 48, 48, 48])
    table, request = make_table(analysis), SelectionRequest(ratio=ratio, cost=kind)
    cost = analysis.cost(kind)
    curves = loss_curves(table, cost.full, size_choices(analysis, request))
    chosen, uniform = (
        curves.of_rows(cost.row(selector.select(analysis, request, table))[None])[0]
        for selector in (Optimal(), Uniform())
    )
    assert chosen < 0.8 * uniform


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_coupled_units_never_lose_more_than_uniform_ones(seed):
    cost, curves, choices, budget = _instance(_coupled, seed)
    sizes = [least_loss(cost, curves, choices, budget), uniform_sizes(cost, choices, budget)]
    chosen, uniform = curves.of_rows(np.stack([cost.row(s) for s in sizes]))
    assert chosen <= uniform


def test_a_layer_that_nothing_hurts_is_shrunk_and_one_that_everything_hurts_is_left_alone():
    forms = {name: (LinearForm(0, {name: 1}),) for name in "ab"}
    terms = tuple(CostTerm(10, forms=form) for form in forms.values())
    cost = Cost(terms, {"a": 20, "b": 20}, dense={"a": 100, "b": 100})
    values = np.zeros((2, 21))
    values[0, 1:], values[1, 1:] = np.linspace(1e-6, 0, 20), np.linspace(10, 0.1, 20)
    sizes = least_loss(cost, LossCurves(values), {"a": range(1, 11), "b": range(1, 11)}, 130)
    assert sizes == {"a": 3}


def test_units_without_losses_stay_as_they_are(analysed, make_table):
    analysis = analysed("spatial_svd", [32, 32, 32])
    table = make_table(analysis)
    known = [cell for cell in table.cells if cell.unit != "layers.1"]
    sizes = Optimal().select(analysis, SelectionRequest(ratio=0.7), type(table)(tuple(known)))
    assert sizes and "layers.1" not in sizes


@pytest.mark.parametrize("method", ["spatial_svd", "channel_pruning"])
def test_sixty_layers_are_sized_in_seconds(analysed, make_table, method):
    analysis = analysed(method, [96 + number for number in range(30)] * 2)
    table = make_table(analysis)
    started = time.perf_counter()
    sizes = Optimal().select(analysis, SelectionRequest(ratio=0.5), table)
    # Factorised layers take some tenths of a second, coupled channels a few seconds; machines may be busy.
    assert time.perf_counter() - started < 30
    assert 0.4995 < analysis.predict_macs(sizes) / analysis.profile.macs <= 0.5


@pytest.mark.parametrize("method", ["spatial_svd", "weight_svd", "channel_pruning"])
def test_the_loss_falls_as_the_ratio_rises(analysed, make_table, method):
    analysis = analysed(method, [32, 40, 48, 56, 64, 72])
    cost, choices = analysis.cost("macs"), size_choices(analysis, SelectionRequest(ratio=0.5))
    curves = loss_curves(make_table(analysis), cost.full, choices)
    sizes = [least_loss(cost, curves, choices, percent * cost.of({}) // 100) for percent in range(20, 101, 5)]
    losses = curves.of_rows(np.stack([cost.row(chosen) for chosen in sizes])).tolist()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] == 0
