"""The front as a picture, for which no browser is needed."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compress_search.reports.figure_look import GREEN, PURPLE, VERMILION
from compress_search.reports.pareto import ParetoData, View
from compress_search.reports.pareto_look import KINDS, PANELS, X_TITLE, remarks_on
from compress_search.workspace import write_bytes_atomically


def draw_static(data: ParetoData, path: Path) -> None:
    """Draw the same facts as a PNG, for which no browser is needed.

    Args:
        data: What to draw.
        path: The file to write. It appears whole or not at all.
    """
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, width_ratios=(3, 2))
    for panel, view, title in zip(axes, (data.zoomed, data.whole), PANELS, strict=True):
        _draw_panel(panel, data, view)
        panel.set_title(title, fontsize=11)
    _label_front(axes[0], data)
    axes[0].annotate("\n".join(remarks_on(data)), (0.01, 0.02), xycoords="axes fraction", fontsize=9)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_bytes_atomically(path, picture.getvalue())


def _draw_panel(panel: Axes, data: ParetoData, view: View) -> None:
    factor = data.scale.factor
    low, high = data.band
    panel.axvspan(low, high, color=GREEN, alpha=0.18, linewidth=0, label=f"band {low:.4g} to {high:.4g}")
    for target in data.targets:
        panel.axvline(target, color=GREEN, linestyle="--", label=f"target {target:.4g}")
    original = factor * data.original_accuracy
    panel.axhline(original, color=PURPLE, linestyle=":", label="accuracy of the original")
    if data.steps:
        panel.plot(
            [x for x, _ in data.steps],
            [factor * y for _, y in data.steps],
            drawstyle="steps-post",
            color=VERMILION,
            label="front: best accuracy within a budget",
        )
    for kind in KINDS:
        points = kind.points_of(data)
        if points:
            panel.scatter(
                [point.mac_ratio for point in points],
                [factor * point.accuracy for point in points],
                s=kind.size**2 / 2,
                marker=kind.marker,
                color=kind.colour,
                zorder=3,
                label=f"trial {kind.name}",
            )
    for point in (p for p in data.points if p.number == data.chosen):
        panel.scatter(
            [point.mac_ratio],
            [factor * point.accuracy],
            s=240,
            facecolors="none",
            edgecolors=VERMILION,
            linewidths=1.5,
            zorder=4,
            label=f"chosen: trial {point.number}",
        )
    panel.scatter([1.0], [original], s=130, marker="*", color=PURPLE, zorder=3, label="original model")
    panel.set_xlim(view.x)
    panel.set_ylim(factor * view.y[0], factor * view.y[1])
    panel.set_xlabel(X_TITLE)
    panel.set_ylabel(data.scale.axis_title)
    panel.grid(color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.locator_params(axis="x", nbins=6)


def _label_front(panel: Axes, data: ParetoData) -> None:
    for point in data.front:
        place = (point.mac_ratio, data.scale.factor * point.accuracy)
        panel.annotate(str(point.number), place, xytext=(-9, 7), textcoords="offset points", ha="right")
