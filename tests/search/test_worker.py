"""The loop: budget, failures, and interruptions at every point."""

from __future__ import annotations

import io
import itertools
import os
import signal
import threading

import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState, create_trial
from rich.console import Console

from compress_search.exceptions import LostStageError, StudyError, UnreadableStageError
from compress_search.progress import Progress
from compress_search.search import worker
from compress_search.search.heartbeats import Heartbeat
from compress_search.search.history import current_trials, finished_trials
from compress_search.search.recovery import MOST_RETRIES
from compress_search.search.space import enqueue_anchors
from compress_search.search.storage import backend_of
from compress_search.search.worker import run_trials
from compress_search.stopping import StopSwitch
from compress_search.worker_process import Worker

every_database = pytest.mark.parametrize(
    "database", ["sqlite", "postgresql", pytest.param("mariadb", marks=pytest.mark.slow)], indirect=True
)


class Killed(BaseException):
    """Ends a run as kill -9 does: nobody catches it, so that nothing is tidied up."""


def search(study, objective, n_trials, **options):
    progress = Progress(Console(file=io.StringIO()))
    run_trials(study, objective, n_trials=n_trials, progress=progress, stop=StopSwitch(), **options)


def states(study):
    return [trial.state.name for trial in study.trials]


def outcome(study):
    """What a study found, by proposal rather than by trial."""
    return sorted((t.state.name, tuple(t.params.items()), t.values) for t in current_trials(study.trials))


def counting(runner, *, stop_at=(), error=KeyboardInterrupt):
    """Let the runner count the stages it computes, and raise before those numbered in ``stop_at``."""
    runner.begun = []

    def before_stage(stage):
        runner.begun.append(stage)
        if len(runner.begun) in stop_at:
            raise error

    runner.before_stage = before_stage
    return runner


def test_the_total_is_of_finished_trials(new_study, objective, runner):
    study = new_study()
    search(study, objective(runner), 3)
    assert states(study) == ["COMPLETE"] * 3
    search(new_study(), objective(runner), 5)
    assert states(study) == ["COMPLETE"] * 5


def test_a_finished_study_runs_nothing(new_study, objective, runner):
    study = new_study()
    search(study, objective(runner), 3)
    search(study, lambda trial: pytest.fail("ran"), 3)
    search(study, lambda trial: pytest.fail("ran"), 2)
    assert len(study.trials) == 3


@every_database
def test_the_trials_are_proposed_under_a_heartbeat_and_say_who_runs_them(new_study, objective, runner):
    study = new_study()
    with_heartbeat = []

    def look(trial):
        with study._storage._backend.engine.connect() as connection:
            query = "SELECT COUNT(*) FROM trial_heartbeats WHERE trial_id = :id"
            with_heartbeat.append(connection.scalar(sqlalchemy.text(query), {"id": trial._trial_id}))
        assert trial.user_attrs["worker"] == Worker.this_process().to_dict()
        return objective(runner)(trial)

    search(study, look, 2)
    assert with_heartbeat == [1, 1]


def test_an_error_fails_its_trial_and_no_other(new_study, objective, runner, caplog):
    def faulty(trial):
        if trial.number == 1:
            raise ZeroDivisionError("one over nothing")
        return objective(runner)(trial)

    study = new_study()
    search(study, faulty, 4)
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    told = study.trials[1].user_attrs
    assert told["reason"] == "ZeroDivisionError: one over nothing"
    assert told["traceback"][-1] == "ZeroDivisionError: one over nothing"
    assert "in faulty" in "".join(told["traceback"])
    assert "Trial 1 failed" in caplog.text


def test_a_gate_and_an_unreachable_ratio_prune_with_the_reason(new_study, objective, runner, make_settings):
    settings = make_settings(max_drop_after_ssvd=0.02)
    runner.lowest = 0.6
    study = new_study()
    enqueue_anchors(study, settings)
    search(study, objective(runner, settings), 4)
    assert states(study) == ["PRUNED", "PRUNED", "PRUNED", "COMPLETE"]
    reasons = [trial.user_attrs.get("reason", "") for trial in study.trials]
    assert "cannot be reached" in reasons[0] and "cannot be reached" in reasons[1]
    assert "max_drop_after_ssvd" in reasons[2]
    assert all(set(trial.params) == {"c_ssvd", "c_cp"} for trial in study.trials)


def test_three_first_failures_alike_stop_the_search_and_are_run_again_later(new_study, objective, runner):
    def broken(trial):
        raise OSError(f"no file number {trial.number}")

    study = new_study()
    with pytest.raises(StudyError, match="same error(.|\n)*no file number 2"):
        search(study, broken, 8)
    assert states(study) == ["FAIL"] * 3 + ["WAITING"] * 3
    search(study, objective(runner), 8)
    assert len(finished_trials(study.trials)) == 8
    assert [trial.state.name for trial in current_trials(study.trials)] == ["COMPLETE"] * 8


@pytest.mark.parametrize("n_trials", [1, 2])
def test_a_study_of_fewer_trials_is_stopped_when_all_of_them_failed(new_study, objective, runner, n_trials):
    def broken(trial):
        raise OSError(f"no file number {trial.number}")

    study = new_study()
    with pytest.raises(StudyError, match=r"what failed is run again"):
        search(study, broken, n_trials)
    assert states(study) == ["FAIL"] * n_trials + ["WAITING"] * n_trials
    search(study, objective(runner), n_trials)
    assert [trial.state.name for trial in current_trials(study.trials)] == ["COMPLETE"] * n_trials


def test_the_last_trials_of_a_study_that_has_others_count_though_they_failed(new_study, objective, runner):
    def broken(trial):
        raise OSError("no file")

    study = new_study()
    search(study, objective(runner), 3)
    search(study, broken, 5)
    assert states(study) == ["COMPLETE"] * 3 + ["FAIL"] * 2
    with pytest.raises(StudyError, match="The first 3 trials all failed with the same error"):
        search(study, broken, 9)


def failed_elsewhere(study, number):
    lines = ["Traceback (most recent call last):", f"OSError: no file number {number}"]
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"traceback": lines, "reason": lines[-1]}))


def test_what_failed_alike_in_other_processes_counts_too(new_study, objective, runner):
    def broken(trial):
        failed_elsewhere(study, trial.number)
        raise OSError(f"no file number {trial.number}")

    study = new_study()
    with pytest.raises(StudyError, match="The first 4 trials all failed with the same error"):
        search(study, broken, 6)
    assert states(study).count("FAIL") == states(study).count("WAITING") == 4
    search(study, objective(runner), 6)
    assert [trial.state.name for trial in current_trials(study.trials)] == ["COMPLETE"] * 6


def test_a_process_that_ran_nothing_does_not_leave_a_study_that_failed_alike_as_it_is(
    new_study, objective, runner, monkeypatch
):
    study = new_study()
    other = study._storage.create_new_trial(study._study_id)
    study._storage.record_heartbeat(other)

    def wait(seconds):
        study._storage.set_trial_user_attr(other, "traceback", ["OSError: no file"])
        study._storage.set_trial_state_values(other, TrialState.FAIL)

    monkeypatch.setattr(worker.time, "sleep", wait)
    with pytest.raises(StudyError, match="The first trial failed, so the search was stopped:\n  OSError: no"):
        search(study, lambda trial: pytest.fail("ran"), 1)
    assert states(study) == ["FAIL", "WAITING"]


def test_what_another_process_queues_again_is_not_queued_twice(new_study, monkeypatch):
    def broken(trial):
        raise OSError("no file")

    study = new_study()
    again = worker._queue_again
    monkeypatch.setattr(worker, "_queue_again", lambda *args: (again(*args), again(*args)))
    with pytest.raises(StudyError, match="same error"):
        search(study, broken, 8)
    assert states(study) == ["FAIL"] * 3 + ["WAITING"] * 3


def test_first_failures_that_differ_do_not_stop_it(new_study, objective, runner):
    errors = [OSError("a"), OSError("b"), OSError("b")]

    def broken(trial):
        if errors:
            raise errors.pop()
        return objective(runner)(trial)

    study = new_study()
    search(study, broken, 5)
    assert states(study) == ["FAIL"] * 3 + ["COMPLETE"] * 2


def test_a_target_that_no_trial_reaches_stops_the_search(new_study, objective, runner):
    runner.lowest = 1.0
    with pytest.raises(StudyError, match="all asked for too much(.|\n)*cannot be reached"):
        search(new_study(), objective(runner), 8)


def test_a_trial_whose_stored_stage_is_lost_is_run_again_and_not_counted(
    new_study, objective, runner, caplog
):
    caplog.set_level("INFO", logger="compress_search")
    counting(runner, stop_at=(1, 5, 6), error=LostStageError("The stored stage abc is gone (no file)."))
    study = new_study()
    search(study, objective(runner), 3)
    assert [trial.state.name for trial in current_trials(study.trials)] == ["COMPLETE"] * 3
    assert states(study).count("FAIL") == 3
    assert study.trials[0].user_attrs["reason"] == "interrupted: The stored stage abc is gone (no file)"
    assert "Trial 0 was interrupted: The stored stage abc is gone (no file)." in caplog.text


def test_a_trial_whose_stored_stage_is_lost_again_and_again_is_left_failed(new_study, objective, runner):
    study = new_study()
    counting(runner, stop_at=range(1, MOST_RETRIES + 2), error=LostStageError("It is gone."))
    search(study, objective(runner), 2)
    assert states(study) == ["FAIL"] * (MOST_RETRIES + 1) + ["COMPLETE"]
    assert "so did 3 retries without an epoch more" in study.trials[MOST_RETRIES].user_attrs["reason"]


def test_what_cannot_be_read_ends_the_process_and_not_the_trial(new_study, objective, runner):
    study = new_study()
    counting(runner, stop_at=(2,), error=UnreadableStageError("'abc' cannot be read (EMFILE)."))
    with pytest.raises(UnreadableStageError, match="cannot be read"):
        search(study, objective(runner), 2)
    assert states(study) == ["FAIL", "WAITING"]
    search(study, objective(runner), 2)
    assert [trial.state.name for trial in current_trials(study.trials)] == ["COMPLETE"] * 2


N_TRIALS = 12
_UNDISTURBED = []


@pytest.fixture
def undisturbed(new_study, objective, runner, make_settings):
    """What an undisturbed study finds, and how many stages it computes; found out once."""
    if not _UNDISTURBED:
        study = new_study("undisturbed")
        enqueue_anchors(study, make_settings())
        counting(runner)
        search(study, objective(runner), N_TRIALS)
        _UNDISTURBED.extend((outcome(study), len(runner.begun)))
    return tuple(_UNDISTURBED)


@pytest.mark.parametrize(
    ("database", "error", "stop_at"),
    [
        *(
            ("sqlite", error, stop_at)
            for error in (KeyboardInterrupt, Killed)
            for stop_at in ((1,), (2, 3, 9), (24, 26))
        ),
        ("sqlite", SystemExit, (7,)),
        ("postgresql", Killed, (2, 3, 9)),
        pytest.param("mariadb", Killed, (2, 3, 9), marks=pytest.mark.slow),
    ],
    indirect=["database"],
)
def test_a_resumed_study_is_the_undisturbed_one(
    error, stop_at, new_study, objective, make_settings, undisturbed, runner
):
    runner = counting(type(runner)(), stop_at=stop_at, error=error)
    for _ in stop_at:
        study = new_study()
        enqueue_anchors(study, make_settings())
        with pytest.raises(error):
            search(study, objective(runner), N_TRIALS)
    study = new_study()
    search(study, objective(runner), N_TRIALS)
    expected, stages = undisturbed
    assert outcome(study) == expected
    # Only the stages that were under way had to be computed again.
    assert len(runner.begun) == stages + len(stop_at)
    assert len(study.trials) == N_TRIALS + len(stop_at)
    assert {"RUNNING", "WAITING"}.isdisjoint(states(study))


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize(
    ("method", "call"),
    [
        *(("set_trial_state_values", call) for call in (2, 11)),
        *(("set_trial_user_attr", call) for call in (1, 70)),
        *(("set_trial_param", call) for call in (2, 11)),
    ],
)
def test_an_interruption_between_two_writes_changes_nothing_either(
    error, method, call, new_study, objective, make_settings, undisturbed, runner, monkeypatch
):
    study = new_study()
    enqueue_anchors(study, make_settings())
    write = getattr(study._storage, method)
    calls = itertools.count(1)

    def interrupted(*args):
        write(*args)
        if next(calls) == call:
            raise error
        return True

    monkeypatch.setattr(study._storage, method, interrupted)
    with pytest.raises(error):
        search(study, objective(runner), N_TRIALS)
    study = new_study()
    search(study, objective(runner), N_TRIALS)
    assert outcome(study) == undisturbed[0]


def test_anchors_are_queued_once_even_if_that_was_interrupted(new_study, make_settings):
    settings = make_settings()
    study = new_study()
    enqueue_anchors(study, settings)
    wanted = [trial.user_attrs["anchor"] for trial in study.trials]
    half = new_study("half")
    half.enqueue_trial({}, user_attrs={"anchor": wanted[0]})
    for _ in range(2):
        enqueue_anchors(half, settings)
        enqueue_anchors(study, settings)
    assert [trial.user_attrs["anchor"] for trial in half.trials] == wanted
    assert len(study.trials) == len(wanted) == 4


def test_a_trial_that_kills_its_process_again_and_again_is_left_failed(new_study, objective, runner):
    counting(runner, stop_at=range(1, MOST_RETRIES + 2), error=Killed)
    for _ in range(MOST_RETRIES + 1):
        with pytest.raises(Killed):
            search(new_study(), objective(runner), 2)
    study = new_study()
    search(study, objective(runner), 2)
    assert states(study) == ["FAIL"] * (MOST_RETRIES + 1) + ["COMPLETE"]
    assert "so did 3 retries without an epoch more" in study.trials[MOST_RETRIES].user_attrs["reason"]
    assert len(finished_trials(study.trials)) == 2


def test_a_trial_that_goes_on_a_stage_each_time_is_never_given_up(new_study, objective, runner):
    counting(runner, stop_at=(1, 2, 4, 5, 7, 8), error=Killed)
    for _ in range(6):
        with pytest.raises(Killed):
            search(new_study(), objective(runner), 1)
    study = new_study()
    search(study, objective(runner), 1)
    assert states(study) == ["FAIL"] * 6 + ["COMPLETE"]


def test_a_trial_that_goes_on_an_epoch_each_time_is_never_given_up(new_study, objective, runner):
    deaths = 2 * MOST_RETRIES
    for epochs in range(1, deaths + 1):
        # The stage that runs has done one epoch more each time, and is killed in the next one.
        runner.epochs, runner.before_stage = epochs, dying
        with pytest.raises(Killed):
            search(new_study(), objective(runner), 1)
    runner.before_stage = lambda stage: None
    study = new_study()
    search(study, objective(runner), 1)
    assert states(study) == ["FAIL"] * deaths + ["COMPLETE"]
    assert [t.user_attrs.get("epochs_before") for t in study.trials] == [None, *range(1, deaths + 1)]


def test_a_trial_that_comes_no_further_in_its_epochs_is_given_up(new_study, objective, runner):
    # Dying early in one retry does not make the next one's old epochs count as new.
    for epochs in (3, 2, 3, 1):
        runner.epochs, runner.before_stage = epochs, dying
        with pytest.raises(Killed):
            search(new_study(), objective(runner), 1)
    study = new_study()
    search(study, objective(runner), 1)
    assert states(study) == ["FAIL"] * 4
    assert "without an epoch more" in study.trials[3].user_attrs["reason"]


def dying(stage):
    raise Killed


def test_what_was_interrupted_goes_on_first(new_study, objective, runner, make_settings):
    study = new_study()
    enqueue_anchors(study, make_settings())
    counting(runner, stop_at=(1,), error=Killed)
    with pytest.raises(Killed):
        search(study, objective(runner), 2)
    search(study, objective(runner), 1)
    (first,) = finished_trials(study.trials)
    assert first.user_attrs["retry_of"] == 0


def test_stopping_tells_which_trial_goes_on(new_study, objective, runner, caplog):
    caplog.set_level("INFO", logger="compress_search")
    counting(runner, stop_at=(2,), error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        search(new_study(), objective(runner), 1)
    assert "Nothing that is finished is lost, and trial 0 goes on where it was" in caplog.text


def test_stopping_a_search_is_not_held_against_the_trial(new_study, objective, runner):
    counting(runner, stop_at=range(1, 2 * MOST_RETRIES), error=KeyboardInterrupt)
    for _ in range(1, 2 * MOST_RETRIES):
        with pytest.raises(KeyboardInterrupt):
            search(new_study(), objective(runner), 1)
    study = new_study()
    search(study, objective(runner), 1)
    assert states(study)[-1] == "COMPLETE"
    assert study.trials[0].user_attrs["reason"] == "interrupted: the search was stopped"


def test_sigterm_stops_like_ctrl_c_and_its_handler_is_put_back(new_study):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(trial):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    study = new_study()
    with pytest.raises(KeyboardInterrupt):
        search(study, terminated, 1)
    assert states(study) == ["FAIL", "WAITING"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_search_runs_outside_of_the_main_thread(new_study, objective, runner):
    study = new_study()
    thread = threading.Thread(target=search, args=(study, objective(runner), 1))
    thread.start()
    thread.join()
    assert states(study) == ["COMPLETE"]


def test_no_trial_is_begun_after_the_timeout(new_study, objective, runner):
    study = new_study()
    search(study, objective(runner), 3, timeout=0)
    assert states(study) == []


def test_a_heartbeat_that_fails_does_not_end_the_trial(new_study, objective, runner, monkeypatch, caplog):
    study = new_study(heartbeat=Heartbeat(0.01, 1.0))
    beat = threading.Event()

    def fail(trial_id):
        beat.set()
        raise StorageInternalError("away")

    def slow(trial):
        monkeypatch.setattr(backend_of(study), "record_heartbeat", fail)
        assert beat.wait(10)
        return objective(runner)(trial)

    search(study, slow, 1)
    assert states(study) == ["COMPLETE"]
    assert "heartbeat of trial 0 was not written: away" in caplog.text


def test_a_trial_that_another_process_took_over_is_dropped(new_study, objective, runner):
    study = new_study()

    def paused(trial):
        if trial.number == 0:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return objective(runner)(trial)

    search(study, paused, 3)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_the_last_trial_of_another_process_is_waited_for(new_study, objective, runner, monkeypatch):
    study = new_study()
    other = study._storage.create_new_trial(study._study_id)
    study._storage.record_heartbeat(other)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        study._storage.set_trial_state_values(other, TrialState.COMPLETE, (0.9, 0.5))

    monkeypatch.setattr(worker.time, "sleep", wait)
    search(study, objective(runner), 2)
    assert states(study) == ["COMPLETE", "COMPLETE"]
    assert len(waits) == 1


def test_a_database_that_fails_ends_the_search_with_a_clear_error(new_study, objective, runner):
    def away(trial):
        raise StorageInternalError("the server closed the connection")

    study = new_study()
    with pytest.raises(StudyError, match=r"database of the study 'study' failed: the server closed"):
        search(study, away, 2)
    search(study, objective(runner), 2)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
