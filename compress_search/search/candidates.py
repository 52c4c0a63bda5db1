"""From Optuna's trials to the package's own values."""

from __future__ import annotations

from collections.abc import Callable

from optuna.trial import FrozenTrial, TrialState
from torch import nn

from compress_search.results import Candidate, StageResult
from compress_search.search.history import FINALIST_OF, LEARNING_CURVE, REASON, STAGES
from compress_search.search.objective import CONSTRAINT
from compress_search.workspace import Workspace

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
"""What a candidate's states are called, by the trial's."""


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial of a study of this package is complete and has ended in the target's band."""
    return trial.state == TrialState.COMPLETE and trial.constraints[CONSTRAINT] <= 0


def candidate_of(
    trial: FrozenTrial, workspace: Workspace, build_model: Callable[[], nn.Module] | None
) -> Candidate:
    """Read what a trial ended as.

    Args:
        trial: A trial of a study of this package.
        workspace: Where the stages lie.
        build_model: Makes the original model, if the task is known.
    """
    attributes = trial.user_attrs
    stages = tuple(StageResult.from_dict(stage) for stage in attributes.get(STAGES, ()))
    complete = trial.state == TrialState.COMPLETE
    return Candidate(
        number=trial.number,
        state=STATES[trial.state],
        params=trial.params,
        stages=stages,
        learning_curve=tuple(attributes.get(LEARNING_CURVE, ())),
        accuracy=attributes["accuracy"] if complete else None,
        mac_ratio=attributes["mac_ratio"] if complete else None,
        drop=attributes["drop"] if complete else None,
        feasible=is_feasible(trial),
        seconds=sum(stage.seconds for stage in stages if not stage.reused),
        reason=attributes.get(REASON),
        finalist_of=attributes.get(FINALIST_OF),
        folder=workspace.stages / attributes["key"] if complete else None,
        build_model=build_model,
    )
