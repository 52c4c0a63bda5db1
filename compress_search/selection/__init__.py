"""Ratio selection: the size of every layer for a target ratio. One selector a file, listed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compress_search.methods.method import Analysis
from compress_search.selection.uniform import select_uniform

Selector = Callable[[Analysis, float], dict[str, int]]

SELECTORS: Mapping[str, Selector] = {"uniform": select_uniform}
