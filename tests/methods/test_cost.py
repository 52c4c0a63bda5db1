"""The cost formula, against models that are built and counted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_search.exceptions import ModelError
from compress_search.methods import METHODS
from compress_search.methods.cost import COST_KINDS, Cost, CostTerm, LinearForm
from compress_search.profile import profile_model

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)

EXAMPLE = torch.zeros(zoo.EXAMPLE_SHAPE)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("net", zoo.ZOO)
def test_predicted_costs_are_those_counted_on_the_built_model(method, net):
    analysis = method.analyse(zoo.build(net), EXAMPLE)
    draw = np.random.default_rng(0)
    for _ in range(8):
        # Some units are left as they are, and the others get any size.
        named = [unit for unit in analysis.units if draw.random() < 0.7]
        sizes = {unit.name: int(draw.integers(1, unit.full_size + 1)) for unit in named}
        counted = profile_model(analysis.apply(sizes, []).model, EXAMPLE)
        assert analysis.predict_macs(sizes) == counted.macs
        assert analysis.predict_params(sizes) == counted.params
    assert analysis.predict_macs({}) == analysis.profile.macs
    assert analysis.predict_params({}) == analysis.profile.params


class _TiedWeights(nn.Module):
    """Two layers with one weight, one of them with its own bias; and a parameter of the net itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.other.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.norm, self.act = nn.LayerNorm(8), nn.PReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.other(torch.relu(self.one(torch.relu(self.stem(x)))))) * self.scale
        return self.head(self.act(self.norm(x.mean(dim=(2, 3)))))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_tensor_that_layers_share_is_counted_once_until_they_are_cut_apart(method):
    torch.manual_seed(0)
    analysis = method.analyse(_TiedWeights().eval(), EXAMPLE)
    names = [unit.name for unit in analysis.units]
    assert {"one", "other"} <= set(names)
    for sized in ([], ["one"], ["other"], ["one", "other"], ["stem"], names):
        sizes = dict.fromkeys(sized, 3)
        counted = profile_model(analysis.apply(sizes, []).model, EXAMPLE)
        assert analysis.predict_params(sizes) == counted.params
    whole = {unit.name: unit.full_size for unit in analysis.units}
    counted = profile_model(analysis.apply(whole, []).model, EXAMPLE)
    assert analysis.predict_params(whole) == counted.params


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_many_rows_at_once_are_the_sum_of_products_written_out(seed):
    draw = np.random.default_rng(seed)
    full = {name: int(draw.integers(2, 500)) for name in "abcd"}
    terms = tuple(
        CostTerm(
            int(draw.integers(1, 10**6)) * 6,
            divisor=3,
            forms=tuple(
                LinearForm(int(draw.integers(0, 9)), {name: int(draw.integers(0, 5)) for name in "abc"})
                for _ in range(draw.integers(0, 3))
            ),
        )
        for _ in range(5)
    )
    cost = Cost((*terms, CostTerm(7, forms=(LinearForm(0, {"d": 1}),))), full, dense={"d": 1234})

    def written_out(sizes):
        values = full | sizes
        total = 7 * sizes["d"] if "d" in sizes else 1234
        for term in terms:
            product = term.scale
            for form in term.forms:
                product *= form.constant + sum(slope * values[name] for name, slope in form.slopes.items())
            total += product // 3
        return total

    choices = [
        {name: int(draw.integers(1, size + 1)) for name, size in full.items() if draw.random() < 0.7}
        for _ in range(10)
    ]
    rows = np.stack([cost.row(sizes) for sizes in choices])
    assert cost.of_rows(rows).tolist() == [written_out(sizes) for sizes in choices]
    for place, name in enumerate(full):
        column = rows[:, place]
        others = {unit: size for unit, size in choices[0].items() if unit != name}
        alone = [written_out(others | ({name: int(size)} if size else {})) for size in column]
        assert (cost.changes(rows[0], place, column) + written_out(choices[0])).tolist() == alone


@pytest.mark.parametrize("kind", COST_KINDS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_size_keeps_at_most_its_share_and_one_more_would_not(method, kind):
    analysis = method.analyse(zoo.build("Residual"), EXAMPLE)
    cost = analysis.cost(kind)
    for unit in analysis.units:
        size = cost.size_at(unit.name, 0.6)
        assert 1 <= size < unit.full_size

        def share(size, unit=unit):
            if unit.name not in cost.dense:
                return size / unit.full_size
            return size * cost.rates[unit.name] / cost.dense[unit.name]

        assert share(size) <= 0.6 < share(size + 1)


def test_only_factorised_layers_cost_each_for_itself():
    model = zoo.build("Residual")
    assert METHODS["spatial_svd"].analyse(model, EXAMPLE).cost("macs").is_separable
    assert not METHODS["channel_pruning"].analyse(model, EXAMPLE).cost("macs").is_separable


def test_a_layer_that_even_rank_one_makes_dearer_has_no_size():
    cost = Cost((CostTerm(10, forms=(LinearForm(0, {"a": 1}),)),), {"a": 4}, dense={"a": 9})
    assert cost.size_at("a", 1.0) is None


def test_a_name_that_is_no_unit_is_refused():
    with pytest.raises(ModelError, match=r"'nose' cannot be sized; what can be: stem,"):
        METHODS["spatial_svd"].analyse(zoo.build("Residual"), EXAMPLE).predict_macs({"nose": 3})
