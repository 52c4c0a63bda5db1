"""What happens to trials whose process was stopped: they are failed, and queued again as retries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from compress_search.search.history import (
    ANCHOR,
    DUPLICATE_OF,
    EPOCHS_BEFORE,
    FINALIST_OF,
    INTERRUPTED,
    REASON,
    RECIPE,
    RETRIES,
    RETRY_OF,
    STAGES,
    STAGES_BEFORE,
    WORKER,
    epochs_done,
    is_finalist,
)
from compress_search.search.storage import backend_of
from compress_search.worker_process import Worker

logger = logging.getLogger("compress_search")

MOST_RETRIES = 3
"""A trial whose process died this often in a row, with no stage or epoch more, is left failed."""

DIED, STOPPED = "died", "stopped"


def recover(study: optuna.Study) -> list[FrozenTrial]:
    """Fail and queue again every trial whose process is gone. Call it between two trials.

    A process of this machine is looked up; of one elsewhere only the missing heartbeat tells, once this
    process has missed it for long enough. Also mends what a process left half done that was killed while it
    did this very thing.

    Returns:
        All trials of the study, as they are now.
    """
    database = backend_of(study)
    silent = database.silent_trials(study._study_id)
    this, grace = Worker.this_process(), database.heartbeat.grace_seconds
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        worker = Worker(**trial.user_attrs[WORKER]) if WORKER in trial.user_attrs else None
        if worker is not None and (worker == this or worker.is_known_dead()):
            ended = f"its process {worker.pid} on {worker.host} ended in the middle of it"
            interrupt(study, trial, DIED, ended)
        elif trial._trial_id in silent:
            where = f"its process on {worker.host}" if worker else "its process"
            interrupt(study, trial, DIED, f"{where} gave no sign of life for {grace:.0f} s")
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    for trial in trials:
        interrupted = trial.state == TrialState.FAIL and INTERRUPTED in trial.user_attrs
        if interrupted and trial.number not in retried:
            queue_retry(study, trial)
    return study.get_trials(deepcopy=False)


def interrupt(study: optuna.Study, trial: FrozenTrial, how: str, reason: str) -> None:
    """Fail a running trial that was stopped from outside, and queue its retry.

    Args:
        study: The study.
        trial: The trial. If it has ended meanwhile, nothing happens.
        how: ``"died"`` or ``"stopped"``. Only dying is held against the trial.
        reason: For the trial's history.
    """
    storage = study._storage
    attributes = storage.get_trial(trial._trial_id).user_attrs
    if _retries_after(attributes, how) > MOST_RETRIES:
        reason += f"; so did {MOST_RETRIES} retries without an epoch more, so that it is not tried again"
    try:
        storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, how)
        storage.set_trial_user_attr(trial._trial_id, REASON, f"interrupted: {reason}")
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return
    logger.info("Trial %d was interrupted: %s.", trial.number, reason)
    queue_retry(study, storage.get_trial(trial._trial_id))


def queue_retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial's parameters again, unless its process died too often at the same stage."""
    attributes = trial.user_attrs
    retries = _retries_after(attributes, attributes.get(INTERRUPTED))
    if retries > MOST_RETRIES:
        return
    stages, epochs = max(_done(attributes), _done_before(attributes))
    retry = {RETRY_OF: trial.number, RETRIES: retries, STAGES_BEFORE: stages, EPOCHS_BEFORE: epochs}
    if is_finalist(trial):
        queue_finalist(study, trial, {name: attributes[name] for name in (FINALIST_OF, RECIPE)} | retry)
        return
    kept = {ANCHOR: attributes[ANCHOR]} if ANCHOR in attributes else {}
    study.enqueue_trial(
        # What was fixed for the trial and not asked for yet is fixed for its retry.
        {**trial.system_attrs.get("fixed_params", {}), **trial.params},
        user_attrs=kept | retry,
    )


def queue_finalist(study: optuna.Study, origin: FrozenTrial, user_attrs: dict[str, Any]) -> None:
    """Queue a trial that has another one's parameters from the start, because it is to choose nothing."""
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=origin.params,
            distributions=origin.distributions,
            user_attrs=user_attrs,
        )
    )


def _retries_after(attributes: Mapping[str, Any], how: str | None) -> int:
    """How many retries in a row have died, the next one included, without a stage or an epoch more."""
    retries: int = attributes.get(RETRIES, 0)
    if how != DIED:
        return retries
    return 1 if _done(attributes) > _done_before(attributes) else retries + 1


def _done(attributes: Mapping[str, Any]) -> tuple[int, int]:
    """How many stages a trial has finished, and how many epochs of the next one."""
    return len(attributes.get(STAGES, ())), epochs_done(attributes)


def _done_before(attributes: Mapping[str, Any]) -> tuple[int, int]:
    return attributes.get(STAGES_BEFORE, -1), attributes.get(EPOCHS_BEFORE, 0)


def drop_if_duplicate(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Fail a retry that two processes queued at the same time, and of which another one came first.

    Returns:
        Whether that was so.
    """
    retry_of = trial.user_attrs.get(RETRY_OF)
    if retry_of is None:
        return False
    twins = [t.number for t in study.get_trials(deepcopy=False) if t.user_attrs.get(RETRY_OF) == retry_of]
    if min(twins) == trial.number:
        return False
    trial.set_user_attr(DUPLICATE_OF, min(twins))
    trial.set_user_attr(REASON, f"trial {min(twins)} is a retry of trial {retry_of} already")
    study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    return True
