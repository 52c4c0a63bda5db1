"""Groups of coupled channels after a part of them is gone."""

from __future__ import annotations

import pytest
from torch import nn

from compress_search.methods.coupling import CoupledGroup, Member, keep_blocks
from compress_search.methods.renumbering import renumbered
from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, PlanStep, apply_plan


@pytest.fixture
def chained():
    """Two layers in a row whose channels make two groups; of the second, a block is a pair of channels."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2))
    singles = tuple((channel,) for channel in range(5))
    pairs = tuple((channel, channel + 3) for channel in range(3))
    first = CoupledGroup("0", (Member("0", "outputs", singles), Member("1", "inputs", singles)))
    second = CoupledGroup("1", (Member("1", "outputs", pairs), Member("2", "inputs", pairs)))
    return model, first, second


def test_nothing_removed_changes_no_number(chained):
    _, first, _ = chained
    found = renumbered(first, [])
    assert (found.group, found.blocks) == (first, (0, 1, 2, 3, 4))


def test_numbers_are_those_of_the_smaller_model(chained):
    model, first, second = chained
    edits = keep_blocks(model, [first, second], {"0": (1, 3, 4), "1": (0, 2)})
    singles, pairs = renumbered(first, edits), renumbered(second, edits)
    assert singles.blocks == (1, 3, 4)
    assert [member.blocks for member in singles.group.members] == [((0,), (1,), (2,))] * 2
    assert pairs.blocks == (0, 2)
    assert [member.blocks for member in pairs.group.members] == [((0, 2), (1, 3))] * 2
    assert singles.renumber({0, 3, 4}) == {1, 2}


def test_removals_one_after_the_other_add_up(chained):
    model, first, second = chained
    once = keep_blocks(model, [first], {"0": (0, 2, 3, 4)})
    smaller = apply_plan(model, CompressionPlan((PlanStep("channel_pruning", 1.0, once),)))
    twice = keep_blocks(smaller, [renumbered(first, once).group], {"0": (1, 3)})
    assert renumbered(first, [*once, *twice]).blocks == (2, 4)
    assert renumbered(second, [*once, *twice]).group == second


def test_edits_of_other_layers_and_of_other_kinds_are_no_matter(chained):
    _, first, _ = chained
    edits = [FactoriseLayer("2", 1, ()), KeepChannels("2", inputs=(0,)), KeepChannels("1", outputs=(0, 1))]
    assert renumbered(first, edits).group == first
