"""All figures of a study, for every page that shows them: the report and the dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from compress_search.reports.figure_look import Draw
from compress_search.reports.hypervolume import draw_hypervolume, hypervolume_data
from compress_search.reports.layer_bars import draw_layer_bars
from compress_search.reports.layers import LayerRow
from compress_search.reports.learning_curves import draw_learning_curves, learning_curves_data
from compress_search.reports.pareto import pareto_data
from compress_search.reports.pareto_interactive import draw_interactive
from compress_search.reports.ratio_split import draw_ratio_split, ratio_split_data
from compress_search.reports.sensitivity import StageSensitivity, draw_heat_map, heat_map
from compress_search.reports.stage_accuracy import draw_stage_accuracy, stage_accuracy_data
from compress_search.reports.stage_time_bars import draw_stage_times
from compress_search.reports.trials import stage_times
from compress_search.results import Candidate, ParetoFront


@dataclass(frozen=True)
class StudyFigure:
    """One figure, not drawn yet.

    Attributes:
        name: A short name of letters and dashes, different for each figure of a study.
        title: What it shows, for people; plain text.
        draw: Draws it.
    """

    name: str
    title: str
    draw: Draw


def study_figures(
    front: ParetoFront,
    *,
    chosen: Candidate | None = None,
    layers: Sequence[LayerRow] = (),
    sensitivities: Sequence[StageSensitivity] = (),
) -> tuple[StudyFigure, ...]:
    """Gather the figures of a study; those with nothing to show are left out, but for the front.

    Args:
        front: The study's candidates.
        chosen: The candidate to mark as the chosen one.
        layers: What became of each layer of the chosen model, if known.
        sensitivities: The tables that its stages chose their sizes by, if known.
    """
    figures = [
        StudyFigure(
            "front", "Accuracy against MACs", partial(draw_interactive, pareto_data(front, chosen=chosen))
        )
    ]
    accuracies = stage_accuracy_data(front, chosen=chosen)
    if accuracies.lines:
        figures.append(
            StudyFigure("stages", "Accuracy stage by stage", partial(draw_stage_accuracy, accuracies))
        )
    curves = learning_curves_data(front, chosen=chosen)
    if curves.curves:
        figures.append(
            StudyFigure("curves", "Fine-tuning epoch by epoch", partial(draw_learning_curves, curves))
        )
    split = ratio_split_data(front, chosen=chosen)
    if split is not None:
        title = "How the two methods share the target"
        figures.append(StudyFigure("split", title, partial(draw_ratio_split, split)))
    volumes = hypervolume_data(front)
    if volumes.numbers:
        figures.append(
            StudyFigure("hypervolume", "How the front has grown", partial(draw_hypervolume, volumes))
        )
    if layers:
        assert chosen is not None
        title = f"Layers of trial {chosen.number}"
        figures.append(StudyFigure("layers", title, partial(draw_layer_bars, layers)))
    for position, sensitivity in enumerate(sensitivities, start=1):
        table = heat_map(sensitivity)
        figures.append(
            StudyFigure(
                f"sensitivity-{position}", f"Sensitivity to {table.title}", partial(draw_heat_map, table)
            )
        )
    times = stage_times(candidate.stages for candidate in front.candidates)
    if times:
        figures.append(StudyFigure("times", "Time of the stages", partial(draw_stage_times, times)))
    return tuple(figures)
