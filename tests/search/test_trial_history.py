from __future__ import annotations

import dataclasses

import pytest
from optuna.trial import TrialState

from compress_search.exceptions import StudyError
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.search.recovery import DIED, interrupt
from compress_search.search.space import enqueue_anchors
from compress_search.search.trial_history import trial_history
from compress_search.search.worker import run_trials
from compress_search.stopping import StopSwitch
from compress_search.worker_process import Worker


@pytest.fixture
def history(tmp_path):
    def read(study, number):
        return trial_history(study.get_trials(deepcopy=False), number, study="digits", stages=tmp_path)

    return read


def run(study, objective, n_trials):
    run_trials(study, objective, n_trials=n_trials, progress=Progress(), stop=StopSwitch())


def test_a_complete_trial(new_study, make_settings, objective, runner, history, tmp_path):
    study = new_study()
    enqueue_anchors(study, make_settings())
    run(study, objective(runner), 2)
    first = history(study, 0)
    assert (first.state, first.anchor, first.reason) == ("complete", "spatial_svd only", None)
    assert (first.ahead, first.epochs, first.retry_of, first.replaced_by) == ((), None, None, None)
    assert first.worker == Worker.this_process() and not first.worker_gone
    assert first.began <= first.ended
    assert first.folder == tmp_path / first.stages[-1].key
    text = str(first)
    assert text.startswith("Trial 0 is complete.\nAsks for: c_ssvd 0.5, c_cp 1.\nAnchor: spatial_svd only.")
    assert "  spatial_svd: 2.0 s; accuracy 0.6" in text
    assert "  fine_tune after spatial_svd: 2.0 s;" in text
    assert f"stage: {first.folder} (removed)" in text
    first.folder.mkdir()
    assert "(removed)" not in str(first)


def test_a_reused_stage_is_told_from_a_computed_one(new_study, make_settings, objective, runner, history):
    run(new_study("one"), objective(runner), 1)
    again = new_study("two")
    run(again, objective(runner), 1)
    assert "spatial_svd: reused, saved 2.0 s; accuracy" in str(history(again, 0))


def test_a_failed_trial_shows_where_and_how_far_it_was(new_study, make_settings, objective, runner, history):
    def fail(stage):
        if stage.name == "fine_tune":
            runner.before_stage = lambda stage: None
            raise ValueError("no such batch")

    runner.before_stage, runner.epochs = fail, 2
    study, settings = new_study(), make_settings(fine_tune=FineTune(epochs=5))
    run(study, objective(runner, settings), 2)
    failed = history(study, 0)
    assert (failed.state, failed.ahead) == ("failed", ("fine_tune", "channel_pruning", "fine_tune"))
    assert (failed.epochs, failed.of_epochs) == (2, 5)
    text = str(failed)
    assert text.startswith("Trial 0 is failed: ValueError: no such batch.\n")
    assert "  fine_tune: not finished (2 of 5 epochs are done)\n  channel_pruning: not finished\n" in text
    assert text.endswith("ValueError: no such batch")
    assert "The end of its traceback:\n" in text and 'raise ValueError("no such batch")' in text


def test_a_trial_that_was_interrupted_names_its_retry_and_the_other_way_round(
    new_study, make_settings, objective, runner, history
):
    study = new_study()
    study._storage.create_new_trial(study._study_id)
    interrupt(study, study.trials[0], DIED, "its process 7 on there ended")
    run(study, objective(runner), 1)
    died, retry = history(study, 0), history(study, 1)
    assert (died.state, died.interrupted, died.replaced_by) == ("failed", "died", 1)
    assert str(died).startswith("Trial 0 is failed: interrupted: its process 7 on there ended.\n")
    assert "Replaced by trial 1" in str(died)
    assert (retry.state, retry.retry_of, retry.retries) == ("complete", 0, died.retries + 1)
    assert "Retry of trial 0; 1 in a row died" in str(retry)


def test_a_retry_made_needless_by_another_one(study_in_memory, history):
    study = study_in_memory()
    for attributes in ({}, {"retry_of": 0}, {"retry_of": 0, "duplicate_of": 1}):
        trial = study.ask()
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        study.tell(trial, state=TrialState.FAIL)
    assert history(study, 0).replaced_by == 1
    assert "Needless beside trial 1; it does not count." in str(history(study, 2))


def test_a_running_trial_whose_process_is_gone_is_told_from_one_that_runs(study_in_memory, history):
    study = study_in_memory()
    for worker in (Worker.this_process(), dataclasses.replace(Worker.this_process(), started=-1e6)):
        study.ask().set_user_attr("worker", worker.to_dict())
    assert str(history(study, 0)).startswith(f"Trial 0 is running.\nWorker: {Worker.this_process()}.\n")
    gone = str(history(study, 1))
    assert gone.startswith("Trial 1 is running, but its process is gone; resuming the study runs it again.\n")
    assert "(gone)." in gone


def test_finalists_and_their_origins_name_each_other(study_in_memory, history):
    study = study_in_memory()
    for attributes in ({}, {"finalist_of": 0}, {"finalist_of": 0}):
        trial = study.ask()
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
    assert history(study, 0).finalists == (1, 2)
    assert "Trained on by: trials 1, 2." in str(history(study, 0))
    assert "Finalist: trains the model of trial 0 on." in str(history(study, 2))


@pytest.mark.parametrize("number", [2, -1])
def test_an_unknown_number_is_refused_with_those_that_there_are(study_in_memory, history, number):
    study = study_in_memory()
    with pytest.raises(StudyError, match=f"'digits' has no trial {number}; it has none yet"):
        history(study, number)
    for _ in range(2):
        study.ask()
    with pytest.raises(StudyError, match=f"'digits' has no trial {number}; its trials are 0 to 1"):
        history(study, number)
