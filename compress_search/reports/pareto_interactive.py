"""The front as an interactive figure for a browser."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from compress_search.reports.figure_look import (
    GREEN,
    LIGHT,
    PURPLE,
    VERMILION,
    Theme,
    common_axis,
    common_layout,
    hover,
    note,
)
from compress_search.reports.formatting import ratio
from compress_search.reports.pareto import ParetoData, View
from compress_search.reports.pareto_look import KINDS, PANELS, X_TITLE, X_TITLE_SHORT, remarks_on


def draw_interactive(data: ParetoData, *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw the front for a browser; hovering over a point shows everything that is known of it.

    Args:
        data: What to draw.
        narrow: Put the panels above each other, for a narrow screen.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    figure = go.Figure()
    for axis in ("", "2"):
        for trace in _traces(data, axis):
            figure.add_trace(trace)
    for axis, view, title in zip(("", "2"), (data.zoomed, data.whole), PANELS, strict=True):
        figure.update_layout(_axes(data, axis, view, narrow=narrow, theme=theme))
        figure.add_annotation(_note(axis, f"<b>{title}</b>", y=1.0))
        for shape in _target_shapes(data, axis):
            figure.add_shape(shape)
    for line, text in enumerate(remarks_on(data)):
        figure.add_annotation(_note("", text, y=0.01 + 0.07 * line))
    # A legend below takes up to four lines on a wide screen, and ten on a narrow one.
    height, bottom = (980, 310) if narrow else (560, 150)
    return figure.update_layout(common_layout(theme, height=height, bottom=bottom))


def _traces(data: ParetoData, axis: str) -> list[go.Scatter]:
    """What one panel shows; the second one has the legend, for only it shows the original model."""
    common: dict[str, Any] = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "showlegend": bool(axis)}
    factor = data.scale.factor
    traces = []
    if data.steps:
        traces.append(
            go.Scatter(
                x=[x for x, _ in data.steps],
                y=[factor * y for _, y in data.steps],
                mode="lines",
                line={"shape": "hv", "color": VERMILION, "width": 2},
                hoverinfo="skip",
                name="front: best accuracy within a budget",
                legendgroup="front line",
                **common,
            )
        )
    for kind in KINDS:
        points = kind.points_of(data)
        if not points:
            continue
        numbered = kind.name == "on the front" and not axis
        traces.append(
            go.Scatter(
                x=[point.mac_ratio for point in points],
                y=[factor * point.accuracy for point in points],
                mode="markers+text" if numbered else "markers",
                text=[str(point.number) for point in points],
                textposition="top left",
                hovertext=[hover(f"trial {p.number}, {p.status}", p.facts) for p in points],
                hoverinfo="text",
                marker={
                    "symbol": kind.symbol,
                    "size": kind.size,
                    "color": kind.colour,
                    "line": {"color": kind.colour, "width": 2 if kind.hollow else 0},
                },
                name=f"trial {kind.name}",
                legendgroup=kind.name,
                **common,
            )
        )
    for point in (p for p in data.points if p.number == data.chosen):
        ring = {"symbol": "circle-open", "size": 22, "color": VERMILION, "line": {"width": 2}}
        traces.append(
            go.Scatter(
                x=[point.mac_ratio],
                y=[factor * point.accuracy],
                mode="markers",
                hoverinfo="skip",
                marker=ring,
                name=f"chosen: trial {point.number}",
                legendgroup="chosen",
                **common,
            )
        )
    if axis:
        traces.append(
            go.Scatter(
                x=[1.0],
                y=[factor * data.original_accuracy],
                mode="markers",
                hovertext=[hover("original model", (("mac_ratio", ratio(1.0)), *data.original_facts))],
                hoverinfo="text",
                marker={"symbol": "star", "size": 15, "color": PURPLE},
                name="original model",
                **common,
            )
        )
    return traces


def _axes(data: ParetoData, axis: str, view: View, *, narrow: bool, theme: Theme) -> dict[str, Any]:
    first = not axis
    if narrow:
        x_title, x_domain, y_domain = X_TITLE_SHORT, (0.0, 1.0), ((0.59, 1.0) if first else (0.0, 0.41))
    else:
        x_title = X_TITLE if first else X_TITLE_SHORT
        x_domain, y_domain = ((0.0, 0.56) if first else (0.66, 1.0)), (0.0, 1.0)
    factor = data.scale.factor
    return {
        f"xaxis{axis}": common_axis(
            theme, x_title, domain=x_domain, anchor=f"y{axis}", range=view.x, nticks=7
        ),
        f"yaxis{axis}": common_axis(
            theme,
            data.scale.axis_title,
            domain=y_domain,
            anchor=f"x{axis}",
            range=[factor * y for y in view.y],
        ),
    }


def _target_shapes(data: ParetoData, axis: str) -> list[dict[str, Any]]:
    low, high = data.band
    accuracy = data.scale.factor * data.original_accuracy
    vertical = {"xref": f"x{axis}", "yref": f"y{axis} domain", "y0": 0, "y1": 1, "layer": "below"}
    return [
        {
            **vertical,
            "type": "rect",
            "x0": low,
            "x1": high,
            "fillcolor": GREEN,
            "opacity": 0.18,
            "line": {"width": 0},
            "name": f"band {low:.4g} to {high:.4g}",
            "showlegend": bool(axis),
        },
        *(
            {
                **vertical,
                "type": "line",
                "x0": target,
                "x1": target,
                "line": {"color": GREEN, "width": 2, "dash": "dash"},
                "name": f"target {target:.4g}",
                "showlegend": bool(axis),
            }
            for target in data.targets
        ),
        {
            "type": "line",
            "xref": f"x{axis} domain",
            "yref": f"y{axis}",
            "x0": 0,
            "x1": 1,
            "y0": accuracy,
            "y1": accuracy,
            "layer": "below",
            "line": {"color": PURPLE, "width": 1.5, "dash": "dot"},
            "name": "accuracy of the original",
            "showlegend": bool(axis),
        },
    ]


def _note(axis: str, text: str, *, y: float) -> dict[str, Any]:
    return note(text, xref=f"x{axis} domain", yref=f"y{axis} domain", x=0.01, y=y)
