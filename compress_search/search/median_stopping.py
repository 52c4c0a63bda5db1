"""The median stopping rule: a trial that is behind half of its like is not trained to the end.

Golovin et al. 2017, *Google Vizier: a service for black-box optimization*, section 3.2.1. Deviation: the best
evaluation so far is compared, in place of the mean of all, since a fine-tuning keeps its best epoch, or one
that is as good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from optuna.trial import FrozenTrial, TrialState

from compress_search.results import StageResult
from compress_search.search.history import STAGES, is_finalist
from compress_search.target import Target, excess

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
    most = mac_ratio if isinstance(target, tuple) else math.inf
    rivals = [
        max(last.learning_curve[: done + 1])
        for last in _last_stages(trials)
        if len(last.learning_curve) == epochs + 1
        and last.mac_ratio <= most
        and excess(last.mac_ratio, target, tolerance) <= 0
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


def _last_stages(trials: Iterable[FrozenTrial]) -> Iterator[StageResult]:
    """What the complete trials ended with, finalists left out."""
    for trial in trials:
        stages = trial.user_attrs.get(STAGES)
        if trial.state == TrialState.COMPLETE and not is_finalist(trial) and stages:
            yield StageResult.from_dict(stages[-1])
