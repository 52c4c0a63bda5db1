"""Greedy selection: AIMET's rule, for comparison and for those who are used to it.

For a loss that every unit may have, each takes the smallest size of its candidates in the sensitivity table
that loses no more; a unit of which all lose more stays as it is. The highest such loss that the budget needs
is searched (AIMET, *Greedy compression ratio selection*, which speaks of a score that every layer must
keep). Deviations: the candidates are the table's, so nothing is said about their number; the search goes
through the losses in the table, where AIMET halves an interval of scores; and what this leaves of the budget
is spent by single steps, where AIMET misses the target by what its candidates lie apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress_search.exceptions import RatioError
from compress_search.methods.method import Analysis
from compress_search.selection.choices import budget_within_reach, in_words, size_choices
from compress_search.selection.curves import falling, finite, loss_curves
from compress_search.selection.remainder import spend_the_rest
from compress_search.selection.request import SelectionRequest
from compress_search.selection.table import SensitivityTable


@dataclass(frozen=True)
class Greedy:
    """The selector; see :class:`compress_search.selection.Selector`.

    Attributes:
        monotonic: Whether each unit's losses are first made to fall with the size (AIMET's monotonic fit).
    """

    monotonic: bool = False
    needs_table: bool = True

    def select(
        self, analysis: Analysis, request: SelectionRequest, table: SensitivityTable | None
    ) -> dict[str, int]:
        """Choose by the lowest loss that all units may have within the budget.

        Units of which the table has no loss stay as they are.

        Raises:
            RatioError: The table's smallest candidates cost more; the ratio that they reach is named.
        """
        assert table is not None
        cost = analysis.cost(request.cost)
        allowed = size_choices(analysis, request)
        choices = {name: sizes for name, sizes in allowed.items() if name in table.units}
        budget = budget_within_reach(analysis, request, choices)
        total = cost.of({})
        if total <= budget:
            return {}
        candidates = {name: self._candidates(table, name, sizes) for name, sizes in choices.items()}
        limits = sorted({loss for losses in candidates.values() for loss in losses.values()})
        low, high = -1, len(limits) - 1
        least = cost.of(_within(candidates, limits[high])) if limits else total
        if least > budget:
            raise RatioError(
                f"A ratio of {request.ratio:.4f} cannot be reached by greedy selection: with every unit at "
                f"the smallest candidate of its sensitivity table it is {in_words(least / total)}. Ask for "
                "more, or use the optimal or uniform selection, which go below the candidates."
            )
        # The lowest limit that keeps within the budget lies above `low`, and at `high` or below.
        while high - low > 1:
            middle = (low + high) // 2
            if cost.of(_within(candidates, limits[middle])) <= budget:
                high = middle
            else:
                low = middle
        sizes = _within(candidates, limits[high])
        curves = loss_curves(table, cost.full, choices)
        rise = curves.tolerable_rise(cost, sizes, choices)
        return spend_the_rest(cost, sizes, budget, choices, regret=curves.of_rows, rise=rise)

    def _candidates(self, table: SensitivityTable, unit: str, sizes: range) -> dict[int, float]:
        """The measured losses at sizes that the unit may take; one in between counts as the next up."""
        measured = finite(table.losses(unit))
        losses = falling(measured) if self.monotonic and measured else measured
        found: dict[int, float] = {}
        for size, loss in losses.items():
            number = int(np.searchsorted(np.array(sizes), size))
            if number < len(sizes):
                # Of two that become one the larger was measured nearer to it.
                found[sizes[number]] = loss
        return found


def _within(candidates: dict[str, dict[int, float]], limit: float) -> dict[str, int]:
    """The smallest size of each unit that loses at most ``limit``; units that have none are not named."""
    fitting = {
        name: [s for s, loss in losses.items() if loss <= limit] for name, losses in candidates.items()
    }
    return {name: min(sizes) for name, sizes in fitting.items() if sizes}
