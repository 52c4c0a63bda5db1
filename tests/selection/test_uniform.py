"""Uniform selection, against a search over every size of small models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_search.exceptions import RatioError
from compress_search.methods import METHODS
from compress_search.methods.method import Unit
from compress_search.selection import SELECTORS
from compress_search.selection.choices import in_words
from compress_search.selection.uniform import Uniform, select_uniform


def _chain(widths: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4)).eval()


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(list(METHODS)),
    widths=st.lists(st.integers(4, 24), min_size=2, max_size=4),
    ratio=st.floats(0.2, 1.0),
)
def test_the_budget_is_kept_and_no_size_more_would_fit(method, widths, ratio):
    analysis = METHODS[method].analyse(_chain(widths), torch.zeros(1, 3, 8, 8))
    budget = ratio * analysis.profile.macs
    try:
        sizes = select_uniform(analysis, ratio)
    except RatioError:
        smallest = {unit.name: 1 for unit in analysis.units}
        assert analysis.predict_macs(smallest) > budget
        return
    assert analysis.predict_macs(sizes) <= budget
    for unit in analysis.units:
        if unit.name in sizes and sizes[unit.name] < analysis.size_at(unit, 1.0):
            larger = sizes | {unit.name: sizes[unit.name] + 1}
            assert analysis.predict_macs(larger) > budget


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_ratio_is_met_within_one_per_cent_on_a_net_with_many_sizes(method, ratio):
    analysis = method.analyse(_chain([96, 128, 128]), torch.zeros(1, 3, 8, 8))
    achieved = analysis.predict_macs(select_uniform(analysis, ratio)) / analysis.profile.macs
    assert ratio * 0.99 <= achieved <= ratio


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_all_units_keep_about_the_same_share(method):
    analysis = method.analyse(_chain([64, 64, 64]), torch.zeros(1, 3, 8, 8))
    sizes = select_uniform(analysis, 0.5)
    shares = [sizes[unit.name] / analysis.size_at(unit, 1.0) for unit in analysis.units if unit.full_size > 9]
    assert max(shares) - min(shares) < 0.1


def test_a_ratio_of_one_changes_nothing():
    analysis = METHODS["spatial_svd"].analyse(_chain([8, 8]), torch.zeros(1, 3, 8, 8))
    assert select_uniform(analysis, 1.0) == {}


def test_a_ratio_that_cannot_be_reached_names_the_smallest_that_can():
    analysis = METHODS["channel_pruning"].analyse(_chain([4, 4]), torch.zeros(1, 3, 8, 8))
    smallest = analysis.predict_macs({unit.name: 1 for unit in analysis.units}) / analysis.profile.macs
    with pytest.raises(RatioError, match=f"smallest reachable is {in_words(smallest)}"):
        select_uniform(analysis, 0.001)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("round_to", [4, 8])
def test_sizes_are_rounded_to_a_multiple(method, round_to):
    analysis = method.analyse(_chain([64, 48, 64]), torch.zeros(1, 3, 8, 8))
    sizes = select_uniform(analysis, 0.6, round_to=round_to)
    assert sizes and all(size % round_to == 0 for size in sizes.values())
    assert analysis.predict_macs(sizes) <= 0.6 * analysis.profile.macs
    compressed = analysis.apply(sizes, []).model
    for layer in compressed.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels % round_to == 0


def test_rounding_counts_channels_where_a_block_is_several():
    unit = Unit("group", 12, ("layer",), widths=(2, 6))
    # 4 blocks of 2 channels are 8; 6 channels a block need 4 blocks to be a multiple of 8 too.
    assert unit.step(8) == 4
    assert unit.step(1) == 1


def test_an_unreachable_ratio_names_the_layers_that_hold_it_up():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    analysis = METHODS["spatial_svd"].analyse(model, torch.zeros(1, 3, 12, 12), ignore=["1"])
    with pytest.raises(RatioError, match=r"lift what holds it up: 1 \(.*% of the MACs; you asked"):
        select_uniform(analysis, 0.3)


def test_uniform_is_in_the_table():
    assert isinstance(SELECTORS["uniform"], Uniform)
