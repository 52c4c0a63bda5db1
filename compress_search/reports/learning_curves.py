"""Fine-tuning epoch by epoch: whether the trials were still getting better, and which were given up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go

from compress_search.accuracy_scale import AccuracyScale
from compress_search.reports.figure_look import LIGHT, PURPLE, Theme, common_axis, common_layout, hover
from compress_search.reports.pareto import standings
from compress_search.reports.trial_lines import TrialLine, draw_trial_lines
from compress_search.results import Candidate, ParetoFront


@dataclass(frozen=True)
class LearningCurve:
    """The last fine-tuning that a trial has begun.

    Attributes:
        number: The trial's.
        standing: ``"on the front"``, ``"in the band"``, ``"outside the band"``, or its state.
        accuracies: On the validation data, before the first epoch and after each.
    """

    number: int
    standing: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class LearningCurvesData:
    """All that the figure shows.

    Attributes:
        curves: By number of the trial.
        original_accuracy: Of the original model.
        chosen: Number of the trial that was chosen, if one was.
        scale: How accuracies are shown.
    """

    curves: tuple[LearningCurve, ...]
    original_accuracy: float
    chosen: int | None
    scale: AccuracyScale


def learning_curves_data(front: ParetoFront, *, chosen: Candidate | None = None) -> LearningCurvesData:
    """Gather the curve of each trial's last fine-tuning, finished or not."""
    standing = standings(front)
    curves = tuple(
        LearningCurve(candidate.number, standing[candidate.number], accuracies)
        for candidate in front.candidates
        if len(accuracies := _last_curve(candidate)) > 1
    )
    return LearningCurvesData(
        curves,
        original_accuracy=front.reference.accuracy,
        chosen=None if chosen is None else chosen.number,
        scale=AccuracyScale.of([front.reference.accuracy, *(a for one in curves for a in one.accuracies)]),
    )


def draw_learning_curves(
    data: LearningCurvesData, *, narrow: bool = False, theme: Theme = LIGHT
) -> go.Figure:
    """Draw one line a trial over the epochs of its last fine-tuning, beside the original's accuracy.

    Args:
        data: What to draw.
        narrow: For a screen of 400 pixels.
        theme: The page that it stands on. The data of the figure is the same on each.
    """
    figure = go.Figure(draw_trial_lines([_line(data, curve) for curve in data.curves], chosen=data.chosen))
    original = data.scale.factor * data.original_accuracy
    figure.add_hline(y=original, line={"color": PURPLE, "width": 1.5, "dash": "dot"})
    longest = max((len(curve.accuracies) - 1 for curve in data.curves), default=1)
    return figure.update_layout(
        common_layout(theme, height=440, bottom=150 if narrow else 110),
        xaxis=common_axis(
            theme,
            "epochs of the last fine-tuning",
            range=[-0.02 * longest, 1.02 * longest],
            tickformat="d",
            nticks=min(longest + 1, 8 if narrow else 16),
        ),
        yaxis=common_axis(theme, data.scale.axis_title),
    )


def _last_curve(candidate: Candidate) -> tuple[float, ...]:
    curve = candidate.learning_curve
    if not curve and candidate.stages:
        curve = candidate.stages[-1].learning_curve
    return curve if all(map(math.isfinite, curve)) else ()


def _line(data: LearningCurvesData, curve: LearningCurve) -> TrialLine:
    title = f"trial {curve.number}, {curve.standing}"
    return TrialLine(
        curve.number,
        curve.standing,
        x=range(len(curve.accuracies)),
        y=[data.scale.factor * accuracy for accuracy in curve.accuracies],
        texts=[
            hover(
                title,
                [
                    ("epochs", str(done)),
                    ("accuracy", data.scale.accuracy(accuracy)),
                    ("drop", data.scale.drop(data.original_accuracy - accuracy)),
                ],
            )
            for done, accuracy in enumerate(curve.accuracies)
        ],
    )
