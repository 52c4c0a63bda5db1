"""The front as an interactive figure for a browser."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from compress_search.reports.formatting import ratio
from compress_search.reports.pareto import Fact, ParetoData, View
from compress_search.reports.pareto_look import (
    GREEN,
    KINDS,
    PANELS,
    PURPLE,
    VERMILION,
    X_TITLE,
    X_TITLE_SHORT,
    remarks_on,
)


def draw_interactive(data: ParetoData, *, stacked: bool = False, dark: bool = False) -> go.Figure:
    """Draw the front for a browser; hovering over a point shows everything that is known of it.

    Args:
        data: What to draw.
        stacked: Put the panels above each other, for a narrow screen.
        dark: Use light ink for a dark page. The data of the figure is the same either way.
    """
    ink, grid = ("#E6E6E6", "#4A4A4A") if dark else ("#222222", "#DDDDDD")
    figure = go.Figure()
    for axis in ("", "2"):
        for trace in _traces(data, axis):
            figure.add_trace(trace)
    for axis, view, title in zip(("", "2"), (data.zoomed, data.whole), PANELS, strict=True):
        figure.update_layout(_axes(data, axis, view, stacked=stacked, grid=grid))
        figure.add_annotation(_note(axis, f"<b>{title}</b>", y=1.0, yanchor="bottom"))
        for shape in _target_shapes(data, axis):
            figure.add_shape(shape)
    for line, text in enumerate(remarks_on(data)):
        figure.add_annotation(_note("", text, y=0.01 + 0.07 * line, yanchor="bottom"))
    return figure.update_layout(
        template="none",
        height=980 if stacked else 520,
        # A legend below takes two lines on a wide screen, and nine on a narrow one.
        margin={"l": 64, "r": 16, "t": 56, "b": 310 if stacked else 110},
        font={"color": ink, "family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": grid, "activecolor": ink},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    )


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
                hovertext=[_hover(f"trial {p.number}, {p.status}", p.facts) for p in points],
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
                hovertext=[_hover("original model", (("mac_ratio", ratio(1.0)), *data.original_facts))],
                hoverinfo="text",
                marker={"symbol": "star", "size": 15, "color": PURPLE},
                name="original model",
                **common,
            )
        )
    return traces


def _axes(data: ParetoData, axis: str, view: View, *, stacked: bool, grid: str) -> dict[str, Any]:
    first = not axis
    if stacked:
        x_title, x_domain, y_domain = X_TITLE_SHORT, (0.0, 1.0), ((0.59, 1.0) if first else (0.0, 0.41))
    else:
        x_title = X_TITLE if first else X_TITLE_SHORT
        x_domain, y_domain = ((0.0, 0.56) if first else (0.66, 1.0)), (0.0, 1.0)
    factor = data.scale.factor
    look = {"gridcolor": grid, "linecolor": grid, "zeroline": False, "showline": True, "mirror": True}
    return {
        f"xaxis{axis}": {
            **look,
            "domain": x_domain,
            "anchor": f"y{axis}",
            "range": view.x,
            "title": {"text": x_title, "standoff": 12},
            "nticks": 7,
        },
        f"yaxis{axis}": {
            **look,
            "domain": y_domain,
            "anchor": f"x{axis}",
            "range": [factor * y for y in view.y],
            "title": {"text": data.scale.axis_title},
        },
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


def _note(axis: str, text: str, **place: Any) -> dict[str, Any]:
    refs = {"xref": f"x{axis} domain", "yref": f"y{axis} domain", "x": 0.01, "xanchor": "left"}
    return {**refs, **place, "text": text, "showarrow": False}


def _hover(title: str, facts: Sequence[Fact]) -> str:
    # Plotly reads a few HTML tags in hover texts; names may come from the user.
    lines = (f"{html.escape(name)}: {html.escape(value)}" for name, value in facts)
    return "<br>".join([f"<b>{html.escape(title)}</b>", *lines])
