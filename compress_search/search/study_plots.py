"""The figures that the dashboard shows of a study, drawn from its trials as they are."""

from __future__ import annotations

import html
import logging
from collections.abc import Sequence

import plotly.graph_objects as go

from compress_search.reports.figure_look import ANY
from compress_search.reports.figures import StudyFigure, study_figures
from compress_search.reports.layers import LayerRow
from compress_search.results import Candidate, ParetoFront

logger = logging.getLogger("compress_search")

_BOX = 450
"""Height of the box that the dashboard shows a figure in, in pixels; it takes half the page's width."""
_MOST_LAYERS = 16
"""So many layers can be told apart in it."""


def study_plots(
    front: ParetoFront, *, chosen: Candidate | None, layers: Sequence[LayerRow]
) -> dict[str, str]:
    """Draw a study's figures for the dashboard.

    Args:
        front: The study's candidates.
        chosen: The candidate to mark as the chosen one.
        layers: What became of each layer of the chosen model, if known.

    Returns:
        The figures as JSON by name, in order. One that cannot be drawn is left out, with a warning.
    """
    drawn = {}
    for place, figure in enumerate(study_figures(front, chosen=chosen, layers=_dearest(layers))):
        try:
            drawn[f"{place:02d}-{figure.name}"] = _fitted(figure, of=len(layers)).to_json()
        except Exception:
            logger.warning("The figure %r cannot be drawn.", figure.title, exc_info=True)
    return drawn


def _dearest(layers: Sequence[LayerRow]) -> Sequence[LayerRow]:
    """Those with the most MACs, in forward order."""
    kept = sorted(layers, key=lambda row: row.macs_before, reverse=True)[:_MOST_LAYERS]
    return [row for row in layers if row in kept]


def _fitted(figure: StudyFigure, *, of: int) -> go.Figure:
    """Draw a figure for the box: with its title, and with less text than there is room for in the report."""
    drawn = figure.draw(theme=ANY)
    title = html.escape(figure.title)
    if figure.name == "front":
        drawn.update_xaxes(title_text="mac_ratio")
        drawn.update_yaxes(title_text="", selector={"anchor": "x2"})
        drawn.update_traces(showlegend=False, selector={"mode": "lines"})
        for panel, text in zip(drawn.layout.annotations, ("<b>The band</b>", "<b>All</b>"), strict=False):
            panel.text = text
    elif figure.name == "stages":
        labels = [label.replace("<br>after ", "<br>after<br>") for label in drawn.layout.xaxis.ticktext]
        drawn.update_xaxes(ticktext=labels, tickfont_size=10)
    elif figure.name == "layers" and of > _MOST_LAYERS:
        title += f": the {_MOST_LAYERS} dearest of {of}"
    margin = drawn.layout.margin
    return drawn.update_layout(
        title={"text": f"<b>{title}</b>", "x": 0.0, "y": 0.97, "font": {"size": 15}},
        font_size=11,
        margin={"t": margin.t + 30, "b": max(margin.b, 110)},
        height=_BOX,
        # The page draws it again every few seconds: what the user has zoomed to or hidden stays.
        uirevision="kept",
    )
