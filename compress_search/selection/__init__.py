"""Ratio selection: the size of every layer for a target ratio. One selector a file, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from compress_search.methods.method import Analysis
from compress_search.selection.uniform import select_uniform


class Selector(Protocol):
    """Chooses the size of every unit."""

    def __call__(self, analysis: Analysis, mac_ratio: float, *, round_to: int = 1) -> dict[str, int]:
        """Return sizes that keep at most ``mac_ratio`` of the MACs."""


SELECTORS: Mapping[str, Selector] = {"uniform": select_uniform}
