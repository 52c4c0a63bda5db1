"""MACs of every layer before and after, as a figure of the layer table."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from compress_search.reports.figure_look import BLUE, GREY, LIGHT, Theme, common_axis, common_layout, hover
from compress_search.reports.formatting import count, ratio
from compress_search.reports.layers import LayerRow

_MANY = 60
"""From so many layers on, bars are thinner."""


def draw_layer_bars(rows: Sequence[LayerRow], *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw two bars a layer, from the first layer down; hovering says what was done, and why no more was.

    Args:
        rows: The layers, in forward order.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    # By index: names need not be different when they are shortened.
    places = list(range(len(rows)))
    texts = [hover(row.layer, _facts(row)) for row in rows]
    common = {"y": places, "orientation": "h", "hovertext": texts, "hoverinfo": "text"}
    figure = go.Figure(
        [
            go.Bar(x=[row.macs_before for row in rows], name="before", marker={"color": GREY}, **common),
            go.Bar(
                x=[row.macs_after for row in rows],
                name="after",
                marker={"color": BLUE},
                text=[_short_note(row) for row in rows],
                textposition="outside",
                cliponaxis=False,
                constraintext="none",
                **common,
            ),
        ]
    )
    longest = 14 if narrow else 34
    most = max((max(row.macs_before, row.macs_after) for row in rows), default=1)
    bottom = 90
    return figure.update_layout(
        common_layout(
            theme, height=40 + bottom + max(len(rows), 2) * (20 if len(rows) > _MANY else 30), bottom=bottom
        ),
        barmode="group",
        bargap=0.25,
        xaxis=common_axis(theme, "MACs for one example", range=[0, 1.15 * most], nticks=5),
        yaxis=common_axis(
            theme,
            tickvals=places,
            ticktext=[html.escape(shortened(row.layer, longest)) for row in rows],
            range=[len(rows) - 0.5, -0.5],
            automargin=True,
            showgrid=False,
        ),
    )


def _facts(row: LayerRow) -> list[tuple[str, str]]:
    facts = [
        ("kind", row.kind),
        ("done", row.done or "nothing"),
        ("MACs before", count(row.macs_before)),
        ("MACs after", count(row.macs_after)),
        ("ratio", ratio(row.ratio)),
        ("left alone by", row.left_alone),
    ]
    return [(name, value) for name, value in facts if value]


def _short_note(row: LayerRow) -> str:
    return f"{row.ratio:.2f}" if row.done else "left alone"


def shortened(name: str, longest: int) -> str:
    """Leave out the middle of a long name: its end says most, and its beginning where the layer is."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 3
    return f"{name[:head]}…{name[head + 1 - longest :]}"
