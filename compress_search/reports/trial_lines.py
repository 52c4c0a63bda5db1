"""One line a trial: drawn by how the trial stands, the chosen one on top of all others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from compress_search.reports.figure_look import BLUE, GREY, VERMILION

_KINDS = (
    ("not complete", GREY, 1.0, "dot", 0.8),
    ("outside the band", GREY, 1.0, "solid", 0.8),
    ("in the band", BLUE, 1.0, "solid", 0.6),
    ("on the front", VERMILION, 2.0, "solid", 1.0),
)
"""Standing, colour, width, dash and opacity of the lines, from the least to the most important."""


@dataclass(frozen=True)
class TrialLine:
    """What is drawn of one trial.

    Attributes:
        number: The trial's.
        standing: ``"on the front"``, ``"in the band"``, ``"outside the band"``, or its state.
        x: Where its points are.
        y: How high they are, as it is shown.
        texts: What to say of each.
    """

    number: int
    standing: str
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str]


def draw_trial_lines(lines: Sequence[TrialLine], *, chosen: int | None) -> list[go.Scatter]:
    """Draw the lines: one trace a kind of standing, and one for the chosen trial.

    Args:
        lines: In any order.
        chosen: Number of the chosen trial, if one was.
    """
    traces = []
    for standing, colour, width, dash, opacity in _KINDS:
        own = [line for line in lines if _drawn_as(line) == standing]
        if own:
            traces.append(
                go.Scatter(
                    **_path(own),
                    mode="lines+markers",
                    line={"color": colour, "width": width, "dash": dash},
                    marker={"size": 6, "color": colour},
                    opacity=opacity,
                    name=f"trial {standing}",
                )
            )
    traces += [
        go.Scatter(
            **_path([line]),
            mode="lines+markers",
            line={"color": VERMILION, "width": 4},
            marker={"size": 11, "color": VERMILION},
            name=f"chosen: trial {line.number}",
        )
        for line in lines
        if line.number == chosen
    ]
    return traces


def _drawn_as(line: TrialLine) -> str:
    return line.standing if line.standing in {name for name, *_ in _KINDS} else "not complete"


def _path(lines: Iterable[TrialLine]) -> dict[str, list[float | str | None]]:
    """One path through all points of all lines, interrupted between two trials."""
    x: list[float | str | None] = []
    y: list[float | str | None] = []
    texts: list[float | str | None] = []
    for line in lines:
        x += [*line.x, None]
        y += [*line.y, None]
        texts += [*line.texts, None]
    return {"x": x, "y": y, "hovertext": texts, "hoverinfo": ["text"] * len(x)}
