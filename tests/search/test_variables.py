"""Settings that are searched: what may be, what each trial makes of it, and what the samplers do with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import warnings

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, TrialState

from compress_search.exceptions import ConfigError, RatioError
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.search.history import ANCHOR
from compress_search.search.recovery import queue_retry
from compress_search.search.sampler import GRID, SAMPLERS
from compress_search.search.settings import SearchSettings, searchable
from compress_search.search.space import enqueue_anchors, propose
from compress_search.search.variables import (
    Choice,
    Range,
    scalar_types,
    suggest,
    value_near,
    variable_faults,
)

VARIABLES = {
    "fine_tune.temperature": Choice((2, 4)),
    "selection": Choice(("optimal", "uniform")),
    "fine_tune.epochs": Range(2, 8, step=3),
    "fine_tune.lr": Range(1e-4, 1e-1, log=True),
    "least_share": Range(0.1, 0.4, step=0.1),
}

# Gaussian processes take ten times as long as all others together.
SEARCHING = [
    pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name
    for name in sorted(SAMPLERS.keys() - {GRID})
]

WHOLE, NUMBER = frozenset({int}), frozenset({float})


def exactly(stages):
    ratio = 1.0
    for stage in stages:
        ratio *= stage.mac_ratio
    return ratio


def stages_of(params, **settings):
    trial = FixedTrial(params)
    return propose(trial, SearchSettings(target=0.5, **settings), exactly).recipe.stages


def test_every_scalar_setting_of_stages_and_fine_tunings_can_be_searched():
    of_tuning = {item.name for item in dataclasses.fields(FineTune)} - {"milestones", "options"}
    own = {"selection", "least_share", "samples", "sensitivity", "scoring_samples", "probes", "on_cell_error"}
    expected = own | {"round_to"} | {f"{g}.{n}" for g in ("fine_tune", "final_fine_tune") for n in of_tuning}
    assert set(searchable()) == expected | {"methods"}


def test_types_are_read_off_the_hints():
    assert scalar_types(int) == WHOLE
    assert scalar_types(float | None) == NUMBER
    assert scalar_types(bool | str) == {bool, str}
    for hint in (tuple[str, ...], FineTune | None, dict[str, float], None):
        assert scalar_types(hint) == frozenset()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"fine_tune.lr": Range(0.1, 0.01)}, "fine_tune.lr has low 0.1 and high 0.01; low must be less"),
        ({"fine_tune.lr": Range(0.1, 0.1)}, "low must be less than high"),
        ({"fine_tune.weight_decay": Range(0, 0.1, log=True)}, "a logarithmic range begins above 0"),
        ({"fine_tune.lr": Range(0.1, 0.5, log=True, step=0.1)}, "give step or log, not both"),
        (
            {"fine_tune.lr": Range(0.1, 0.5, step=0)},
            "step is 0; it must be above 0 and at most high - low, 0.4",
        ),
        ({"fine_tune.lr": Range(0.1, float("inf"))}, "fine_tune.lr.high is inf; it must be a number"),
        ({"fine_tune.lr": Range("a", 1)}, "fine_tune.lr.low is 'a'; it must be a number"),
        ({"fine_tune.lr": Range(0.1, 1, log="yes")}, "fine_tune.lr.log is 'yes'"),
        ({"fine_tune.lr": Range(-1, 1)}, r"^  - fine_tune.lr is -1.0; it must be a positive number\."),
        (
            {"final_fine_tune.momentum": Range(0, 1)},
            r"final_fine_tune.momentum is 1.0; it must be in \[0, 1\)",
        ),
        ({"fine_tune.epochs": Range(0.5, 3)}, "fine_tune.epochs.low is 0.5; it must be a whole number"),
        (
            {"fine_tune.epochs": Choice((1, 2.5))},
            "fine_tune.epochs.choices has 2.5; each must be a whole number",
        ),
        ({"fine_tune.lr": Choice(())}, r"fine_tune.lr.choices is \(\); it must be a list of at least one"),
        ({"selection": Choice("uniform")}, "selection.choices is 'uniform'; it must be a list"),
        ({"selection": Choice(("optimal", None))}, "selection.choices has None; each must be a text"),
        ({"fine_tune.lr": Choice(((0.1,),))}, r"fine_tune.lr.choices has \(0.1,\); each must be a number"),
        ({"fine_tune.lr": Choice((True,))}, "fine_tune.lr.choices has True; each must be a number"),
        ({"fine_tune.lr": Choice((0.1, 0.2, 0.1))}, "has 0.1 twice"),
        ({"selection": Choice(("optimal", "unifrom"))}, "Did you mean 'uniform'?"),
        ({"selection": Range(1, 2)}, "selection is no number, so that it cannot have a range"),
        ({"round_to": Choice((1, 0))}, "round_to is 0"),
        (
            {"fine_tune.lrr": Range(0.1, 1)},
            "'fine_tune.lrr', which is no setting that can be searched. Did you",
        ),
        (
            {"target": Range(0.3, 0.5)},
            "'target', which is no setting that can be searched. There are selection",
        ),
        ({"fine_tune.lr": 0.1}, "fine_tune.lr is to be searched over 0.1; give Range"),
        (["fine_tune.lr"], "variables is .'fine_tune.lr'.; it must be a mapping"),
    ],
)
def test_each_fault_is_named_alone(variables, said):
    with pytest.raises(ConfigError) as caught:
        SearchSettings(target=0.5, variables=variables)
    assert len(caught.value.faults) == 1
    caught.match(f"(?m){said}")


def test_faults_of_variables_come_with_all_others():
    with pytest.raises(ConfigError) as caught:
        SearchSettings(
            target=2, samples=-1, variables={"fine_tune.lr": Range(-1, 0), "samples": Choice((-2, "a"))}
        )
    assert len(caught.value.faults) == 5


def test_settings_with_variables_survive_json_in_one_order():
    settings = SearchSettings(target=0.4, variables=VARIABLES)
    assert SearchSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    turned = SearchSettings(target=0.4, variables=dict(reversed(VARIABLES.items())))
    assert list(turned.variables) == list(settings.variables) == sorted(VARIABLES)


def test_settings_from_before_variables_are_read():
    stored = SearchSettings(target=0.4).to_dict()
    del stored["variables"]
    assert SearchSettings.from_dict(stored) == SearchSettings(target=0.4)


def test_each_kind_of_variable_becomes_its_distribution_and_the_settings_own_type():
    kinds = {"a": (Range(2, 9, step=3), WHOLE), "b": (Range(1, 8.0, log=True), WHOLE)}
    kinds |= {"c": (Range(0, 1, step=0.3), NUMBER), "d": (Range(1e-3, 1, log=True), NUMBER)}
    kinds |= {"e": (Choice((2, 4.0)), NUMBER), "f": (Choice((True, False)), frozenset({bool}))}
    trial = FixedTrial({"a": 5, "b": 3, "c": 0.6, "d": 0.1, "e": 2, "f": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = {name: suggest(trial, name, *kind) for name, kind in kinds.items()}
    assert values == {"a": 5, "b": 3, "c": 0.6, "d": 0.1, "e": 2.0, "f": True}
    assert [type(value) for value in values.values()] == [int, int, float, float, float, bool]
    assert trial.distributions == {
        "a": IntDistribution(2, 8, step=3),
        "b": IntDistribution(1, 8, log=True),
        "c": FloatDistribution(0, 0.9, step=0.3),
        "d": FloatDistribution(1e-3, 1, log=True),
        "e": CategoricalDistribution((2, 4.0)),
        "f": CategoricalDistribution((True, False)),
    }


@pytest.mark.parametrize(
    ("variable", "plain", "types", "value"),
    [
        (Range(1e-4, 1e-1, log=True), 0.02, NUMBER, 0.02),
        (Range(1e-4, 1e-2, log=True), 0.02, NUMBER, 1e-3),
        (Range(0, 0.5), 0.9, NUMBER, 0.25),
        (Range(0.5, 1.0), None, NUMBER, 0.75),
        (Range(0.1, 0.9, step=0.2), 0.65, NUMBER, 0.7),
        (Range(2, 8), 10, WHOLE, 5),
        (Range(1, 16, log=True), 20, WHOLE, 4),
        (Range(2, 9, step=3), 9, WHOLE, 8),
        (Choice((2, 3)), 3.0, NUMBER, 3),
        (Choice(("uniform", "greedy")), "optimal", frozenset({str}), "uniform"),
    ],
)
def test_without_a_search_a_variable_is_as_near_to_the_plain_value_as_it_can(variable, plain, types, value):
    found = value_near(variable, plain, types)
    assert found == pytest.approx(value)
    assert isinstance(found, int) or types != WHOLE


@given(
    st.sampled_from([0.0, 0.1, 1, 2.5]),
    st.floats(0.05, 9),
    st.none() | st.sampled_from([0.05, 0.1, 0.3, 1]),
    st.booleans(),
    st.floats(-20, 20),
)
def test_the_value_without_a_search_is_one_of_the_range(low, width, step, log, plain):
    variable = Range(low, low + width, log=log, step=step)
    assume(not variable_faults("x", variable, NUMBER))
    trial = FixedTrial({"x": value_near(variable, plain, NUMBER)})
    with warnings.catch_warnings():
        # FixedTrial warns of a value that the distribution does not have.
        warnings.simplefilter("error")
        assert suggest(trial, "x", variable, NUMBER) == trial.params["x"]


def test_a_trial_chooses_ratios_first_and_its_stages_have_the_values():
    params = {
        "c_ssvd": 0.8,
        "c_cp": 0.63,
        "fine_tune.lr": 0.003,
        "fine_tune.epochs": 5,
        "selection": "uniform",
    }
    params |= {"fine_tune.temperature": 2, "least_share": 0.2}
    trial = FixedTrial(params)
    seen = []

    def achieved(stages):
        seen.extend(stages)
        return exactly(stages)

    recipe = propose(trial, SearchSettings(target=0.5, variables=VARIABLES), achieved).recipe
    compress = Compress(method="spatial_svd", mac_ratio=0.8, selection="uniform", least_share=0.2)
    tuning = FineTune(epochs=5, lr=0.003, temperature=2.0)
    second = dataclasses.replace(compress, method="channel_pruning", mac_ratio=0.63)
    assert recipe.stages == (compress, tuning, second, tuning)
    # What the first compression achieves depends on its settings, so that they come before.
    assert seen == [compress]
    assert trial.params == params
    assert list(trial.params) == ["c_ssvd", "least_share", "selection", "c_cp", *sorted(VARIABLES)[:3]]
    assert isinstance(recipe.stages[1].temperature, float)


def test_variables_of_the_first_training_are_the_lasts_unless_that_has_its_own():
    params = {"c_ssvd": 0.8, "c_cp": 0.63, "fine_tune.lr": 0.003}
    first = {"fine_tune.lr": Range(1e-3, 1, log=True)}
    last = {"final_fine_tune.lr": Range(1e-3, 1, log=True)}
    plain = FineTune(epochs=7)

    def trainings(extra=None, **settings):
        return stages_of(params | (extra or {}), **settings)[1::2]

    tuned = FineTune(lr=0.003)
    assert trainings(variables=first) == (tuned, tuned)
    assert trainings(variables=first, final_fine_tune=plain) == (tuned, plain)
    both = trainings({"final_fine_tune.lr": 0.5}, variables=first | last, final_fine_tune=plain)
    assert both == (tuned, FineTune(epochs=7, lr=0.5))
    alone = trainings({"final_fine_tune.lr": 0.5}, variables=last, fine_tune=FineTune(epochs=2))
    assert alone == (FineTune(epochs=2), FineTune(epochs=2, lr=0.5))
    epochs = {"fine_tune.epochs": Range(2, 8)}
    # Without a final training of its own, the last one is as the first is in this trial.
    nearly = trainings({"fine_tune.epochs": 3, "final_fine_tune.lr": 0.5}, variables=epochs | last)
    assert nearly == (FineTune(epochs=3), FineTune(epochs=3, lr=0.5))


def test_one_method_has_its_variables_too():
    params = {"c_cp": 0.5, "fine_tune.lr": 0.3, "samples": 64}
    variables = {"fine_tune.lr": Range(0.1, 1), "samples": Choice((64, 128))}
    stages = stages_of(params, methods=("channel_pruning",), variables=variables)
    assert stages == (
        Compress(method="channel_pruning", mac_ratio=0.5, samples=64),
        FineTune(lr=0.3),
    )


def test_a_ratio_that_cannot_be_reached_leaves_all_parameters():
    params = {
        "c_ssvd": 0.55,
        "c_cp": 0.9,
        "fine_tune.lr": 0.003,
        "fine_tune.epochs": 5,
        "selection": "uniform",
    }
    trial = FixedTrial(params | {"fine_tune.temperature": 2, "least_share": 0.2})

    def unreachable(_):
        raise RatioError("no")

    with pytest.raises(RatioError):
        propose(trial, SearchSettings(target=0.5, variables=VARIABLES), unreachable)
    assert set(trial.params) == {"c_ssvd", "c_cp", *VARIABLES}


def test_anchors_record_the_plain_values(study_in_memory, make_settings, objective, runner):
    settings = make_settings(variables=VARIABLES, fine_tune=FineTune(epochs=4, temperature=9.0))
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    for _ in range(4):
        trial = study.ask()
        study.tell(trial, objective(runner, settings)(trial))
        own = {name: value for name, value in trial.params.items() if name in VARIABLES}
        assert own == {
            "fine_tune.lr": 0.02,
            "fine_tune.epochs": 5,
            "fine_tune.temperature": 2,
            "selection": "optimal",
            "least_share": 0.3,
        }
        assert trial.user_attrs[ANCHOR]
        recipe = Recipe.from_dict(trial.user_attrs["recipe"])
        tunings = [stage for stage in recipe.stages if isinstance(stage, FineTune)]
        assert tunings == [FineTune(epochs=5, temperature=2.0)] * len(tunings) != []


def test_an_anchor_that_is_run_again_keeps_the_values_it_had_not_come_to(study_in_memory, make_settings):
    settings = make_settings(variables=VARIABLES)
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    trial = study.ask()
    trial.suggest_float("c_ssvd", 0.5, 0.5)
    study.tell(trial, state=TrialState.FAIL)
    queue_retry(study, study.trials[0])
    fixed = [study.trials[number].system_attrs["fixed_params"] for number in (0, -1)]
    assert fixed[1] == {"c_ssvd": 0.5, **fixed[0]}


@pytest.mark.parametrize("name", SEARCHING)
def test_every_sampler_searches_mixed_variables_and_does_so_again(
    name, study_in_memory, make_settings, objective, runner, caplog
):
    settings = make_settings(sampler=name, variables=VARIABLES)

    def search(parts):
        study = study_in_memory(settings)
        enqueue_anchors(study, settings)
        for n_trials in parts:
            study.sampler = study_in_memory(settings).sampler
            for _ in range(n_trials):
                trial = study.ask()
                study.tell(trial, objective(runner, settings)(trial))
        return [trial.params for trial in study.trials]

    logging.getLogger("optuna").addHandler(caplog.handler)
    params = search([24])
    logging.getLogger("optuna").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert params == search([7, 17])
    searched = params[4:]
    # From so few trials, breeding may lose a value, and TPE see no reason to try it; all others try each one.
    tried = {p["fine_tune.epochs"] for p in searched}
    assert (tried <= {2, 5, 8} and len(tried) > 1) if name in ("nsga2", "tpe") else tried == {2, 5, 8}
    assert {p["fine_tune.temperature"] for p in searched} == {2, 4}
    assert {p["selection"] for p in searched} == {"optimal", "uniform"}
    assert {p["least_share"] for p in searched} <= {0.1, 0.2, 0.3, 0.4}
    if name not in ("gp", "nsga2"):  # One goes to the ends of a range, the other hands values on.
        assert len({p["fine_tune.lr"] for p in searched}) == len(searched)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {GRID}))
def test_the_ratios_first_proposed_do_not_depend_on_the_variables(
    name, study_in_memory, make_settings, objective, runner
):
    found = []
    for variables in ({}, {"fine_tune.lr": Range(1e-12, 1e-9, log=True)}):
        settings = make_settings(sampler=name, variables=variables)
        study = study_in_memory(settings)
        trials = [study.ask() for _ in range(6)]
        for trial in trials:
            objective(runner, settings)(trial)
        found.append([trial.params["c_ssvd"] for trial in trials])
    assert found[0] == found[1]
    rates = [trial.params["fine_tune.lr"] for trial in trials]
    # No digits are lost of numbers that are small.
    assert all(1e-12 < rate < 1e-9 for rate in rates)
    assert all(abs(a / b - 1) > 1e-3 for a, b in itertools.combinations(rates, 2))


def test_a_study_with_variables_shares_the_compression_and_not_the_training(
    study_in_memory, make_settings, objective, runner
):
    settings = make_settings(variables={"fine_tune.lr": Range(1e-3, 1e-1, log=True)})
    study = study_in_memory(settings)
    for rate in (0.01, 0.02):
        study.enqueue_trial({"c_ssvd": 0.8, "c_cp": 0.62, "fine_tune.lr": rate})
        trial = study.ask()
        study.tell(trial, objective(runner, settings)(trial))
    first, second = (trial.user_attrs["stages"] for trial in study.trials)
    assert [stage["reused"] for stage in second] == [True, False, False, False]
    assert first[0]["key"] == second[0]["key"]
