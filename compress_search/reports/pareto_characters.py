"""The front in characters, for a terminal."""

from __future__ import annotations

from compress_search.reports.pareto import ParetoData
from compress_search.reports.pareto_look import remarks_on
from compress_search.target import Interval

_SYMBOLS = {"outside the band": "x", "in the band": "o", "on the front": "#"}
"""By the status of a trial, from the least to the most important: the last that falls on a place is seen."""


def draw_characters(data: ParetoData, *, width: int, height: int) -> str:
    """Draw the enlarged band, or everything as long as no trial is in the band.

    Args:
        data: What to draw.
        width: Of the drawing, in characters; 30 at least are taken.
        height: Its number of lines; 8 at least are taken.
    """
    view = data.zoomed if any(point.feasible for point in data.points) else data.whole
    factor = data.scale.factor
    top, bottom = (f"{factor * value:.2f} " for value in reversed(view.y))
    original = f"{factor * data.original_accuracy:.2f} "
    margin = max(map(len, (top, bottom, original)))
    columns, rows = max(width, 30) - margin - 1, max(height, 8) - 4
    grid = [[" "] * columns for _ in range(rows)]

    def row_of(accuracy: float) -> int:
        return _place(accuracy, view.y, rows, reverse=True)

    for edge in data.band:
        if view.x[0] <= edge <= view.x[1]:
            for line in grid:
                line[_place(edge, view.x, columns)] = ":"
    grid[row_of(data.original_accuracy)] = [
        "." if character == " " else character for character in grid[row_of(data.original_accuracy)]
    ]
    for (start, accuracy), (end, _) in zip(data.steps, data.steps[1:], strict=False):
        first, last = (_place(ratio, view.x, columns) for ratio in (start, end))
        grid[row_of(accuracy)][first : last + 1] = "-" * (last + 1 - first)
    for status, symbol in _SYMBOLS.items():
        for point in data.points:
            inside = view.x[0] <= point.mac_ratio <= view.x[1] and view.y[0] <= point.accuracy <= view.y[1]
            if point.status == status and inside:
                grid[row_of(point.accuracy)][_place(point.mac_ratio, view.x, columns)] = symbol
    if data.whole == view:
        grid[row_of(data.original_accuracy)][_place(1.0, view.x, columns)] = "*"
    # The original's accuracy last: where two labels fall on one line, it says more.
    labels = {0: top, rows - 1: bottom, row_of(data.original_accuracy): original}
    lines = [f"{labels.get(row, ''):>{margin}}|{''.join(line)}".rstrip() for row, line in enumerate(grid)]
    left, right = (f"{value:.4g}" for value in view.x)
    return "\n".join(
        [
            f"{data.scale.axis_title}; the dots are the original's",
            *lines,
            f"{'':{margin}}+{'-' * columns}",
            f"{'':{margin + 1}}{left}{f'MACs kept {right}':>{columns - len(left)}}",
            "  ".join(
                [
                    "# on the front",
                    "o in the band",
                    "x outside",
                    ": ends of the band",
                    *remarks_on(data),
                ]
            ),
        ]
    )


def _place(value: float, ends: Interval, count: int, *, reverse: bool = False) -> int:
    """The index, of ``count`` places over an interval, that a value falls on."""
    share = (value - ends[0]) / (ends[1] - ends[0])
    place = min(max(round(share * (count - 1)), 0), count - 1)
    return count - 1 - place if reverse else place
