"""Which running trials are taken for dead, and that each comes back once."""

from __future__ import annotations

import dataclasses
import datetime
import os
import subprocess
import sys

import psutil
import pytest
import sqlalchemy
from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.trial import TrialState

from compress_search.search.recovery import drop_if_duplicate, queue_retry, recover
from compress_search.search.storage import backend_of
from compress_search.worker_process import Worker

every_database = pytest.mark.parametrize(
    "database", ["sqlite", "postgresql", pytest.param("mariadb", marks=pytest.mark.slow)], indirect=True
)


def running(study, worker=None):
    """Add a running trial."""
    storage = study._storage
    trial_id = storage.create_new_trial(study._study_id)
    storage.record_heartbeat(trial_id)
    if worker is not None:
        storage.set_trial_user_attr(trial_id, "worker", worker.to_dict())
    return trial_id


def of_parent():
    return Worker.of(psutil.Process(os.getppid()))


def of_ended_process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        worker = Worker.of(psutil.Process(process.pid))
        process.communicate(b"\n")
    return worker


def of_zombie(processes):
    process = subprocess.Popen([sys.executable, "-c", ""])
    processes.append(process)
    worker = Worker.of(psutil.Process(process.pid))
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    return worker


def test_a_process_of_this_machine_is_looked_up(new_study):
    study = new_study()
    processes = []
    dead = [
        running(study, of_ended_process()),
        running(study, of_zombie(processes)),
        running(study, dataclasses.replace(of_parent(), started=-1e6)),
        running(study, Worker.this_process()),
    ]
    alive = [running(study, of_parent())]
    recover(study)
    processes[0].wait()
    trials = {trial._trial_id: trial for trial in study.trials}
    assert [trials[number].state for number in dead] == [TrialState.FAIL] * 4
    assert all("ended in the middle of it" in trials[number].user_attrs["reason"] for number in dead)
    assert [trials[number].state for number in alive] == [TrialState.RUNNING]
    assert [t.user_attrs["retry_of"] for t in study.trials if t.state == TrialState.WAITING] == [0, 1, 2, 3]


class Clock:
    """A clock that stands still until it is told how much later it is."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def beat(study, trial_id, when):
    """Write a heartbeat as if the database's clock said so."""
    with backend_of(study).engine.begin() as connection:
        connection.execute(
            sqlalchemy.update(TrialHeartbeatModel)
            .where(TrialHeartbeatModel.trial_id == trial_id)
            .values(heartbeat=datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=when))
        )


def on_another_machine(study):
    """Two trials, of which nobody here knows whether their processes live."""
    elsewhere = dataclasses.replace(of_ended_process(), host="elsewhere")
    clock = backend_of(study).watch.clock = Clock()
    return clock, [running(study, elsewhere), running(study)]


def states_after(study, clock, seconds, *, every=5.0, beating=(), hours=0.0):
    """Look at the trials for so many seconds; the database's clock is so many hours ahead."""
    for _ in range(int(seconds / every)):
        clock.now += every
        for trial_id in beating:
            beat(study, trial_id, clock.now + 3600 * hours)
        recover(study)
    return [trial.state.name for trial in study.trials[:2]]


@every_database
def test_of_another_machine_only_the_heartbeat_tells(new_study):
    study = new_study()
    clock, (first, _) = on_another_machine(study)
    recover(study)
    assert states_after(study, clock, 60, beating=[first]) == ["RUNNING", "RUNNING"]
    assert states_after(study, clock, 5, beating=[first]) == ["RUNNING", "FAIL"]
    assert states_after(study, clock, 65) == ["FAIL", "FAIL"]
    assert "its process on elsewhere gave no sign of life for 60 s" in study.trials[0].user_attrs["reason"]
    assert "its process gave no sign of life for 60 s" in study.trials[1].user_attrs["reason"]


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_jumps_makes_nobody_dead_and_keeps_nobody_alive(new_study, hours):
    study = new_study()
    clock, (first, second) = on_another_machine(study)
    assert states_after(study, clock, 30, beating=[first, second]) == ["RUNNING", "RUNNING"]
    # Of what is written now the time is an hour away from all that was.
    assert states_after(study, clock, 120, beating=[first], hours=hours) == ["RUNNING", "FAIL"]


def test_the_clock_of_the_machine_may_be_set_while_a_process_runs(monkeypatch):
    worker, boot = Worker.this_process(), psutil.boot_time()
    # The kernel tells of the machine's start by the clock as it is now.
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    process_start = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: process_start(process) + 3600)
    assert not worker.is_known_dead()
    assert Worker.this_process() == worker


def test_who_could_not_look_begins_to_watch_anew(new_study):
    study = new_study()
    clock, _ = on_another_machine(study)
    states_after(study, clock, 50)
    # The database was away, or this process was paused: nobody can be blamed for that.
    clock.now += 3600
    assert states_after(study, clock, 60) == ["RUNNING", "RUNNING"]
    assert states_after(study, clock, 10) == ["FAIL", "FAIL"]


def test_a_retry_has_the_parameters_and_the_anchor_of_its_trial_and_nothing_else(
    new_study, objective, runner
):
    study = new_study()
    study.enqueue_trial({}, user_attrs={"anchor": "guidebook"})
    runner.before_stage = lambda stage: stage.name == "channel_pruning" and pytest.fail("killed")
    trial = study._storage.get_trial(study._pop_waiting_trial_id())
    study._storage.set_trial_user_attr(trial._trial_id, "worker", Worker.this_process().to_dict())
    with pytest.raises(pytest.fail.Exception):
        objective(runner)(optuna_trial(study, trial))
    recover(study)
    failed, retry = study.trials
    assert failed.user_attrs["interrupted"] == "died"
    assert retry.system_attrs["fixed_params"] == failed.params
    assert set(retry.system_attrs) == {"fixed_params", "compress_search:added"}
    assert retry.user_attrs == {"anchor": "guidebook", "retry_of": 0, "retries": 1} | {
        "stages_before": 2,
        "epochs_before": 0,
    }


def test_recovering_twice_or_after_a_half_done_recovery_queues_one_retry(new_study):
    study = new_study()
    trial_id = running(study)
    study._storage.set_trial_user_attr(trial_id, "interrupted", "died")
    study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
    recover(study)
    recover(study)
    assert [t.user_attrs.get("retry_of") for t in study.trials] == [None, 0]


def test_of_two_retries_queued_at_once_the_second_is_dropped(new_study):
    study = new_study()
    running(study, Worker.this_process())
    recover(study)
    queue_retry(study, study.trials[0])
    first, second = (
        optuna_trial(study, study._storage.get_trial(study._pop_waiting_trial_id())) for _ in "ab"
    )
    assert not drop_if_duplicate(study, first)
    assert drop_if_duplicate(study, second)
    assert study.trials[2].user_attrs["reason"] == "trial 1 is a retry of trial 0 already"
    assert [t.state.name for t in study.trials] == ["FAIL", "RUNNING", "FAIL"]


def optuna_trial(study, trial):
    from optuna.trial import Trial

    return Trial(study, trial._trial_id)
