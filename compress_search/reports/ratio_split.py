"""How the two methods share the target: the first ratio against the second, coloured by accuracy.

Models of one target lie on the hyperbola ``first * second = target``, those of its band between two of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from compress_search.accuracy_scale import AccuracyScale
from compress_search.methods import METHODS
from compress_search.reports.figure_look import (
    GREEN,
    GREY,
    LIGHT,
    VERMILION,
    Theme,
    common_axis,
    common_layout,
    hover,
)
from compress_search.reports.pareto import ParetoPoint, lower_fence, pareto_data
from compress_search.reports.trials import achieved_ratios
from compress_search.results import Candidate, ParetoFront
from compress_search.target import Interval

_POINTS_OF_A_CURVE = 41


@dataclass(frozen=True)
class SplitPoint:
    """One complete trial.

    Attributes:
        point: What is known of it.
        first: MACs after / MACs before the first method, as achieved; 1 where it was left out.
        second: The same of the second method.
    """

    point: ParetoPoint
    first: float
    second: float


@dataclass(frozen=True)
class RatioSplitData:
    """All that the figure shows.

    Attributes:
        names: Of the two ratios.
        points: The complete trials, by number.
        targets: The wanted ``mac_ratio``, or the lowest and the highest of a range.
        band: Lowest and highest feasible ``mac_ratio``.
        chosen: Number of the trial that was chosen, if one was.
        colours: The accuracies with the first and the last colour. Outliers below have the first too.
        scale: How accuracies are shown.
    """

    names: tuple[str, str]
    points: tuple[SplitPoint, ...]
    targets: tuple[float, ...]
    band: Interval
    chosen: int | None
    colours: Interval
    scale: AccuracyScale


def ratio_split_data(front: ParetoFront, *, chosen: Candidate | None = None) -> RatioSplitData | None:
    """Gather the ratios that the complete trials achieved.

    Returns:
        ``None`` if the trials are not those of two methods, or none of them is complete.
    """
    data = pareto_data(front, chosen=chosen)
    if not data.points:
        return None
    by_number = {candidate.number: candidate for candidate in front.candidates}
    achieved = {point.number: achieved_ratios(by_number[point.number].stages) for point in data.points}
    # In the order of the stages, which trials of both methods tell; then those that no trial achieved.
    in_order = [name for ratios in sorted(achieved.values(), key=len, reverse=True) for name in ratios]
    known = [method.ratio_name for method in METHODS.values()]
    asked = [name for candidate in by_number.values() for name in candidate.params if name in known]
    names = list(dict.fromkeys([*in_order, *asked]))
    if len(names) != 2:
        return None
    first, second = names
    accuracies = [point.accuracy for point in data.points]
    top = max(accuracies)
    return RatioSplitData(
        names=(first, second),
        points=tuple(
            SplitPoint(point, achieved[point.number].get(first, 1.0), achieved[point.number].get(second, 1.0))
            for point in data.points
        ),
        targets=data.targets,
        band=data.band,
        chosen=data.chosen,
        colours=(max(min(accuracies), lower_fence(accuracies, top)), top),
        scale=data.scale,
    )


def draw_ratio_split(data: RatioSplitData, *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw the trials between the hyperbolas of the band.

    Args:
        data: What to draw.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    figure = go.Figure()
    low, high = data.band
    lower, upper = hyperbola(low), hyperbola(high)
    figure.add_trace(
        go.Scatter(
            x=[*(x for x, _ in lower), *(x for x, _ in reversed(upper))],
            y=[*(y for _, y in lower), *(y for _, y in reversed(upper))],
            mode="lines",
            fill="toself",
            fillcolor="rgba(0, 158, 115, 0.18)",
            line={"width": 0},
            hoverinfo="skip",
            name=f"band {low:.4g} to {high:.4g}",
        )
    )
    for target in data.targets:
        curve = hyperbola(target)
        figure.add_trace(
            go.Scatter(
                x=[x for x, _ in curve],
                y=[y for _, y in curve],
                mode="lines",
                line={"color": GREEN, "width": 2, "dash": "dash"},
                hoverinfo="skip",
                name=f"{data.names[0]} x {data.names[1]} = {target:.4g}",
            )
        )
    for name, symbol, feasible in (("outside the band", "x", False), ("in the band", "circle", True)):
        points = [point for point in data.points if point.point.feasible == feasible]
        if points:
            figure.add_trace(_markers(data, points, name, symbol))
    for point in (p for p in data.points if p.point.number == data.chosen):
        figure.add_trace(
            go.Scatter(
                x=[point.first],
                y=[point.second],
                mode="markers",
                hoverinfo="skip",
                marker={"symbol": "circle-open", "size": 22, "color": VERMILION, "line": {"width": 2}},
                name=f"chosen: trial {point.point.number}",
            )
        )
    start = min([low, *(min(point.first, point.second) for point in data.points)]) - 0.03
    bar = {
        "title": {"text": data.scale.axis_title, "side": "right"},
        "thickness": 12,
        "outlinewidth": 0,
    }
    factor, (lowest, highest) = data.scale.factor, data.colours
    return figure.update_layout(
        common_layout(theme, height=560 if narrow else 480, bottom=190 if narrow else 90),
        xaxis=common_axis(theme, f"{data.names[0]}, as achieved", range=[start, 1.03]),
        yaxis=common_axis(theme, f"{data.names[1]}, as achieved", range=[start, 1.03]),
        coloraxis={
            "colorscale": "Viridis",
            # Of one accuracy alone plotly finds the ends by itself.
            **({"cmin": factor * lowest, "cmax": factor * highest} if highest > lowest else {}),
            "colorbar": bar,
        },
    )


def hyperbola(product: float) -> list[tuple[float, float]]:
    """Points of ``x * y = product`` with both in [product, 1], evenly apart in ``log x``."""
    product = min(product, 1.0)
    return [
        (float(x), float(product / x))
        for x in np.exp(np.linspace(math.log(product), 0.0, _POINTS_OF_A_CURVE))
    ]


def _markers(data: RatioSplitData, points: list[SplitPoint], name: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=[point.first for point in points],
        y=[point.second for point in points],
        mode="markers",
        hovertext=[hover(f"trial {p.point.number}, {p.point.status}", p.point.facts) for p in points],
        hoverinfo="text",
        marker={
            "symbol": symbol,
            "size": 11,
            "color": [data.scale.factor * point.point.accuracy for point in points],
            "coloraxis": "coloraxis",
            "line": {"color": GREY, "width": 1},
        },
        name=f"trial {name}",
    )
