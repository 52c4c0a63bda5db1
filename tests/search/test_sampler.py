from __future__ import annotations

import logging

import pytest
from optuna.trial import TrialState

from compress_search.exceptions import ConfigError
from compress_search.search.sampler import SAMPLERS
from compress_search.search.space import ratio_grid


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


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_proposes_points_of_the_grid_without_a_warning(
    name, study_in_memory, make_settings, objective, runner, caplog
):
    settings = make_settings(sampler=name, target=0.33)
    logging.getLogger("optuna").addHandler(caplog.handler)
    study = play(study_in_memory(settings), objective(runner, settings), 30)
    logging.getLogger("optuna").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {first for first, _ in proposals(study)} <= set(ratio_grid(0.33, 0.05))
    assert len({first for first, _ in proposals(study)}) > 5
    assert len(set(proposals(study))) == 30


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_proposals_depend_on_the_seed_and_on_nothing_in_memory(
    name, study_in_memory, make_settings, objective, runner
):
    settings = make_settings(sampler=name)
    whole = play(study_in_memory(settings), objective(runner, settings), 16)
    parts = study_in_memory(settings)
    for _ in range(4):
        parts.sampler = study_in_memory(settings).sampler
        play(parts, objective(runner, settings), 4)
    other = make_settings(sampler=name, seed=1)
    differs = play(study_in_memory(other), objective(runner, other), 16)
    assert proposals(parts) == proposals(whole) != proposals(differs)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_trials_run_again_later_change_no_proposal(name, study_in_memory, make_settings, objective, runner):
    settings = make_settings(sampler=name)
    objective = objective(runner, settings)
    whole = play(study_in_memory(settings), objective, 20)
    # As in a study whose anchors were interrupted: the other anchors come first, then what is run again.
    resumed = play(study_in_memory(settings), objective, 6, interrupted=(1, 3))
    play(resumed, objective, 14)
    assert len(resumed.trials) == 22
    assert proposals(resumed) == proposals(whole)


def test_an_unknown_sampler_is_refused(make_settings):
    with pytest.raises(ConfigError, match="Did you mean 'tpe'?"):
        make_settings(sampler="tp")
