"""The median stopping rule: a trial that is behind half of its like is not trained to the end.

Golovin et al. 2017, *Google Vizier: a service for black-box optimization*, section 3.2.1. Deviation: the best
evaluation so far is compared, in place of the mean of all, since the best epoch is what a fine-tuning keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from compress_search.results import StageResult
from compress_search.search.history import STAGES, is_finalist
from compress_search.target import Interval, Target, band_of, excess

LEAST_RIVALS = 4
"""With fewer trials to compare with none is stopped."""


def why_behind(
    curve: Sequence[float],
    *,
    epochs: int,
    mac_ratio: float,
    trials: Iterable[FrozenTrial],
    target: Target,
    tolerance: float,
) -> str | None:
    """Say why a trial is not worth its last epochs, or ``None`` if it is, or is done.

    Its rivals are the feasible trials whose last fine-tuning has as many epochs: those that end in the same
    band, or where the target is a range, those that have no more MACs.

    Args:
        curve: Of its last fine-tuning: the accuracy before the first epoch and after each so far.
        epochs: How many there are to be.
        mac_ratio: Of its model.
        trials: The study's.
        target: The study's.
        tolerance: The study's.
    """
    done = len(curve) - 1
    if done >= epochs:
        return None
    reach = (0.0, mac_ratio) if isinstance(target, tuple) else band_of(target, tolerance)
    rivals = [
        max(rival[: done + 1])
        for rival in _curves(trials, reach, target, tolerance)
        if len(rival) == epochs + 1
    ]
    if len(rivals) < LEAST_RIVALS:
        return None
    best, middle = max(curve), median(rivals)
    if best >= middle:
        return None
    whose = "with no more MACs " if isinstance(target, tuple) else ""
    return (
        f"after {done} of {epochs} epochs of the last fine-tuning the accuracy is {best:.4f}, and half of "
        f"{len(rivals)} other trials {whose}had {middle:.4f} or more by then (median_stopping)"
    )


def _curves(
    trials: Iterable[FrozenTrial], reach: Interval, target: Target, tolerance: float
) -> Iterator[tuple[float, ...]]:
    """The learning curves of the last fine-tunings of feasible trials whose MAC ratios lie within reach."""
    low, high = reach
    for trial in trials:
        if trial.state != TrialState.COMPLETE or is_finalist(trial):
            continue
        stages: Sequence[dict[str, Any]] = trial.user_attrs.get(STAGES, ())
        if not stages:
            continue
        last = StageResult.from_dict(stages[-1])
        if low <= last.mac_ratio <= high and excess(last.mac_ratio, target, tolerance) <= 0:
            yield last.learning_curve
