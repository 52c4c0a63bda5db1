"""The sensitivity tables of a candidate's stages, as heat maps of layers against candidate sizes."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import plotly.graph_objects as go

from compress_search.reports.figure_look import LIGHT, Theme, common_axis, common_layout, hover
from compress_search.reports.formatting import technique
from compress_search.reports.layer_bars import shortened
from compress_search.selection.table import Cell, SensitivityTable


@dataclass(frozen=True)
class StageSensitivity:
    """The table that one stage chose its sizes by.

    Attributes:
        method: The stage's method.
        loss_name: What a loss is, with its unit.
        table: The cells.
    """

    method: str
    loss_name: str
    table: SensitivityTable


@dataclass(frozen=True)
class HeatMap:
    """All that one figure shows.

    Attributes:
        title: What it is the table of.
        loss_name: What a loss is, with its unit.
        units: The layers or groups of channels, in forward order.
        rows: The cells of each unit by size, ascending.
        logarithmic: Whether colours follow the logarithm of the loss: only if every loss is positive.
    """

    title: str
    loss_name: str
    units: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    logarithmic: bool


def heat_map(sensitivity: StageSensitivity) -> HeatMap:
    """Put the cells of a table in rows, a unit each."""
    rows: dict[str, list[Cell]] = {}
    for cell in sensitivity.table.cells:
        if math.isfinite(cell.loss):
            rows.setdefault(cell.unit, []).append(cell)
    ordered = {unit: tuple(sorted(cells, key=lambda cell: cell.size)) for unit, cells in rows.items()}
    return HeatMap(
        title=technique(sensitivity.method),
        loss_name=sensitivity.loss_name,
        units=tuple(ordered),
        rows=tuple(ordered.values()),
        logarithmic=all(cell.loss > 0 for cells in ordered.values() for cell in cells),
    )


def draw_heat_map(data: HeatMap, *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw one row a unit; each cell has the size written in it, and its loss for a colour.

    The cheapest size is at the left. Rows end at the right with the largest size that saves anything, so a
    row of few sizes begins further right.

    Args:
        data: What to draw.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    width = max((len(cells) for cells in data.rows), default=1)
    padded: list[list[Cell | None]] = [[None] * (width - len(cells)) + list(cells) for cells in data.rows]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if c is None else _height(c.loss, data) for c in cells] for cells in padded],
            text=[["" if c is None else str(c.size) for c in cells] for cells in padded],
            texttemplate="%{text}",
            hovertext=[["" if c is None else _hover(c, data) for c in cells] for cells in padded],
            hoverinfo="text",
            hoverongaps=False,
            xgap=1,
            ygap=1,
            coloraxis="coloraxis",
        )
    )
    longest = 14 if narrow else 34
    heights = [_height(cell.loss, data) for cells in data.rows for cell in cells]
    units = len(data.units)
    return figure.update_layout(
        common_layout(theme, height=110 + 22 * max(units, 4), bottom=60, legend=False),
        coloraxis={
            # Okabe and Ito's blue is little, vermilion is much; both stand out from any page.
            "colorscale": [[0.0, "#1F86CC"], [0.5, "#E8D9A0"], [1.0, "#D55E00"]],
            "colorbar": {
                "title": {"text": data.loss_name, "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
                **(_decades(heights) if data.logarithmic and heights else {}),
            },
        },
        xaxis=common_axis(
            theme, "candidate sizes, from the smallest to the largest", showticklabels=False, showgrid=False
        ),
        yaxis=common_axis(
            theme,
            tickvals=list(range(units)),
            ticktext=[html.escape(shortened(unit, longest)) for unit in data.units],
            range=[units - 0.5, -0.5],
            automargin=True,
            showgrid=False,
        ),
    )


def _height(loss: float, data: HeatMap) -> float:
    return math.log10(loss) if data.logarithmic else loss


def _hover(cell: Cell, data: HeatMap) -> str:
    how = "measured" if cell.measured else "from the measured ones"
    return hover(cell.unit, [("size", str(cell.size)), (data.loss_name, f"{cell.loss:.4g} ({how})")])


def _decades(heights: list[float]) -> dict[str, list[int] | list[str]]:
    powers = list(range(math.floor(min(heights)), math.ceil(max(heights)) + 1))
    step = max(1, math.ceil(len(powers) / 6))
    return {"tickvals": powers[::step], "ticktext": [f"10<sup>{power}</sup>" for power in powers[::step]]}
