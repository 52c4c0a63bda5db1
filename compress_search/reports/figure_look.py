"""How every figure looks: its colours, what suits a light, a dark and an unknown page, its common layout.

Colours are Okabe and Ito's (2008), which people with any colour vision tell apart, the blue a little lighter
so that it stands out from a dark page too. Data has the same colours on every page; only ink and grid differ.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import plotly.graph_objects as go

BLUE, VERMILION, GREY, GREEN, PURPLE = "#1F86CC", "#D55E00", "#8A8A8A", "#009E73", "#CC79A7"

Fact = tuple[str, str]
"""A name and its value, both for people."""


@dataclass(frozen=True)
class Theme:
    """What suits one kind of page.

    Attributes:
        ink: Colour of the text.
        grid: Colour of grid lines and frames.
        box: Colour of the box that what is known of a point stands in.
        box_ink: Colour of the text in it.
    """

    ink: str
    grid: str
    box: str
    box_ink: str


LIGHT = Theme("#222222", "#DDDDDD", box="#FFFFFF", box_ink="#222222")
DARK = Theme("#E6E6E6", "#4A4A4A", box="#212427", box_ink="#E6E6E6")
# A grey that stands out from white as much as from the dashboard's black.
ANY = Theme("#7A7A7A", "rgba(128, 128, 128, 0.35)", box="#FFFFFF", box_ink="#222222")
"""For a page that may be light or dark, such as the dashboard's."""


class Draw(Protocol):
    """Draws one figure of known data."""

    def __call__(self, *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
        """Draw it.

        Args:
            narrow: For a screen of 400 pixels.
            theme: The page that it stands on. The data of the figure is the same on each.
        """


def common_layout(theme: Theme, *, height: int, bottom: int, legend: bool = True) -> dict[str, Any]:
    """The part of a layout that all figures share.

    Args:
        theme: The page that the figure stands on.
        height: Of the figure, in pixels.
        bottom: What the axis titles and the legend below them take of it, in pixels.
        legend: Whether there is one.
    """
    font = {"family": "system-ui, sans-serif", "size": 13}
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 40, "b": bottom},
        "font": {**font, "color": theme.ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        # By default it has the colour of the point, on which white is hard to read.
        "hoverlabel": {"align": "left", "bgcolor": theme.box, "font": {**font, "color": theme.box_ink}},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": theme.ink},
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
        },
    }


def recoloured(layout: Mapping[str, Any], theme: Theme) -> dict[str, Any]:
    """The layout that a figure has on a page of another theme, without drawing it again.

    Args:
        layout: Of the figure on a light page, as plain values.
        theme: The other page's.
    """
    colours = {LIGHT.ink: theme.ink, LIGHT.grid: theme.grid, LIGHT.box: theme.box}

    def replaced(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: replaced(inner, item) for inner, item in value.items()}
        return colours.get(value, value) if name.endswith("color") else value

    return {name: replaced(name, value) for name, value in layout.items()}


def common_axis(theme: Theme, title: str = "", **changes: Any) -> dict[str, Any]:
    """One framed axis."""
    look = {"gridcolor": theme.grid, "linecolor": theme.grid, "zeroline": False}
    return {**look, "showline": True, "mirror": True, "title": {"text": title, "standoff": 12}} | changes


def hover(title: str, facts: Sequence[Fact]) -> str:
    """Write what is known of a point for its hover label, with everything from outside escaped."""
    # Plotly reads a few HTML tags in hover texts; names may come from the user.
    lines = (f"{html.escape(name)}: {html.escape(value)}" for name, value in facts)
    return "<br>".join([f"<b>{html.escape(title)}</b>", *lines])


def note(text: str, **place: Any) -> dict[str, Any]:
    """A line of text in the upper left corner of the figure, or elsewhere."""
    at = {"xref": "paper", "yref": "paper", "x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"}
    return {**at, **place, "text": text, "showarrow": False}
