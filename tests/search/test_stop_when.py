"""A study that ends as soon as a candidate is good enough."""

from __future__ import annotations

import dataclasses
import io

import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from compress_search.exceptions import ConfigError
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.results import Candidate
from compress_search.search.finalists import queue_finalists
from compress_search.search.history import finished_trials
from compress_search.search.settings import SearchSettings
from compress_search.search.space import enqueue_anchors
from compress_search.search.stop_when import StopWhen
from compress_search.search.study import create_study, load_study
from compress_search.search.worker import run_trials
from compress_search.stopping import StopSwitch

FOUND = Candidate(3, "complete", {}, accuracy=0.9, mac_ratio=0.5, drop=0.01, feasible=True)


def changed(**changes):
    return dataclasses.replace(FOUND, **changes)


@pytest.mark.parametrize(
    ("stop_when", "is_met"),
    [
        (StopWhen(max_drop=0.01, mac_ratio=0.5), True),
        (StopWhen(max_drop=0.0099, mac_ratio=0.5), False),
        (StopWhen(max_drop=0.01, mac_ratio=0.4999), False),
        (StopWhen(max_drop=0.01), True),
        (StopWhen(max_drop=0.01 - 1e-17), True),
        (StopWhen(), False),
    ],
)
def test_both_numbers_have_to_be_met_by_one_feasible_candidate(stop_when, is_met):
    assert (stop_when.met_by([FOUND]) is FOUND) == is_met
    assert ("No further trial is begun: trial 3" in stop_when.outlook([FOUND])) == is_met
    assert stop_when.met_by([changed(feasible=False)]) is None
    halves = [changed(drop=0.2, mac_ratio=0.1), changed(drop=-0.1, mac_ratio=0.6)]
    assert StopWhen(max_drop=0.01, mac_ratio=0.5).met_by(halves) is None
    assert 0.98 - 0.97 > 0.01
    assert StopWhen(max_drop=0.01).met_by([changed(drop=0.98 - 0.97)]) is not None
    unfinished = Candidate(4, "running", {})
    assert stop_when.met_by([unfinished]) is None


def test_what_is_asked_for_is_said_in_words():
    both = StopWhen(max_drop=0.01, mac_ratio=0.5)
    wanted = "a drop of 0.01 or less and a mac_ratio of 0.5 or less"
    assert both.outlook([]) == f"It ends as soon as a feasible candidate has {wanted} (stop_when)."
    assert "has a drop of 0.0100 and a mac_ratio of 0.5000; stop_when asks for " + wanted in both.outlook(
        [FOUND]
    )
    assert "a drop of 0 or less (stop_when)" in StopWhen().outlook([])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_drop": "0.01"}, "max_drop is '0.01'; it must be a number"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"max_drop": True}, "max_drop is True"),
        ({"mac_ratio": 0}, r"mac_ratio is 0; it must be in \(0, 1\]"),
        ({"mac_ratio": 1.5}, "mac_ratio is 1.5"),
        ({"mac_ratio": "half"}, "mac_ratio is 'half'"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(values, said):
    with pytest.raises(ConfigError, match=said) as caught:
        StopWhen(**values)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(("target", "low"), [(0.5, "0.49"), ((0.5, 0.8), "0.49")])
def test_a_ratio_below_the_band_is_refused(target, low):
    settings = SearchSettings(target=target)
    StopWhen(mac_ratio=0.5).check(settings)
    StopWhen().check(settings)
    with pytest.raises(ConfigError, match=rf"mac_ratio is 0.4, but feasible candidates have {low} or more"):
        StopWhen(mac_ratio=0.4).check(settings)


def search(study, run, n_trials, enough):
    progress = Progress(Console(file=io.StringIO()))
    run_trials(study, run, n_trials=n_trials, is_enough=enough, progress=progress, stop=StopSwitch())


def test_no_trial_is_begun_once_it_is_enough(new_study, objective, runner, make_settings):
    study = new_study()
    enqueue_anchors(study, make_settings())

    def enough(trials):
        return len(finished_trials(trials)) >= 2

    search(study, objective(runner), 9, enough)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2 + ["WAITING"] * 2
    search(study, objective(runner), 9, enough)
    assert len(finished_trials(study.trials)) == 2
    # A finalist was asked for by itself.
    recipe = Recipe.from_dict(study.trials[0].user_attrs["recipe"])
    queue_finalists(study, {0: Recipe((*recipe.stages, FineTune(epochs=3)))})
    search(study, objective(runner), 9, enough)
    assert study.trials[-1].state.name == "COMPLETE"
    assert len(finished_trials(study.trials)) == 2
    search(study, objective(runner), 3, None)
    assert len(finished_trials(study.trials)) == 3


def test_another_process_ends_as_well(new_study, objective, runner):
    study, other = new_study(), new_study()

    def enough(trials):
        return any("enough" in trial.user_attrs for trial in trials)

    def meanwhile(trial):
        # While this trial runs here, another process finishes one that is enough.
        good = create_trial(state=TrialState.COMPLETE, values=(0.9, 0.5), user_attrs={"enough": True})
        other.add_trial(good)
        return objective(runner)(trial)

    search(study, meanwhile, 9, enough)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2


def test_a_study_that_has_met_it_runs_nothing_more_and_says_why(tiny_task, tmp_path, caplog):
    caplog.set_level("INFO", logger="compress_search")
    quick = {"samples": 16, "fine_tune": FineTune(epochs=1), "tolerance": 0.1, "selection": "uniform"}
    study = create_study("first", tiny_task(), target=0.5, workspace=tmp_path, **quick)
    progress = Progress(Console(file=io.StringIO()))
    stop_when = StopWhen(max_drop=1.0)
    with pytest.raises(ConfigError, match="stop_when.mac_ratio is 0.1, but feasible"):
        study.optimize(9, stop_when=StopWhen(mac_ratio=0.1), progress=progress)
    assert study.candidates() == ()
    study.optimize(9, stop_when=stop_when, progress=progress)
    done = [c for c in study.candidates() if c.state != "waiting"]
    assert sum(candidate.feasible for candidate in done) == 1 and done[-1].feasible
    assert caplog.text.count("No further trial is begun") == 1
    caplog.clear()
    resumed = load_study("first", tiny_task(), workspace=tmp_path)
    resumed.optimize(9, stop_when=stop_when, progress=progress)
    assert [c for c in resumed.candidates() if c.state != "waiting"] == done
    assert f"No further trial is begun: trial {done[-1].number} has a drop of" in caplog.text
    assert f"No further trial is begun: trial {done[-1].number}" in str(resumed.status())
    resumed.optimize(len(done) + 1, progress=progress)
    assert len([c for c in resumed.candidates() if c.state != "waiting"]) == len(done) + 1
    assert "stop_when" not in str(resumed.status())
