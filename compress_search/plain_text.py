"""Times and tables as plain text, the same in the terminal, in logs and in reports."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours, for example ``"4 min 05 s"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def without_numbers(text: str) -> str:
    """Write ``#`` for every number, so that messages which differ in nothing else are the same."""
    return re.sub(r"[\d.]+", "#", text)


def nearest_names(name: str, names: Iterable[str], *, otherwise: str) -> str:
    """Ask whether one of the layers of nearly that name was meant.

    Args:
        name: What is no layer.
        names: Of the layers that there are.
        otherwise: What to begin the list of all with, if none is near.
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else f"{otherwise}: {', '.join(known)}."


def format_table(rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """Lay out rows of cells in columns.

    Args:
        rows: The first one holds the titles, and has a line drawn under it.
        right: Titles of the columns whose cells are to stand at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    at_right = [title in right for title in rows[0]]
    lines = [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, at_right, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
