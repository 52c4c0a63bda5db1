"""How the front grows with the trials: the area under it.

The area is the hypervolume of the front (Zitzler & Thiele 1999) in accuracy and ``mac_ratio``. Its reference
point is the original's MACs and an accuracy of 0, or, for a score that is no share, that of the worst
complete trial. So for shares it is the mean, over all budgets up to the original's MACs, of the best accuracy
within the budget.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import plotly.graph_objects as go

from compress_search.reports.figure_look import BLUE, LIGHT, Theme, common_axis, common_layout, hover
from compress_search.reports.pareto import pareto_data
from compress_search.results import Candidate, ParetoFront, pareto_optimal

_FINISHED = ("complete", "pruned", "failed")


@dataclass(frozen=True)
class HypervolumeData:
    """All that the figure shows.

    Attributes:
        numbers: The finished trials.
        volumes: The hypervolume of the feasible ones up to and with each, in the same order.
        reference: ``mac_ratio`` and accuracy of the reference point.
    """

    numbers: tuple[int, ...]
    volumes: tuple[float, ...]
    reference: tuple[float, float]


def hypervolume_data(front: ParetoFront) -> HypervolumeData:
    """Work out the hypervolume after every finished trial, in the order of their numbers."""
    data = pareto_data(front)
    floor = 0.0 if data.scale.unit else min((p.accuracy for p in data.points), default=0.0)
    feasible = {point.number for point in data.points if point.feasible}
    finished = [candidate for candidate in front.candidates if candidate.state in _FINISHED]
    reference = (1.0, floor)
    best: tuple[Candidate, ...] = ()
    volumes: list[float] = []
    for candidate in finished:
        if candidate.number in feasible:
            best = pareto_optimal([*best, candidate])
        volumes.append(hypervolume([(c.mac_ratio or 0.0, c.accuracy or 0.0) for c in best], reference))
    return HypervolumeData(tuple(c.number for c in finished), tuple(volumes), reference)


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area between a front and a reference point.

    Args:
        points: ``mac_ratio`` and accuracy of points of which none dominates another.
        reference: Those of the reference point; what lies beyond it counts nothing.
    """
    limit, floor = reference
    area, below = 0.0, floor
    for x, y in sorted(points):
        if y > below and x < limit:
            area += (limit - x) * (y - below)
            below = y
    return area


def draw_hypervolume(data: HypervolumeData, *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw the hypervolume over the finished trials.

    Args:
        data: What to draw.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    counted = list(range(1, len(data.numbers) + 1))
    texts = [
        hover(
            f"after {n} finished trials", [("the last one", f"trial {number}"), ("hypervolume", f"{v:.6f}")]
        )
        for n, number, v in zip(counted, data.numbers, data.volumes, strict=True)
    ]
    figure = go.Figure(
        go.Scatter(
            x=counted,
            y=list(data.volumes),
            mode="lines+markers",
            line={"shape": "hv", "color": BLUE, "width": 2},
            marker={"size": 5, "color": BLUE},
            hovertext=texts,
            hoverinfo="text",
            name="hypervolume",
        )
    )
    return figure.update_layout(
        common_layout(theme, height=340, bottom=60, legend=False),
        xaxis=common_axis(theme, "finished trials", rangemode="tozero", nticks=8 if narrow else 16),
        yaxis=common_axis(theme, "hypervolume", automargin=True),
    )
