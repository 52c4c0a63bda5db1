"""Which running trials are taken for dead, and that each comes back once."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import psutil
import pytest
from optuna.trial import TrialState

from compress_search.search.recovery import drop_if_duplicate, queue_retry, recover
from compress_search.worker_process import Worker


def running(study, worker=None, *, heartbeat="now"):
    """Add a running trial."""
    storage = study._storage
    trial_id = storage.create_new_trial(study._study_id)
    storage.record_heartbeat(trial_id)
    if heartbeat != "now":
        with storage._backend.engine.begin() as connection:
            query = "UPDATE trial_heartbeats SET heartbeat = ? WHERE trial_id = ?"
            connection.exec_driver_sql(query, (heartbeat, trial_id))
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


OLD = "2020-01-01 00:00:00"


def test_a_process_of_this_machine_is_looked_up(new_study):
    study = new_study()
    processes = []
    dead = [
        running(study, of_ended_process()),
        running(study, of_zombie(processes)),
        running(study, dataclasses.replace(of_parent(), started=1.0)),
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


def test_of_another_machine_only_the_heartbeat_tells(new_study):
    elsewhere = dataclasses.replace(of_ended_process(), host="elsewhere")
    study = new_study()
    running(study, elsewhere)
    running(study)
    running(study, elsewhere, heartbeat=OLD)
    running(study, heartbeat=OLD)
    recover(study)
    assert [t.state.name for t in study.trials[:4]] == ["RUNNING", "RUNNING", "FAIL", "FAIL"]
    assert "its process on elsewhere gave no sign of life" in study.trials[2].user_attrs["reason"]


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
    assert retry.system_attrs == {"fixed_params": failed.params}
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
