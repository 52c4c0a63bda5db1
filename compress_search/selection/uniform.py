"""Uniform selection: every unit keeps the same share, so that the whole meets the target ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress_search.methods.cost import Cost, Integers
from compress_search.methods.method import Analysis
from compress_search.selection.choices import budget_within_reach, size_choices, size_of_share
from compress_search.selection.remainder import spend_the_rest
from compress_search.selection.request import SelectionRequest
from compress_search.selection.table import SensitivityTable

_BISECTIONS = 40
_RISE = 0.1
"""By how much the sum of the squared lost shares may rise to come within half a per cent of the budget."""


@dataclass(frozen=True)
class Uniform:
    """The selector; see :class:`compress_search.selection.Selector`. It needs no table."""

    needs_table: bool = False

    def select(
        self, analysis: Analysis, request: SelectionRequest, table: SensitivityTable | None = None
    ) -> dict[str, int]:
        """Choose sizes of one share; see :func:`select_uniform`."""
        choices = size_choices(analysis, request)
        budget = budget_within_reach(analysis, request, choices)
        return uniform_sizes(analysis.cost(request.cost), choices, budget)


def select_uniform(analysis: Analysis, ratio: float, *, round_to: int = 1) -> dict[str, int]:
    """Choose sizes so that the model keeps ``ratio`` of its MACs, at most and as nearly as sizes permit.

    Args:
        analysis: A method's view of the model.
        ratio: MACs to keep / MACs of the model, in (0, 1].
        round_to: Ranks and channels are multiples of this. Units that are too small for it stay as they are.

    Returns:
        Size by unit name; a unit that is not named stays as it is.

    Raises:
        RatioError: Even the smallest sizes keep more; the smallest reachable ratio is named.
    """
    return Uniform().select(analysis, SelectionRequest(ratio=ratio, round_to=round_to))


def uniform_sizes(
    cost: Cost, choices: Mapping[str, range], budget: int, *, fixed: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Give each unit the same share, and spend what rounding leaves of the budget.

    The common share is found by bisection. The rest is given back one step at a time, to the units that lost
    most first.

    Args:
        cost: What the budget counts.
        choices: The sizes that each unit may take, ascending.
        budget: The highest cost; the smallest sizes keep within it.
        fixed: Sizes of other units.
    """
    fixed = dict(fixed or {})
    if cost.of(fixed) <= budget:
        return fixed
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if cost.of(_at_share(cost, choices, middle) | fixed) <= budget:
            low = middle
        else:
            high = middle
    sizes = _at_share(cost, choices, low) | fixed
    places = {name: place for place, name in enumerate(cost.full)}
    largest = np.array([choices[name][-1] if name in choices else size for name, size in cost.full.items()])
    sized = np.array([places[name] for name in choices])

    def lost(rows: Integers) -> npt.NDArray[np.float64]:
        shares = np.where(rows > 0, rows / largest, 1.0)[:, sized]
        distances: npt.NDArray[np.float64] = ((1 - shares) ** 2).sum(axis=1)
        return distances

    return spend_the_rest(cost, sizes, budget, choices, regret=lost, rise=_RISE)


def _at_share(cost: Cost, choices: Mapping[str, range], share: float) -> dict[str, int]:
    return {name: size_of_share(cost, name, share, sizes) for name, sizes in choices.items()}
