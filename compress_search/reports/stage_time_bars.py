"""The time of each kind of stage, and what reuse saved of it, as a figure."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from compress_search.reports.figure_look import BLUE, GREEN, LIGHT, Theme, common_axis, common_layout, hover
from compress_search.reports.formatting import duration, stage_label
from compress_search.reports.trials import StageTime

_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_stage_times(times: Sequence[StageTime], *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw one bar a kind of stage: the time that it took, and beyond it the time that reuse saved.

    Args:
        times: The kinds of stages, in order.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    longest = max((row.seconds + row.saved for row in times), default=0.0)
    size, unit = next((pair for pair in _UNITS if longest >= 2 * pair[0]), _UNITS[-1])
    places = list(range(len(times)))
    texts = [hover(stage_label(row.name), _facts(row)) for row in times]
    common = {"y": places, "orientation": "h", "hovertext": texts, "hoverinfo": "text"}
    figure = go.Figure(
        [
            go.Bar(
                x=[row.seconds / size for row in times], name="computed", marker={"color": BLUE}, **common
            ),
            go.Bar(
                x=[row.saved / size for row in times],
                name="saved by reuse",
                marker={"color": GREEN, "pattern": {"shape": "/", "fillmode": "replace", "fgcolor": GREEN}},
                **common,
            ),
        ]
    )
    labels = [stage_label(row.name) for row in times]
    return figure.update_layout(
        common_layout(theme, height=150 + 40 * max(len(times), 2), bottom=100),
        barmode="stack",
        xaxis=common_axis(theme, f"{unit}, all trials", rangemode="tozero", nticks=6),
        yaxis=common_axis(
            theme,
            tickvals=places,
            ticktext=[label.replace(" after ", " after<br>") if narrow else label for label in labels],
            range=[max(len(times), 1) - 0.5, -0.5],
            automargin=True,
            showgrid=False,
        ),
    )


def _facts(row: StageTime) -> list[tuple[str, str]]:
    return [
        ("computed", f"{row.computed} times, {duration(row.seconds)}"),
        ("reused", f"{row.reused} times, which saved {duration(row.saved)}"),
    ]
