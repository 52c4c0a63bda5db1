from __future__ import annotations

import logging
import sys

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from compress_search.exceptions import ConfigError
from compress_search.search.history import proposal_indices
from compress_search.search.sampler import GRID, SAMPLERS, SPREADING, GenerationsByProposal
from compress_search.search.space import anchors, enqueue_anchors, ratio_grid
from compress_search.search.variables import Choice, Range


def play(study, objective, n, *, interrupted=()):
    """Run trials one by one; those numbered in ``interrupted`` are failed and run again at the end."""
    retries = []
    done = 0
    while done < n or retries:
        number = len(study.get_trials(deepcopy=False))
        if done == n:
            parent = retries.pop()
            study.enqueue_trial(parent.params, user_attrs={"retry_of": parent.number})
        trial = study.ask()
        values = objective(trial)
        done += "retry_of" not in trial.user_attrs
        if number in interrupted:
            study.tell(trial, state=TrialState.FAIL)
            retries.append(trial)
        else:
            study.tell(trial, values)
    return study


def proposals(study):
    return sorted((t.params["c_ssvd"], t.params["c_cp"]) for t in study.trials if t.state.name == "COMPLETE")


SEARCHING = sorted(SAMPLERS.keys() - {GRID})


@pytest.mark.parametrize("name", SEARCHING)
def test_every_sampler_proposes_points_of_the_grid_without_a_warning(
    name, study_in_memory, make_settings, objective, runner, caplog
):
    settings = make_settings(sampler=name, target=0.33)
    logging.getLogger("optuna").addHandler(caplog.handler)
    # A fitted model is slow, so that gp gets fewer trials; the first ten are random with it.
    count = 14 if name == "gp" else 30
    study = play(study_in_memory(settings), objective(runner, settings), count)
    logging.getLogger("optuna").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {first for first, _ in proposals(study)} <= set(ratio_grid(0.33, 0.05))
    assert len({first for first, _ in proposals(study)}) > 5
    assert len(set(proposals(study))) == count


@pytest.mark.parametrize("name", SEARCHING)
def test_proposals_depend_on_the_seed_and_on_nothing_in_memory(
    name, study_in_memory, make_settings, objective, runner
):
    settings = make_settings(sampler=name)
    part = 3 if name == "gp" else 4
    whole = play(study_in_memory(settings), objective(runner, settings), 4 * part)
    parts = study_in_memory(settings)
    for _ in range(4):
        parts.sampler = study_in_memory(settings).sampler
        play(parts, objective(runner, settings), part)
    other = make_settings(sampler=name, seed=1)
    differs = play(study_in_memory(other), objective(runner, other), 4 * part)
    assert proposals(parts) == proposals(whole) != proposals(differs)


@pytest.mark.parametrize("name", SEARCHING)
def test_trials_run_again_later_change_no_proposal(name, study_in_memory, make_settings, objective, runner):
    settings = make_settings(sampler=name)
    objective = objective(runner, settings)
    count = 14 if name == "gp" else 24
    whole = play(study_in_memory(settings), objective, count)
    # As in a study whose anchors were interrupted: the other anchors come first, then what is run again.
    resumed = play(study_in_memory(settings), objective, 6, interrupted=(1, 3))
    play(resumed, objective, count - 6)
    assert len(resumed.trials) == count + 2
    assert proposals(resumed) == proposals(whole)


@pytest.mark.parametrize("name", SEARCHING)
def test_two_workers_of_one_seed_propose_different_points(
    name, study_in_memory, make_settings, objective, runner
):
    settings = make_settings(sampler=name, variables={"fine_tune.lr": Range(1e-4, 1e-1, log=True)})
    study, run = study_in_memory(settings), objective(runner, settings)
    play(study, run, 10)
    points = []
    for _ in range(2):
        # Each worker has a sampler of its own, and neither has finished its trial.
        study.sampler = study_in_memory(settings).sampler
        trial = study.ask()
        run(trial)
        points.append((trial.params["c_cp"], trial.params["fine_tune.lr"]))
    assert points[0][0] != points[1][0] and points[0][1] != points[1][1]


def chosen(study):
    """What the trials chose, in the order of their proposal."""
    trials = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    index = proposal_indices(study.trials)
    return [trial.params for trial in sorted(trials, key=lambda trial: index[trial.number])]


@pytest.mark.parametrize("name", SEARCHING)
def test_a_search_of_a_range_is_the_same_interrupted_or_not_and_its_workers_differ(
    name, study_in_memory, make_settings, objective, runner, caplog
):
    settings = make_settings(sampler=name, target=(0.3, 0.8))
    run, first = objective(runner, settings), len(anchors(settings))
    logging.getLogger("optuna").addHandler(caplog.handler)

    def new():
        study = study_in_memory(settings)
        enqueue_anchors(study, settings)
        return study

    count = first + (2 if name == "gp" else 12)
    whole, parts, interrupted = play(new(), run, count), new(), new()
    for part in (3, first - 1, count - first - 2):
        parts.sampler = study_in_memory(settings).sampler
        play(parts, run, part)
    # All the anchors but these come first; then those two again, then the search.
    play(interrupted, run, first, interrupted=(1, 3))
    play(interrupted, run, count - first)
    assert chosen(whole) == chosen(parts) == chosen(interrupted)
    workers = []
    for _ in range(2):
        whole.sampler = study_in_memory(settings).sampler
        trial = whole.ask()
        run(trial)
        workers.append((trial.params["target"], trial.params["split"]))
    assert workers[0] != workers[1]
    logging.getLogger("optuna").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    searched = [(params["target"], params["split"]) for params in chosen(whole)[first:]]
    # Breeding hands points on.
    assert len(set(searched)) == len(searched) or name == "nsga2"
    if name in ("gp", "nsga2", "tpe"):
        # They look at both together.
        assert trial.relative_search_space.keys() == {"target", "split"}


@pytest.mark.parametrize("name", ["gp", "nsga2", "tpe"])
def test_samplers_that_look_at_variables_together_do_so_beside_anchors(
    name, study_in_memory, make_settings, objective, runner
):
    variables = {"fine_tune.lr": Range(1e-4, 1e-1, log=True), "round_to": Choice((1, 8))}
    settings = make_settings(sampler=name, target=0.33, variables=variables)
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    # In the first twenty, TPE's ratio lies apart, by itself.
    play(study, objective(runner, settings), 20 if name in SPREADING else 11)
    trial = study.ask()
    objective(runner, settings)(trial)
    assert trial.relative_search_space.keys() == {"c_ssvd", "fine_tune.lr", "round_to"}
    # The anchors are in the model: the lowest one asks for the target itself, which is not on the grid.
    assert trial.relative_search_space["c_ssvd"] == FloatDistribution(0.33, 1.0)
    assert trial.params["c_ssvd"] in ratio_grid(0.33, 0.05)[1:]


@pytest.mark.parametrize("name", ["gp", "nsga2", "tpe"])
@pytest.mark.parametrize("target", [0.5, (0.3, 0.8)])
def test_fewer_macs_within_the_tolerance_are_no_merit_but_on_a_front_they_are(
    name, target, study_in_memory, make_settings, objective, runner
):
    settings = make_settings(sampler=name, target=target)
    found = []
    for sign in (1, -1):
        study, run = study_in_memory(settings), objective(runner, settings)
        for _ in range(12 if name == "gp" else 22):
            trial = study.ask()
            accuracy, mac_ratio = run(trial)
            study.tell(trial, (accuracy, sign * mac_ratio))
        found.append(proposals(study))
    assert (found[0] == found[1]) == (target == 0.5)


def test_nsga2_breeds_from_the_better_half(study_in_memory, make_settings, objective, runner):
    settings = make_settings(sampler="nsga2")
    study = play(study_in_memory(settings), objective(runner, settings), 20)
    inner = GenerationsByProposal(population_size=10, seed=0)
    trials = study.get_trials(deepcopy=False)
    assert [inner.get_trial_generation(study, trials[-1]), len(inner.get_population(study, 1))] == [2, 10]
    assert inner.get_parent_population(study, 0) == []
    parents = inner.get_parent_population(study, 2)
    assert len(parents) == 10
    # Whatever no other trial beats is among them.
    best = {trial.number for trial in study.best_trials}
    assert best <= {trial.number for trial in parents}
    assert not any("generation" in key for trial in trials for key in trial.system_attrs)


def test_qmc_fills_the_space_more_evenly_than_chance(study_in_memory, make_settings, objective, runner):
    def gaps(name):
        variables = {"fine_tune.lr": Range(0.001, 1.0)}
        settings = make_settings(sampler=name, variables=variables)
        study = play(study_in_memory(settings), objective(runner, settings), 16)
        return len({int(trial.params["fine_tune.lr"] * 16) for trial in study.trials})

    # Of a Sobol sequence's first 16 points there is one in each sixteenth.
    assert gaps("qmc") == 16 > gaps("random")


@pytest.mark.parametrize("name", ["gp", "qmc"])
def test_a_sampler_whose_package_is_missing_is_refused(name, make_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=f"sampler is '{name}', which needs scipy: pip install scipy"):
        make_settings(sampler=name)


def test_an_unknown_sampler_is_refused(make_settings):
    with pytest.raises(ConfigError, match="Did you mean 'tpe'?"):
        make_settings(sampler="tp")
