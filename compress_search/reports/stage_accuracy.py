"""Accuracy stage by stage: what each compression costs, and what fine-tuning gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go

from compress_search.accuracy_scale import AccuracyScale
from compress_search.plain_text import duration
from compress_search.reports.figure_look import LIGHT, PURPLE, Theme, common_axis, common_layout, hover
from compress_search.reports.formatting import ratio, stage_label
from compress_search.reports.pareto import standings
from compress_search.reports.trial_lines import TrialLine, draw_trial_lines
from compress_search.reports.trials import stage_names, stage_order
from compress_search.results import Candidate, ParetoFront


@dataclass(frozen=True)
class StagePoint:
    """What one stage of one trial ended with.

    Attributes:
        place: Index of the stage in :attr:`StageAccuracyData.stages`.
        accuracy: On the validation data.
        mac_ratio: MACs / MACs of the original model.
        seconds: Time that computing the stage took.
        reused: Whether the trial found it in the workspace.
    """

    place: int
    accuracy: float
    mac_ratio: float
    seconds: float
    reused: bool


@dataclass(frozen=True)
class AccuracyLine:
    """One trial's way through its stages.

    Attributes:
        number: The trial's.
        standing: ``"on the front"``, ``"in the band"``, ``"outside the band"``, or its state.
        points: Its finished stages; the original model, where all begin, is not among them.
    """

    number: int
    standing: str
    points: tuple[StagePoint, ...]


@dataclass(frozen=True)
class StageAccuracyData:
    """All that the figure shows.

    Attributes:
        stages: Names of all stages of all trials, in order.
        lines: The trials that have finished a stage, by number.
        original_accuracy: Of the original model.
        chosen: Number of the trial that was chosen, if one was.
        scale: How accuracies are shown.
    """

    stages: tuple[str, ...]
    lines: tuple[AccuracyLine, ...]
    original_accuracy: float
    chosen: int | None
    scale: AccuracyScale


def stage_accuracy_data(front: ParetoFront, *, chosen: Candidate | None = None) -> StageAccuracyData:
    """Gather the accuracy of every finished stage of every trial, unfinished trials included."""
    order = stage_order({tuple(stage_names(candidate.stages)) for candidate in front.candidates})
    standing = standings(front)
    lines = tuple(
        AccuracyLine(candidate.number, standing[candidate.number], points)
        for candidate in front.candidates
        if (points := _points(candidate, order))
    )
    accuracies = [point.accuracy for line in lines for point in line.points]
    return StageAccuracyData(
        stages=order,
        lines=lines,
        original_accuracy=front.reference.accuracy,
        chosen=None if chosen is None else chosen.number,
        scale=AccuracyScale.of([front.reference.accuracy, *accuracies]),
    )


def draw_stage_accuracy(data: StageAccuracyData, *, narrow: bool = False, theme: Theme = LIGHT) -> go.Figure:
    """Draw one line a trial from the original model through its stages; a stage left out is passed over.

    Args:
        data: What to draw.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    figure = go.Figure(draw_trial_lines([_line(data, line) for line in data.lines], chosen=data.chosen))
    labels = ["original", *(stage_label(name).replace(" after ", "<br>after ") for name in data.stages)]
    figure.add_hline(
        y=data.scale.factor * data.original_accuracy, line={"color": PURPLE, "width": 1.5, "dash": "dot"}
    )
    return figure.update_layout(
        common_layout(theme, height=580 if narrow else 440, bottom=260 if narrow else 90),
        xaxis=common_axis(
            theme,
            tickvals=list(range(len(labels))),
            ticktext=labels,
            range=[-0.3, max(len(labels), 2) - 0.7],
            tickangle=-40 if narrow else 0,
        ),
        yaxis=common_axis(theme, data.scale.axis_title),
    )


def _points(candidate: Candidate, order: tuple[str, ...]) -> tuple[StagePoint, ...]:
    return tuple(
        StagePoint(order.index(name), stage.accuracy, stage.mac_ratio, stage.seconds, stage.reused)
        for name, stage in zip(stage_names(candidate.stages), candidate.stages, strict=True)
        if math.isfinite(stage.accuracy)
    )


def _line(data: StageAccuracyData, line: AccuracyLine) -> TrialLine:
    """From the original model, where all begin, through the stages."""
    title = f"trial {line.number}, {line.standing}"
    start = hover(title, [("original", data.scale.accuracy(data.original_accuracy))])
    accuracies = [data.original_accuracy, *(point.accuracy for point in line.points)]
    return TrialLine(
        line.number,
        line.standing,
        x=[0, *(point.place + 1 for point in line.points)],
        y=[data.scale.factor * accuracy for accuracy in accuracies],
        texts=[start, *(hover(title, _facts(data, point)) for point in line.points)],
    )


def _facts(data: StageAccuracyData, point: StagePoint) -> list[tuple[str, str]]:
    return [
        ("after", data.stages[point.place]),
        ("accuracy", data.scale.accuracy(point.accuracy)),
        ("drop", data.scale.drop(data.original_accuracy - point.accuracy)),
        ("mac_ratio", ratio(point.mac_ratio)),
        ("time", f"{duration(point.seconds)}{', reused' if point.reused else ''}"),
    ]
