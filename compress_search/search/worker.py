"""The loop of one process that runs the trials of a study.

It asks, runs and tells by itself rather than through ``Study.optimize``: there ``n_trials`` counts new
trials, not the study's total, and one failed heartbeat ends the process.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from compress_search.exceptions import (
    DatabaseError,
    LostStageError,
    RatioError,
    StudyError,
    UnreadableStageError,
)
from compress_search.plain_text import without_numbers
from compress_search.progress import Progress
from compress_search.repeating import repeating
from compress_search.results import format_param
from compress_search.search.claims import Claims, claiming
from compress_search.search.history import (
    REASON,
    RETRY_OF,
    TRACEBACK,
    WORKER,
    finished_trials,
    is_finalist,
    pending_finalists,
)
from compress_search.search.recovery import (
    DIED,
    STOPPED,
    drop_if_duplicate,
    interrupt,
    queue_retry,
    recover,
)
from compress_search.search.storage import backend_of
from compress_search.stopping import StopSwitch
from compress_search.worker_process import Worker

logger = logging.getLogger("compress_search")

Objective = Callable[[optuna.Trial], tuple[float, float]]

_TELLING_FAILURES = 3
"""So many first trials that fail alike, or all if a study has fewer, mean that all would."""
_TRACEBACK_LINES = 12
_OF_NO_TRIAL = (LostStageError, UnreadableStageError)
"""Errors of what is stored, for which the trial that meets them is to pay with no place in the total."""
_WAITING_SECONDS = 1.0


def run_trials(
    study: optuna.Study,
    objective: Objective,
    *,
    n_trials: int,
    timeout: float | None = None,
    is_enough: Callable[[Sequence[FrozenTrial]], bool] | None = None,
    progress: Progress,
    stop: StopSwitch,
) -> None:
    """Run trials until the study has ``n_trials`` finished ones.

    Trials that were interrupted, here or elsewhere, are run again and not counted twice. A trial that
    raises is failed with its reason, and the study goes on. Finalists that wait are run beside them.

    Args:
        study: The study.
        objective: Returns the values of a trial.
        n_trials: Total number of finished (complete, pruned or failed) trials of the study; with 0 only
            finalists are run.
        timeout: No trial is begun after so many seconds.
        is_enough: Is asked before each trial, with all that there are; if so, only finalists are run.
        progress: Where to show the trials.
        stop: Is told of signals.

    Raises:
        StudyError: The first trials all failed with the same error, or the database is gone.
        UnreadableStageError: This process cannot read what is stored; its trial is queued again.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the running trial is queued again.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with stop.on_signals():
            _run_trials(study, objective, n_trials, deadline, is_enough or _never, progress)
    except StorageInternalError as error:
        raise StudyError(
            f"The database of the study {study.study_name!r} failed: {error.__cause__ or error}. "
            "What is finished is kept: resume the study when the database can be reached."
        ) from error
    except (KeyboardInterrupt, SystemExit):
        _leave(study, progress)
        raise


def _never(trials: Sequence[FrozenTrial]) -> bool:
    return False


def _leave(study: optuna.Study, progress: Progress) -> None:
    """Queue what this process runs again, so that nobody has to find out that it has ended."""
    this = Worker.this_process().to_dict()
    try:
        with backend_of(study).without_patience():
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get(WORKER) == this:
                    interrupt(study, trial, STOPPED, "the search was stopped")
                    progress.say(
                        f"Stopped. Nothing that is finished is lost, and trial {trial.number} goes on where "
                        "it was when the study is run again."
                    )
    except DatabaseError as error:
        progress.say(f"Stopped while the database is away; nothing that is finished is lost. {error}")


def _run_trials(
    study: optuna.Study,
    objective: Objective,
    n_trials: int,
    deadline: float | None,
    is_enough: Callable[[Sequence[FrozenTrial]], bool],
    progress: Progress,
) -> None:
    database = backend_of(study)
    trials = database.until_answered(lambda: _recovered(study))
    shown, finalists = len(finished_trials(trials)), len(pending_finalists(trials))
    if is_enough(trials):
        n_trials = 0
    if shown >= n_trials and not finalists:
        if n_trials:
            logger.info("The study has %d finished trials, of %d wanted: nothing to do.", shown, n_trials)
        return
    ended_before = frozenset(trial.number for trial in finished_trials(trials))
    with progress.bar("trials", max(n_trials, shown) + finalists, done=shown) as advance:
        while deadline is None or time.monotonic() < deadline:
            step = _next_step(study, n_trials, is_enough)
            for _ in range(shown, step.finished):
                advance("by another process")
            shown = max(shown, step.finished)
            if step.is_over:
                _stop_if_all_fail_alike(study, n_trials, ended_before)
                return
            if step.trial is None:
                # What the others run may still be interrupted, and then it has to be taken over.
                time.sleep(_WAITING_SECONDS)
                continue
            trial = optuna.Trial(study, step.trial)
            if drop_if_duplicate(study, trial):
                continue
            ended = _run(study, trial, objective)
            if ended is None:
                continue
            note, error = ended
            advance(note)
            if is_finalist(trial):
                # Not counted, and not queued again if it failed: settings that ruin every finalist, such as
                # its learning rate, must not stand in the way of the search.
                continue
            shown += 1
            if error is not None:
                _stop_if_all_fail_alike(study, n_trials, ended_before, error)


def _recovered(study: optuna.Study) -> list[FrozenTrial]:
    with claiming(study):
        return recover(study)


@dataclass(frozen=True)
class _Step:
    """What a process found when it asked for a trial.

    Attributes:
        finished: How many trials are finished.
        is_over: Whether nothing is left to do, not even to wait.
        trial: Id of the trial that it claimed, if there was one to claim.
    """

    finished: int
    is_over: bool
    trial: int | None


def _next_step(
    study: optuna.Study, n_trials: int, is_enough: Callable[[Sequence[FrozenTrial]], bool]
) -> _Step:
    """Count the trials, and claim one if there are too few."""
    claimed: list[int] = []

    def step() -> _Step:
        # From the count to the claim nobody else may claim.
        with claiming(study) as claims:
            if claimed and (mine := _claimed_already(study, claimed[-1])) is not None:
                return mine
            trials = recover(study)
            finished, pending = len(finished_trials(trials)), pending_finalists(trials)
            wanted = 0 if is_enough(trials) else n_trials
            if finished >= wanted and not pending:
                return _Step(finished, True, None)
            running = sum(t.state == TrialState.RUNNING and not is_finalist(t) for t in trials)
            only_finalists = finished + running >= wanted
            if only_finalists and all(t.state == TrialState.RUNNING for t in pending):
                return _Step(finished, False, None)
            return _Step(finished, False, _claim(study, claims, claimed, only_finalists=only_finalists))

    return backend_of(study).until_answered(step)


def _claimed_already(study: optuna.Study, trial_id: int) -> _Step | None:
    """Find a trial that was claimed although the database could not say so any more."""
    trial = study._storage.get_trial(trial_id)
    this = Worker.this_process().to_dict()
    if trial.state != TrialState.RUNNING or trial.user_attrs.get(WORKER) != this:
        return None
    return _Step(len(finished_trials(study.get_trials(deepcopy=False))), False, trial_id)


def _claim(study: optuna.Study, claims: Claims, claimed: list[int], *, only_finalists: bool) -> int | None:
    """Take the first waiting trial, or a new one; or else a waiting finalist, if there is still one.

    ``Study.ask`` is not used: it has no heartbeat, so that a process killed right after it would leave a
    trial that runs for ever.

    Args:
        study: The study.
        claims: The right to claim.
        claimed: Gets the ids of the trials that are claimed, before they are.
        only_finalists: Whether nothing else is to be claimed.
    """
    while True:
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if only_finalists:
            waiting = pending_finalists(waiting)
        # What was interrupted goes on first.
        for trial in sorted(waiting, key=lambda t: (RETRY_OF not in t.user_attrs, t.number)):
            claimed.append(trial._trial_id)
            if claims.take(trial._trial_id):
                return trial._trial_id
        if not waiting and only_finalists:
            return None
        if not waiting:
            study.add_trial(create_trial(state=TrialState.WAITING))


def _run(
    study: optuna.Study, trial: optuna.Trial, objective: Objective
) -> tuple[str, BaseException | None] | None:
    """Run one claimed trial to its end.

    Returns:
        A note of how it went, and the error that ended it if it was one. ``None`` if it goes on as another
        trial, because a stored stage was lost, or because this process was paused for so long that another
        one took it over.

    Raises:
        UnreadableStageError: This process cannot read what is stored. Another one may.
    """
    error: BaseException | None = None
    values: tuple[float, float] | None = None
    try:
        with _heartbeat(study, trial):
            try:
                values = objective(trial)
                state = TrialState.COMPLETE
                note = "accuracy {:.4f}, mac_ratio {:.4f}".format(*values)
            except optuna.TrialPruned as pruned:
                state, note = TrialState.PRUNED, str(pruned)
            except RatioError as unreachable:
                # No fault of the run: the sampler is to learn that there is nothing here.
                state, note, error = TrialState.PRUNED, str(unreachable), unreachable
            except (StorageInternalError, UpdateFinishedTrialError, DatabaseError, *_OF_NO_TRIAL):
                raise
            except Exception as raised:
                state, note, error = TrialState.FAIL, f"{type(raised).__name__}: {raised}", raised
                lines = "".join(traceback.format_exception(raised)).splitlines()
                trial.set_user_attr(TRACEBACK, lines[-_TRACEBACK_LINES:])
                logger.error("Trial %d failed.", trial.number, exc_info=raised)
            if values is None:
                trial.set_user_attr(REASON, note)
            study.tell(trial, values, state=state, skip_if_finished=True)
    except UpdateFinishedTrialError:
        logger.info("Trial %d was taken over by another process.", trial.number)
        return None
    except _OF_NO_TRIAL as stored:
        with claiming(study):
            # As if its process had died: a stage that is lost again and again must not hold the study up.
            interrupt(study, study._storage.get_trial(trial._trial_id), DIED, str(stored).rstrip("."))
        if isinstance(stored, UnreadableStageError):
            raise
        return None
    params = ", ".join(f"{name} {format_param(value)}" for name, value in trial.params.items())
    return f"trial {trial.number} ({params}) {state.name.lower()}: {note}", error


def _stop_if_all_fail_alike(
    study: optuna.Study, n_trials: int, ended_before: frozenset[int], error: BaseException | None = None
) -> None:
    """Do not spend the whole budget on one mistake.

    Judged are all trials that ended since this process began, whoever ran them: of many processes none may
    see three ends of its own. The failed trials are queued again, for when the mistake is mended.

    Args:
        study: The study.
        n_trials: Its total. If that is fewer than three, so many are telling.
        ended_before: Numbers of the trials that had ended before.
        error: What ended the last trial of this process, if it has just ended.

    Raises:
        StudyError: All of them, and enough, ended with the same error, numbers aside.
    """
    ends = [t for t in finished_trials(study.get_trials(deepcopy=False)) if t.number not in ended_before]
    kinds = {_kind_of_failure(trial) for trial in ends}
    if len(kinds) != 1 or None in kinds:
        return
    count = "trial" if len(ends) == 1 else f"{len(ends)} trials all"
    if ends[-1].state == TrialState.PRUNED:
        # Of those that are pruned, only what a ratio asks for is the same for all.
        if len(ends) >= _TELLING_FAILURES and isinstance(error, RatioError):
            raise StudyError(f"The first {count} asked for too much: {error}") from error
        return
    # The last trials of a study that has others count as they are: it has an answer.
    if len(ends) < (_TELLING_FAILURES if ended_before else min(_TELLING_FAILURES, n_trials)):
        return
    backend_of(study).until_answered(lambda: _queue_again(study, ends))
    raise StudyError(
        f"The first {count} failed{'' if len(ends) == 1 else ' with the same error'}, so the search was "
        "stopped:\n"
        + "\n".join(f"  {line}" for line in ends[-1].user_attrs[TRACEBACK])
        + "\nMend it and resume the study: what failed is run again."
    ) from error


def _kind_of_failure(trial: FrozenTrial) -> tuple[TrialState, str] | None:
    """What a trial ended with, numbers aside; ``None`` if it is complete, or was not ended by an error."""
    attributes = trial.user_attrs
    if trial.state == TrialState.PRUNED and REASON in attributes:
        return trial.state, without_numbers(attributes[REASON])
    if trial.state == TrialState.FAIL and attributes.get(TRACEBACK):
        return trial.state, without_numbers(attributes[TRACEBACK][-1])
    return None


def _queue_again(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Queue trials again, except those that another process has queued, which judges as this one does."""
    with claiming(study):
        retried = {trial.user_attrs.get(RETRY_OF) for trial in study.get_trials(deepcopy=False)}
        for trial in trials:
            if trial.number not in retried:
                queue_retry(study, trial)


@contextmanager
def _heartbeat(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Say regularly that the trial's process lives, whatever the database answers."""
    database = backend_of(study)

    def beat() -> None:
        try:
            database.record_heartbeat(trial._trial_id)
            # Who looks on now and then misses the heartbeats of those who are gone.
            database.silent_trials(study._study_id)
        except Exception as error:
            logger.warning("The heartbeat of trial %d was not written: %s", trial.number, error)

    with repeating(beat, seconds=database.heartbeat.seconds, name=f"heartbeat of trial {trial.number}"):
        yield
