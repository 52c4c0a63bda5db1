"""The figures that the dashboard shows of a study, drawn from its trials as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import plotly.graph_objects as go

from compress_search.reports.pareto import pareto_data
from compress_search.reports.pareto_interactive import draw_interactive
from compress_search.results import ParetoFront

logger = logging.getLogger("compress_search")


def _front(front: ParetoFront) -> go.Figure:
    return draw_interactive(pareto_data(front))


PLOTS: Mapping[str, Callable[[ParetoFront], go.Figure]] = {
    "1-front": _front,
}
"""The figures by the name under which the dashboard knows them, in whose order it shows them."""


def study_plots(front: ParetoFront) -> dict[str, str]:
    """Draw a study's figures as JSON, by name; one that cannot be drawn is left out, with a warning."""
    drawn = {}
    for name, draw in PLOTS.items():
        try:
            drawn[name] = _fitted(draw(front)).to_json()
        except Exception:
            logger.warning("The figure %s cannot be drawn.", name, exc_info=True)
    return drawn


def _fitted(figure: go.Figure) -> go.Figure:
    return figure.update_layout(uirevision="kept", height=None, width=None)
