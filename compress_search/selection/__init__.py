"""Ratio selection: the size of every layer for a target ratio. One selector a file, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from compress_search.methods.method import Analysis
from compress_search.selection.greedy import Greedy
from compress_search.selection.manual import Manual
from compress_search.selection.optimal import Optimal
from compress_search.selection.request import SelectionRequest
from compress_search.selection.table import SensitivityTable
from compress_search.selection.uniform import Uniform


class Selector(Protocol):
    """Chooses the size of every unit."""

    @property
    def needs_table(self) -> bool:
        """Whether it chooses by a sensitivity table."""

    def select(
        self, analysis: Analysis, request: SelectionRequest, table: SensitivityTable | None
    ) -> dict[str, int]:
        """Choose sizes that cost at most what is asked, and as nearly that as sizes permit.

        Args:
            analysis: A method's view of the model.
            request: The budget, and what the sizes must keep to.
            table: The losses of each unit; ``None`` for a selector that needs none.

        Returns:
            Size by unit name; a unit that is not named stays as it is.

        Raises:
            RatioError: The ratio cannot be reached; the nearest that can is named.
        """


SELECTORS: Mapping[str, Selector] = {
    "optimal": Optimal(),
    "greedy": Greedy(),
    "greedy_monotonic": Greedy(monotonic=True),
    "uniform": Uniform(),
    "manual": Manual(),
}
