"""Manual selection: shares by name, the rest of the budget uniformly."""

from __future__ import annotations

import re

import pytest
from torch import nn

from compress_search.exceptions import ModelError, RatioError
from compress_search.selection.manual import Manual, check_share_names, shares_by_unit
from compress_search.selection.request import SelectionRequest
from compress_search.selection.uniform import select_uniform

WIDTHS = [32, 32, 48, 48]


def _select(analysis, ratio, shares, **options):
    return Manual().select(analysis, SelectionRequest(ratio=ratio, shares=shares, **options))


def test_named_layers_keep_their_share_and_the_others_meet_the_ratio(analysed):
    analysis = analysed("spatial_svd", WIDTHS)
    sizes = _select(analysis, 0.5, {"layers.1": 0.3, "layers.2": 1.0})
    cost = analysis.cost("macs")
    assert sizes["layers.1"] == int(0.3 * cost.dense["layers.1"] / cost.rates["layers.1"])
    assert "layers.2" not in sizes
    assert 0.4975 <= analysis.predict_macs(sizes) / analysis.profile.macs <= 0.5
    # What is not named moves with the ratio; what is named does not.
    fewer = _select(analysis, 0.45, {"layers.1": 0.3, "layers.2": 1.0})
    assert fewer["layers.1"] == sizes["layers.1"] and fewer["layers.3"] < sizes["layers.3"]


def test_without_shares_it_is_uniform(analysed):
    analysis = analysed("channel_pruning", WIDTHS)
    assert _select(analysis, 0.5, {}) == select_uniform(analysis, 0.5)


def test_a_name_counts_more_than_a_pattern(analysed):
    analysis = analysed("spatial_svd", WIDTHS)
    found = shares_by_unit(analysis, {"layers.*": 0.5, "layers.1": 0.7})
    assert found == {"layers.0": 0.5, "layers.1": 0.7, "layers.2": 0.5, "layers.3": 0.5}


def test_where_all_are_named_the_ratio_must_be_theirs(analysed):
    analysis = analysed("spatial_svd", WIDTHS)
    shares = {"layers.*": 0.5}
    with pytest.raises(RatioError, match=r"shares alone give a ratio of 0\.\d{4}, above the 0\.3") as caught:
        _select(analysis, 0.3, shares)
    with pytest.raises(RatioError, match=r"below the 0\.9"):
        _select(analysis, 0.9, shares)
    ratio = float(str(caught.value).partition("Ask for ")[2][:6])
    sizes = _select(analysis, ratio, shares)
    assert set(sizes) == {"layers.0", "layers.1", "layers.2", "layers.3"}
    assert 0.995 * ratio <= analysis.predict_macs(sizes) / analysis.profile.macs <= ratio


def test_shares_that_leave_less_than_asked_for_say_what_they_leave(analysed):
    analysis = analysed("spatial_svd", WIDTHS)
    with pytest.raises(RatioError, match=r"below the 0\.9500 asked for"):
        _select(analysis, 0.95, {"layers.3": 0.1})


def test_shares_that_leave_too_much_name_the_least_that_the_others_reach(analysed):
    analysis = analysed("spatial_svd", WIDTHS)
    with pytest.raises(RatioError, match="smallest reachable is 0.7"):
        _select(analysis, 0.3, {"layers.3": 1.0, "layers.2": 1.0})


def test_all_wrong_names_are_told_at_once(analysed):
    analysis = analysed("spatial_svd", WIDTHS, ignore=["layers.0"])
    shares = {"layer.1": 0.5, "layers.0": 0.5, "layers.[12]": 0.4, "layers.[23]": 0.6, "nothing.*": 0.5}
    with pytest.raises(ModelError) as caught:
        _select(analysis, 0.5, shares)
    message = str(caught.value)
    assert "'layer.1', which matches nothing that can be sized. Did you mean 'layers.1'" in message
    assert "'layers.0', which is left alone: you asked" in message
    assert "gives 'layers.2' both 0.4 and 0.6, by two patterns" in message
    assert "'nothing.*'" in message


def test_a_layer_that_is_left_alone_may_be_given_all(analysed):
    analysis = analysed("spatial_svd", WIDTHS, ignore=["layers.0"])
    assert "layers.0" not in _select(analysis, 0.6, {"layers.0": 1.0})


def test_a_layer_sized_with_others_names_them(analysed):
    # A block ends in an addition, so what its last layer makes is sized with what the block gets.
    analysis = analysed("channel_pruning", [16, 16, 16])
    together = next(unit for unit in analysis.units if "layers.1" in unit.layers and unit.name == "layers.0")
    assert "layers.1" not in {unit.name for unit in analysis.units}
    with pytest.raises(ModelError, match=rf"sized with others. Name '{together.name}'"):
        _select(analysis, 0.6, {"layers.1": 0.5})


@pytest.mark.parametrize("name", ["0", "0.*", "0.vertical", "*", "[0-9]*", "*.horizontal"])
def test_names_that_a_method_may_know_are_sound(tiny_net, name):
    check_share_names({name: 0.5}, tiny_net())


@pytest.mark.parametrize("name", ["nolayer", "nolayer.*", "00", "0x*", "block", "block.2"])
def test_a_name_of_nothing_in_the_model_is_refused_before_anything_is_compressed(tiny_net, name):
    net = tiny_net()
    net.add_module("block", nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(ModelError, match=rf"shares names '{re.escape(name)}', which is no layer"):
        check_share_names({"0": 0.5, name: 0.5}, net)
