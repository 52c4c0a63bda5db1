"""Candidates that are trained on: which, how, and that the search goes on as if they had not been."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from rich.console import Console

from compress_search.exceptions import StudyError
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.results import Candidate, StageResult, pareto_optimal
from compress_search.search.candidates import candidate_of
from compress_search.search.finalists import (
    choose_origins,
    finalist_recipe,
    find_finalist,
    queue_finalists,
)
from compress_search.search.history import (
    FINALIST_OF,
    RECIPE,
    current_trials,
    finished_trials,
    is_finalist,
    pending_finalists,
    proposal_indices,
)
from compress_search.search.sampler import GRID, SAMPLERS
from compress_search.search.space import enqueue_anchors
from compress_search.search.storage import quiet_optuna
from compress_search.search.study import create_study, load_study
from compress_search.search.variables import Range
from compress_search.search.worker import run_trials
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.workspace import Workspace

LONG = FineTune(epochs=9)

# Gaussian processes take ten times as long as all others together.
SEARCHING = [
    pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name
    for name in sorted(SAMPLERS.keys() - {GRID})
]


class Killed(BaseException):
    """Ends a trial without a trace, as a killed process does."""


def quiet():
    return Progress(Console(file=io.StringIO()))


def search(study, objective, n_trials):
    run_trials(study, objective, n_trials=n_trials, progress=quiet(), stop=StopSwitch())


def candidate(number, accuracy, mac_ratio, *, feasible=True, key=None, finalist_of=None):
    stage = StageResult(key or str(number), "fine_tune", accuracy, 1, 1, mac_ratio, 1.0)
    return Candidate(
        number=number,
        state="complete",
        params={},
        stages=(stage,),
        accuracy=accuracy,
        mac_ratio=mac_ratio,
        feasible=feasible,
        finalist_of=finalist_of,
    )


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.booleans()), max_size=10)


@given(rows, st.integers(1, 4))
def test_the_front_comes_first_and_then_what_is_most_accurate(rows, top_k):
    candidates = [
        candidate(i, a, m, feasible=f, finalist_of=0 if of else None) for i, (a, m, f, of) in enumerate(rows)
    ]
    possible = [c for c in candidates if c.feasible and c.finalist_of is None]
    front = pareto_optimal(possible)
    chosen = choose_origins(candidates, top_k)
    assert len(chosen) == min(top_k, len(possible)) == len({c.number for c in chosen})
    assert all(c in possible for c in chosen)
    inside = [c in front for c in chosen]
    assert inside == sorted(inside, reverse=True)
    assert sum(inside) == min(top_k, len(front))
    for group in ([c for c in chosen if c in front], [c for c in chosen if c not in front]):
        accuracies = [c.accuracy for c in group]
        assert accuracies == sorted(accuracies, reverse=True)
        left_out = (
            [c for c in possible if (c in front) == (group[0] in front) and c not in group] if group else []
        )
        assert all(c.accuracy <= accuracies[-1] for c in left_out)


def test_a_model_that_two_trials_ended_as_is_trained_once():
    same = [candidate(0, 0.9, 0.5, key="a"), candidate(1, 0.9, 0.5, key="a"), candidate(2, 0.8, 0.5)]
    assert [c.number for c in choose_origins(same, 3)] == [0, 2]


def test_a_finalist_is_trained_as_its_candidate_was_last():
    compress = Compress(method="spatial_svd", mac_ratio=0.5)
    recipe = Recipe((compress, FineTune(epochs=1, lr=0.1), compress, FineTune(epochs=2, lr=0.3)))
    other = FineTune(epochs=5, lr=0.7)

    def last(recipe, epochs, settings=None):
        longer = finalist_recipe(recipe, epochs=epochs, settings=settings, otherwise=other)
        assert longer.stages[:-1] == recipe.stages
        return longer.stages[-1]

    assert last(recipe, 30) == FineTune(epochs=30, lr=0.3)
    assert last(Recipe((compress,)), 30) == FineTune(epochs=30, lr=0.7)
    assert last(recipe, None, LONG) == LONG
    assert last(recipe, 4, LONG) == dataclasses.replace(LONG, epochs=4)


@pytest.fixture
def finalize(objective, make_settings):
    """Queue finalists of the first trials and run them."""

    def make(study, runner, origins=(0, 1), settings=None):
        trials = study.get_trials()
        recipes = {
            number: Recipe((*Recipe.from_dict(trials[number].user_attrs[RECIPE]).stages, LONG))
            for number in origins
        }
        queue_finalists(study, recipes)
        search(study, objective(runner, settings or make_settings()), 0)
        return [find_finalist(study.trials, number, recipe) for number, recipe in recipes.items()]

    return make


def proposals(study):
    trials = [trial for trial in current_trials(study.trials) if not is_finalist(trial)]
    return [(t.params, t.state.name, t.values, t.user_attrs.get("anchor")) for t in trials]


@pytest.mark.parametrize("name", SEARCHING)
def test_the_search_goes_on_as_if_there_were_no_finalists(
    name, new_study, objective, make_settings, runner, finalize
):
    settings = make_settings(sampler=name, variables={"fine_tune.lr": Range(1e-4, 1, log=True)})
    undisturbed, study = new_study("undisturbed", settings), new_study("finalists", settings)
    for each in (undisturbed, study):
        enqueue_anchors(each, settings)
    search(undisturbed, objective(runner, settings), 16)
    for n_trials, origins in ((3, (0, 2)), (8, (1, 2)), (12, ())):
        search(study, objective(runner, settings), n_trials)
        finalize(study, runner, origins, settings)
    search(study, objective(runner, settings), 16)
    assert len(study.trials) == 19
    assert len(finished_trials(study.trials)) == 16
    assert proposals(study) == proposals(undisturbed)
    assert sorted(proposal_indices(study.trials).values()) == list(range(16))


def test_a_finalist_has_its_candidates_parameters_and_all_that_a_trial_tells(
    new_study, objective, runner, finalize, tmp_path
):
    study = new_study()
    search(study, objective(runner), 2)
    for finalist, origin in zip(finalize(study, runner), study.trials, strict=False):
        assert finalist.params == origin.params and finalist.distributions == origin.distributions
        assert finalist.user_attrs[FINALIST_OF] == origin.number
        assert finalist.constraints == origin.constraints
        assert finalist.values[0] > origin.values[0] and finalist.values[1] == origin.values[1]
        stages = finalist.user_attrs["stages"]
        assert [stage["reused"] for stage in stages] == [True] * (len(stages) - 1) + [False]
        assert finalist.user_attrs["achieved"] == origin.user_attrs["achieved"]
        assert set(origin.user_attrs) <= set(finalist.user_attrs)
        read = candidate_of(finalist, Workspace(tmp_path), None)
        assert read.finalist_of == origin.number and read.feasible


def test_finalists_that_are_there_are_not_queued_again(new_study, objective, runner, finalize):
    study = new_study()
    search(study, objective(runner), 2)
    first = finalize(study, runner)
    assert [t.number for t in finalize(study, runner)] == [t.number for t in first] == [2, 3]
    assert len(study.trials) == 4


@pytest.mark.parametrize("goes_on", ["optimize", "finalize"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
def test_an_interrupted_finalist_is_gone_on_with(
    goes_on, error, new_study, objective, runner, finalize, make_settings
):
    study = new_study()
    search(study, objective(runner), 2)
    begun = []

    def interrupted(stage):
        begun.append(stage)
        if len(begun) == 1:
            raise error

    runner.before_stage = interrupted
    with pytest.raises(error):
        finalize(study, runner)
    study = new_study()
    assert len(pending_finalists(study.trials)) == 2
    if goes_on == "optimize":
        search(study, objective(runner), 2)
    finalists = finalize(study, runner)
    # The one that was interrupted was begun again, and nothing else twice.
    assert begun == [LONG] * 3
    assert [trial.state.name for trial in finalists] == ["COMPLETE"] * 2
    assert [trial.user_attrs[FINALIST_OF] for trial in finalists] == [0, 1]
    assert finalists[0].params == study.trials[0].params
    assert finalists[0].user_attrs["retry_of"] == 2
    assert len(study.trials) == 5 and len(current_trials(study.trials)) == 4


def test_waiting_finalists_are_run_beside_new_trials_and_not_counted(
    new_study, objective, runner, finalize, caplog
):
    study = new_study()
    search(study, objective(runner), 2)
    recipe = Recipe((*Recipe.from_dict(study.trials[0].user_attrs[RECIPE]).stages, LONG))
    queue_finalists(study, {0: recipe})
    with caplog.at_level(logging.INFO, logger="compress_search"):
        search(study, objective(runner), 4)
    assert [is_finalist(trial) for trial in study.trials] == [False, False, True, False, False]
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert "trials 5/5: trial 4" in caplog.text


def test_a_finalist_that_another_process_runs_is_waited_for(
    new_study, objective, runner, finalize, monkeypatch
):
    study = new_study()
    search(study, objective(runner), 1)
    recipe = Recipe((*Recipe.from_dict(study.trials[0].user_attrs[RECIPE]).stages, LONG))
    queue_finalists(study, {0: recipe})
    storage = study._storage
    other = study.trials[1]._trial_id
    storage.record_heartbeat(other)
    storage.set_trial_state_values(other, TrialState.RUNNING)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        storage.set_trial_state_values(other, TrialState.COMPLETE, (0.9, 0.5))

    monkeypatch.setattr("compress_search.search.worker.time.sleep", wait)
    search(study, objective(runner), 0)
    assert len(waits) == 1
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]


def test_finalists_that_failed_are_tried_again_only_when_they_are_asked_for_again(
    new_study, objective, runner, finalize
):
    study = new_study()
    search(study, objective(runner), 3)

    def fail(stage):
        raise ValueError("no memory")

    runner.before_stage = fail
    # Three that fail alike would end a search.
    failed = finalize(study, runner, (0, 1, 2))
    assert [trial.state.name for trial in failed] == ["FAIL"] * 3
    assert "no memory" in failed[0].user_attrs["reason"]
    runner.before_stage = lambda stage: None
    search(study, objective(runner), 4)
    assert [trial.state.name for trial in study.trials[6:]] == ["COMPLETE"]
    assert [trial.number for trial in finalize(study, runner, (0, 1, 2))] == [7, 8, 9]
    assert {trial.state.name for trial in study.trials[7:]} == {"COMPLETE"}


@pytest.fixture
def create(tiny_task, tmp_path):
    def make(**changes):
        options = {"samples": 16, "fine_tune": FineTune(epochs=1), "tolerance": 0.1, "selection": "uniform"}
        with quiet_optuna():
            return create_study("first", tiny_task(), target=0.5, workspace=tmp_path, **options | changes)

    return make


def test_a_finalist_is_never_worse_than_the_candidate_it_comes_from(create, monkeypatch):
    study = create()
    study.optimize(4, progress=quiet())
    scores = []
    score = Task.score

    def recorded(*args):
        scores.append(score(*args))
        return scores[-1]

    monkeypatch.setattr(Task, "score", recorded)
    # A learning rate that hardly any network survives.
    ruin = FineTune(epochs=1, lr=30.0, warmup=0.0, momentum=0.0, gradient_clip=100.0)
    finalists = study.finalize(top_k=2, settings=ruin, progress=quiet())
    monkeypatch.undo()
    origins = {c.number: c for c in study.candidates()}
    assert len(finalists) == 2 and len(scores) == 6
    # Before training, after its only epoch, and of what is kept.
    runs = (scores[:3], scores[3:])
    assert all(kept == max(before, after) for before, after, kept in runs)
    assert any(after < before for before, after, _ in runs)
    for finalist in finalists:
        assert finalist.accuracy >= origins[finalist.finalist_of].accuracy
        assert study.task.score(finalist.load_model()) == finalist.accuracy


def test_finalists_take_part_in_everything_that_a_study_is_asked_for(create, tmp_path, monkeypatch):
    study = create(final_fine_tune=FineTune(epochs=1, lr=1e-6))
    study.optimize(4, progress=quiet())
    before = study.candidates()
    finalists = study.finalize(2, 4, settings=FineTune(lr=0.05), progress=quiet())
    assert [f.finalist_of for f in finalists] == [c.number for c in choose_origins(before, 2)]
    assert [f.number for f in finalists] == [4, 5]
    assert study.candidates() == (*before, *finalists)
    recipe = Recipe.from_dict(study.optuna_study.trials[4].user_attrs[RECIPE])
    assert recipe.stages[-1] == FineTune(epochs=4, lr=0.05)
    best = study.best()
    # The candidates were hardly trained, so that a longer training is worth something.
    assert best in finalists and best in study.front().best
    status = study.status()
    assert status.finished == 4 and status.finalists == {"complete": 2}
    assert "4 of 4 trials finished (4 complete)" in str(status) and "Finalists: 2 complete." in str(status)
    files = study.report(best)
    page = files.page.read_text(encoding="utf-8")
    assert f"(finalist of trial {finalists[0].finalist_of})" in page
    assert "4 trials: 4 complete; " in page and "Finalists: 2 complete." in page
    table = list(csv.DictReader(io.StringIO(files.table.read_text(encoding="utf-8"))))
    assert [row["finalist_of"] for row in table] == [""] * 4 + [str(f.finalist_of) for f in finalists]
    assert "finalist of" in str(study.front())

    loaded = load_study("first", study.task, workspace=tmp_path)
    monkeypatch.setattr(Task, "score", lambda *_: pytest.fail("evaluated"))
    assert loaded.finalize(2, 4, settings=FineTune(lr=0.05)) == finalists
    assert loaded.optuna_study.user_attrs["n_trials"] == 4


def test_by_default_a_finalist_keeps_the_last_learning_rate_for_thirty_epochs(create, monkeypatch):
    study = create(fine_tune=FineTune(epochs=0), variables={"final_fine_tune.lr": Range(0.001, 0.1)})
    study.optimize(1, progress=quiet())
    queued = []
    module = "compress_search.search.compression_study"
    monkeypatch.setattr(f"{module}.queue_finalists", lambda _, recipes: queued.append(recipes))
    assert study.finalize() == ()
    assert queued[0][0].stages[-1] == FineTune(epochs=30, lr=FineTune().lr)


def test_what_cannot_be_finalized_is_refused_before_anything_is_queued(create, tmp_path):
    study = create(tolerance=1e-6)
    for changes, said in (
        ({"top_k": 0}, "top_k is 0; it is the number of finalists and must be 1 or more"),
        ({"epochs": 0}, "epochs is 0; finalists are trained, so it must be 1 or more"),
        ({"settings": FineTune(epochs=0)}, "epochs is 0; finalists are trained"),
        ({}, r"No candidate is complete with a mac_ratio in .* Run more trials, or widen the tolerance"),
    ):
        with pytest.raises(StudyError, match=said):
            study.finalize(**changes)
    with pytest.raises(StudyError, match="without its task, which finalize needs"):
        load_study("first", workspace=tmp_path).finalize()
    assert study.optuna_study.trials == []
