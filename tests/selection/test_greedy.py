"""Greedy selection, against AIMET's rule written out."""

from __future__ import annotations

import pytest

from compress_search.exceptions import RatioError
from compress_search.selection.choices import in_words
from compress_search.selection.greedy import Greedy
from compress_search.selection.request import SelectionRequest
from compress_search.selection.table import Cell, SensitivityTable

WIDTHS = [32, 40, 48, 56, 64, 72]


def _by_the_rule(analysis, table, ratio):
    """The sizes at the lowest loss, of all in the table, that keeps within the budget."""
    for limit in sorted({cell.loss for cell in table.cells}):
        sizes = {}
        for cell in sorted(table.cells, key=lambda cell: -cell.size):
            if cell.loss <= limit:
                sizes[cell.unit] = cell.size
        if analysis.predict_macs(sizes) <= ratio * analysis.profile.macs:
            return sizes
    raise AssertionError("not even the smallest candidates keep within it")


@pytest.mark.parametrize("method", ["spatial_svd", "channel_pruning"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_it_is_the_rule_and_spends_what_that_leaves(analysed, make_table, monkeypatch, method, seed, ratio):
    analysis = analysed(method, WIDTHS)
    table, request = make_table(analysis, seed=seed), SelectionRequest(ratio=ratio)
    rule = _by_the_rule(analysis, table, ratio)
    spent = Greedy().select(analysis, request, table)
    assert 0.995 * ratio <= analysis.predict_macs(spent) / analysis.profile.macs <= ratio

    def keep(cost, sizes, *_, **__):
        return dict(sizes)

    monkeypatch.setattr("compress_search.selection.greedy.spend_the_rest", keep)
    assert Greedy().select(analysis, request, table) == rule


def test_a_bump_is_taken_as_it_is_or_made_to_fall(analysed):
    analysis = analysed("spatial_svd", [32, 32])
    second = analysis.units[1].name
    # By luck 4 loses less than 8 does; the mean of both is what falls.
    losses = {2: 0.9, 4: 0.1, 8: 0.3, 12: 0.05}
    table = SensitivityTable(tuple(Cell(second, size, loss) for size, loss in losses.items()))
    rate = analysis.cost("macs").rates[second]
    budget = analysis.profile.macs - analysis.profile.layer(second).macs + 4 * rate
    request = SelectionRequest(ratio=budget / analysis.profile.macs)
    assert Greedy().select(analysis, request, table) == {second: 4}
    assert Greedy(monotonic=True).select(analysis, request, table) == {second: 4}
    wider = SelectionRequest(ratio=(budget + 4 * rate) / analysis.profile.macs)
    grown = Greedy(monotonic=True).select(analysis, wider, table)
    assert grown == {second: 8}


def test_a_ratio_below_the_candidates_names_what_they_reach(analysed, make_table):
    analysis = analysed("channel_pruning", WIDTHS)
    table = make_table(analysis)
    smallest = {}
    for cell in reversed(table.cells):
        smallest[cell.unit] = cell.size
    reached = analysis.predict_macs(smallest) / analysis.profile.macs
    with pytest.raises(RatioError, match=f"sensitivity table it is {in_words(reached)}"):
        Greedy().select(analysis, SelectionRequest(ratio=reached * 0.9), table)
