"""How the front looks, in every drawing of it.

Each kind of trial has a colour and also a symbol of its own, so that a print without colours still says it.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress_search.reports.figure_look import BLUE, GREY, VERMILION
from compress_search.reports.pareto import ParetoData, ParetoPoint

X_TITLE = "mac_ratio: MACs kept / MACs of the original"
X_TITLE_SHORT = "MACs kept / MACs of the original"
PANELS = ("The band, enlarged", "All complete trials and the original")


@dataclass(frozen=True)
class TrialKind:
    """One kind of trial and how it looks.

    Attributes:
        name: The status of its points.
        symbol: Its symbol in plotly.
        marker: Its symbol in matplotlib.
        size: Of the symbol, in pixels.
        colour: Of the symbol.
        hollow: Whether the symbol is drawn with lines alone.
    """

    name: str
    symbol: str
    marker: str
    size: int
    colour: str
    hollow: bool

    def points_of(self, data: ParetoData) -> list[ParetoPoint]:
        """The points of this kind."""
        return [point for point in data.points if point.status == self.name]


KINDS = (
    TrialKind("outside the band", "x-thin-open", "x", 9, GREY, hollow=True),
    TrialKind("in the band", "circle", "o", 9, BLUE, hollow=False),
    TrialKind("on the front", "diamond", "D", 12, VERMILION, hollow=False),
)


def remarks_on(data: ParetoData) -> list[str]:
    """What the enlarged panel has to say in words: what it does not show, and why it is empty."""
    remarks = []
    if data.zoomed.below:
        remarks.append(f"{data.zoomed.below} less accurate, not shown here")
    if not data.points:
        remarks.append("no complete trial")
    elif not any(point.feasible for point in data.points):
        remarks.append("no complete trial in the band")
    return remarks
