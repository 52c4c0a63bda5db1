"""Plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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
