from __future__ import annotations

import itertools
import math
import warnings

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import FixedTrial, TrialState

from compress_search.exceptions import RatioError
from compress_search.recipe import Compress, FineTune
from compress_search.search.history import ANCHOR, RETRY_OF
from compress_search.search.settings import SearchSettings
from compress_search.search.space import (
    anchors,
    enqueue_anchors,
    last_ratio_range,
    propose,
    ratio_grid,
    trials_in_reach,
)
from compress_search.search.variables import Choice


def fixed(params, **user_attrs):
    trial = FixedTrial(params)
    for name, value in user_attrs.items():
        trial.set_user_attr(name, value)
    return trial


def exactly(stages):
    return math.prod(stage.mac_ratio for stage in stages)


def test_the_grid_has_the_target_and_one_and_round_numbers_between():
    assert ratio_grid(0.5, 0.1) == (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert ratio_grid(0.33, 0.05)[:4] == (0.33, 0.35, 0.4, 0.45)
    assert ratio_grid(0.97, 0.05) == (0.97, 1.0)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.5))
def test_grids_ascend_within_their_ends_and_are_shared_between_targets(target, step):
    grid = ratio_grid(target, step)
    assert grid[0] == target and grid[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(grid))
    assert set(grid[1:]) <= set(ratio_grid(target / 2, step))


def test_anchors_of_two_methods(make_settings):
    points = {anchor.label: anchor.ratio for anchor in anchors(make_settings())}
    assert points == {
        "spatial_svd only": 0.5,
        "channel_pruning only": 1.0,
        "equal ratios": 0.7,
        "guidebook": 0.75,
    }


@pytest.mark.parametrize(("target", "count"), [(0.6, 3), (0.8, 3), (0.97, 2), (0.1, 4)])
def test_anchors_come_once_each_and_lie_on_the_grid(make_settings, target, count):
    points = [anchor.ratio for anchor in anchors(make_settings(target=target))]
    assert len(set(points)) == len(points) == count
    assert set(points) <= set(ratio_grid(target, 0.05))


def test_the_anchor_of_one_method_is_the_target(make_settings):
    settings = make_settings(methods=("channel_pruning",))
    assert [anchor.ratio for anchor in anchors(settings)] == [0.5]


def test_the_last_ratio_is_what_is_missing():
    assert last_ratio_range(0.5, 0.02, 0.8) == pytest.approx((0.495 / 0.8, 0.51 / 0.8))
    assert last_ratio_range(0.5, 0.02, 0.8, exact=True) == (0.625, 0.625)
    assert last_ratio_range(0.5, 0.02, 0.51) == (1.0, 1.0)
    assert last_ratio_range(0.5, 0.02, 0.4, exact=True) == (1.0, 1.0)


@pytest.mark.parametrize("anchor", ["spatial_svd only", "channel_pruning only", "equal ratios", "guidebook"])
def test_every_anchor_has_both_parameters_and_meets_the_target_exactly(make_settings, anchor):
    settings = make_settings()
    ratio = {a.label: a.ratio for a in anchors(settings)}[anchor]
    trial = fixed({"c_ssvd": ratio, "c_cp": 0.5 / ratio}, **{ANCHOR: anchor})
    proposal = propose(trial, settings, exactly)
    assert set(trial.params) == {"c_ssvd", "c_cp"}
    assert exactly([s for s in proposal.recipe.stages if isinstance(s, Compress)]) == pytest.approx(0.5)


def test_the_second_ratio_follows_what_the_first_achieved(make_settings):
    trial = fixed({"c_ssvd": 0.75, "c_cp": 0.5 / 0.7}, **{ANCHOR: "guidebook"})
    stages = propose(trial, make_settings(), lambda stages: 0.7).recipe.stages
    assert stages[2].mac_ratio == 0.5 / 0.7


def test_a_recipe_compresses_and_trains_twice_with_the_gate_between(make_settings):
    passed_on = {"ignore": ("head",), "round_to": 4, "keep_channels": {"stem": (0, 3)}}
    passed_on["per_layer_fine_tune"] = FineTune(epochs=2)
    settings = make_settings(final_fine_tune=FineTune(epochs=7), samples=3, **passed_on)
    proposal = propose(fixed({"c_ssvd": 0.8, "c_cp": 0.63}), settings, exactly)
    assert proposal.recipe.stages == (
        Compress(method="spatial_svd", mac_ratio=0.8, samples=3, **passed_on),
        FineTune(epochs=1),
        Compress(method="channel_pruning", mac_ratio=0.63, samples=3, **passed_on),
        FineTune(epochs=7),
    )
    assert proposal.gate_after == 2


@pytest.mark.parametrize(
    ("params", "method"),
    [({"c_ssvd": 1.0, "c_cp": 0.5}, "channel_pruning"), ({"c_ssvd": 0.51, "c_cp": 1.0}, "spatial_svd")],
)
def test_a_ratio_of_one_leaves_its_half_out_and_the_last_training_is_the_final_one(
    make_settings, params, method
):
    settings = make_settings(final_fine_tune=FineTune(epochs=7), step=0.49)
    proposal = propose(fixed(params), settings, exactly)
    assert [stage.name for stage in proposal.recipe.stages] == [method, "fine_tune"]
    assert proposal.recipe.stages[-1] == FineTune(epochs=7)
    assert proposal.gate_after is None


def test_training_for_no_epochs_is_no_stage(make_settings):
    settings = make_settings(fine_tune=FineTune(epochs=0))
    proposal = propose(fixed({"c_ssvd": 0.8, "c_cp": 0.63}), settings, exactly)
    assert [stage.name for stage in proposal.recipe.stages] == ["spatial_svd", "channel_pruning"]
    assert proposal.gate_after == 1


def test_one_method_gets_the_whole_target(make_settings):
    settings = make_settings(methods=("channel_pruning",))
    trial = fixed({"c_cp": 0.505})
    proposal = propose(trial, settings, exactly)
    assert [stage.name for stage in proposal.recipe.stages] == ["channel_pruning", "fine_tune"]
    assert proposal.recipe.stages[0].mac_ratio == 0.505


def test_a_trial_whose_first_ratio_cannot_be_reached_has_both_parameters_all_the_same(make_settings):
    def unreachable(stages):
        raise RatioError("too little")

    trial = fixed({"c_ssvd": 0.8, "c_cp": 0.63})
    with pytest.raises(RatioError):
        propose(trial, make_settings(), unreachable)
    assert set(trial.params) == {"c_ssvd", "c_cp"}


RANGE = {"target": (0.3, 0.8)}


def test_anchors_of_a_range_are_its_corners_its_middle_and_the_guidebooks(make_settings):
    points = {anchor.label: (anchor.target, anchor.ratio) for anchor in anchors(make_settings(**RANGE))}
    assert points == {
        "spatial_svd only at 0.3": (0.3, 0.3),
        "spatial_svd only at 0.8": (0.8, 0.8),
        "spatial_svd only at 0.49": (0.49, 0.49),
        "channel_pruning only at 0.3": (0.3, 1.0),
        "channel_pruning only at 0.8": (0.8, 1.0),
        "channel_pruning only at 0.49": (0.49, 1.0),
        "equal ratios at 0.3": (0.3, 0.55),
        "equal ratios at 0.8": (0.8, 0.9),
        "equal ratios at 0.49": (0.49, 0.7),
        "guidebook": (0.5, 0.75),
    }
    labels = [anchor.label for anchor in anchors(make_settings(target=(0.1, 0.4)))]
    assert len(labels) == 9
    assert "guidebook" not in labels
    alone = anchors(make_settings(**RANGE, methods=("channel_pruning",)))
    assert [(anchor.label, anchor.ratio) for anchor in alone] == [
        ("target at 0.3", 0.3),
        ("target at 0.8", 0.8),
        ("target at 0.49", 0.49),
    ]
    narrow = anchors(make_settings(target=(0.5, 0.504), tolerance=0.001))
    assert {anchor.target for anchor in narrow} == {0.5, 0.504, math.sqrt(0.5 * 0.504)}


def test_anchors_of_a_range_are_asked_for_as_they_say(make_settings, study_in_memory):
    settings = make_settings(**RANGE)
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    wanted = anchors(settings)
    run_all(study, settings, len(wanted))
    for trial, anchor in zip(study.get_trials(deepcopy=False), wanted, strict=True):
        assert trial.params["target"] == anchor.target
        assert trial.params["c_ssvd"] == anchor.ratio
        assert trial.params["c_cp"] == pytest.approx(anchor.target / anchor.ratio)


@given(st.floats(0.3, 0.8), st.floats(0, 1))
def test_a_trial_of_a_range_splits_its_own_target_and_meets_it_exactly(target, split):
    def a_little_less(stages):
        return 0.997 * exactly(stages)

    first = min(ratio_grid(target, 0.05), key=lambda point: abs(point - target**split))
    before = 0.997 * first if first < 1 else 1.0
    second = 1.0 if before <= target * 1.02 else target / before
    trial = fixed({"target": target, "split": split, "c_ssvd": first, "c_cp": second})
    with warnings.catch_warnings():
        # FixedTrial warns of a value that was no choice.
        warnings.simplefilter("error")
        recipe = propose(trial, SearchSettings(target=(0.3, 0.8)), a_little_less).recipe
    assert list(trial.params) == ["target", "split", "c_ssvd", "c_cp"]
    used = {stage.method: stage.mac_ratio for stage in recipe.stages if isinstance(stage, Compress)}
    asked_for = {"spatial_svd": first, "channel_pruning": second}
    assert used == {method: ratio for method, ratio in asked_for.items() if ratio < 1} != {}


def test_a_trial_of_a_range_has_the_same_bounds_in_every_trial(make_settings, study_in_memory):
    settings = make_settings(**RANGE)
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    run_all(study, settings, 30)
    trials = study.get_trials(deepcopy=False)
    assert {trial.distributions["target"] for trial in trials} == {FloatDistribution(0.3, 0.8, log=True)}
    assert {trial.distributions["split"] for trial in trials} == {FloatDistribution(0, 1)}
    for trial in trials:
        target, first = trial.params["target"], trial.params["c_ssvd"]
        assert target <= first and first in ratio_grid(target, 0.05)
    # Between the points of the grid there is only the target itself.
    shared = [trial.params["c_ssvd"] for trial in trials]
    assert len(set(shared) & set(ratio_grid(0.1, 0.05))) > 5


def test_one_method_gets_the_whole_target_that_a_trial_chose(make_settings, study_in_memory):
    settings = make_settings(**RANGE, methods=("channel_pruning",))
    study = study_in_memory(settings)
    run_all(study, settings, 5)
    for trial in study.get_trials(deepcopy=False):
        assert trial.params.keys() == {"target", "c_cp"}
        assert trial.params["c_cp"] == trial.params["target"]


METHODS_TO_CHOOSE = (
    "spatial_svd+channel_pruning",
    "weight_svd+channel_pruning",
    "channel_pruning",
    "weight_svd",
)


@pytest.mark.parametrize("target", [0.5, (0.3, 0.8)])
def test_methods_can_be_chosen_and_each_choice_has_its_own_ratios(make_settings, study_in_memory, target):
    settings = make_settings(target=target, variables={"methods": Choice(METHODS_TO_CHOOSE)})
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    first = len(study.get_trials(deepcopy=False))
    labels = [trial.user_attrs[ANCHOR] for trial in study.get_trials(deepcopy=False)]
    # Pruning alone is tried beside spatial SVD already.
    assert [label for label in labels if " of " in label] == [
        "equal ratios of weight_svd+channel_pruning",
        "equal ratios of weight_svd",
    ]
    ratios = {
        "spatial_svd+channel_pruning": {"c_ssvd", "c_cp"},
        "weight_svd+channel_pruning": {"c_wsvd", "c_cp"},
        "channel_pruning": {"c_cp"},
        "weight_svd": {"c_wsvd"},
    }
    recipes = []
    for _ in range(first + 20):
        trial = study.ask()
        recipes.append(propose(trial, settings, exactly).recipe)
        study.tell(trial, (0.9, 0.5))
    for trial, recipe in zip(study.get_trials(deepcopy=False), recipes, strict=True):
        methods = trial.params["methods"].split("+")
        asked_of = {name for name in trial.params if name.startswith("c_")}
        assert asked_of == ratios[trial.params["methods"]]
        used = [stage.method for stage in recipe.stages if isinstance(stage, Compress)]
        assert used == [m for m in methods if m in used] and used
        aim = trial.params.get("target", 0.5)
        assert (
            aim * 0.99 - 1e-9 <= exactly([s for s in recipe.stages if isinstance(s, Compress)]) <= aim * 1.02
        )
    searched = {trial.params["methods"] for trial in study.get_trials(deepcopy=False)[first:]}
    assert searched == set(METHODS_TO_CHOOSE)


def asked(study):
    return [tuple(trial.params.values()) for trial in study.get_trials(deepcopy=False)]


def run_all(study, settings, n, achieved=exactly):
    for _ in range(n):
        trial = study.ask()
        try:
            propose(trial, settings, achieved)
        except RatioError:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, (0.9, 0.5))


def test_a_grid_is_tried_in_the_order_of_its_lists(make_settings, study_in_memory):
    settings = make_settings(sampler="grid", grid={"c_ssvd": (0.9, 0.7), "c_cp": (0.55, 0.8)})
    study = study_in_memory(settings)
    enqueue_anchors(study, settings)
    run_all(study, settings, 4)
    assert asked(study) == [(0.9, 0.55), (0.9, 0.8), (0.7, 0.55), (0.7, 0.8)]


def test_a_grid_of_first_ratios_gives_the_rest_to_the_second_method_exactly(make_settings, study_in_memory):
    settings = make_settings(sampler="grid", grid={"c_ssvd": (1, 0.8, 0.5)})
    study = study_in_memory(settings)
    run_all(study, settings, 3, lambda stages: exactly(stages) - 0.01)
    assert asked(study) == [(1.0, 0.5), (0.8, 0.5 / 0.79), (0.5, 1.0)]


def test_a_grid_of_one_method(make_settings, study_in_memory):
    settings = make_settings(
        methods=("channel_pruning",), sampler="grid", grid={"c_cp": [0.5, 0.495]}, tolerance=0.02
    )
    study = study_in_memory(settings)
    run_all(study, settings, 2)
    assert asked(study) == [(0.5,), (0.495,)]


def test_a_point_of_a_grid_that_cannot_be_reached_has_both_parameters(make_settings, study_in_memory):
    def unreachable(stages):
        raise RatioError("too little")

    settings = make_settings(sampler="grid", grid={"c_ssvd": (0.8,)})
    study = study_in_memory(settings)
    run_all(study, settings, 1, unreachable)
    assert asked(study) == [(0.8, 0.625)]


def test_a_point_of_a_grid_is_taken_once_by_several_workers_and_again_by_its_retry_alone(
    make_settings, study_in_memory
):
    settings = make_settings(sampler="grid", grid={"c_ssvd": (0.9, 0.8, 0.7)})
    study = study_in_memory(settings)
    first, second = study.ask(), study.ask()
    propose(second, settings, exactly)
    propose(first, settings, exactly)
    study.tell(first, state=TrialState.FAIL)
    study.enqueue_trial({}, user_attrs={RETRY_OF: first.number})
    retry, third, fourth = study.ask(), study.ask(), study.ask()
    for trial in (third, retry):
        propose(trial, settings, exactly)
    assert [trial.params["c_ssvd"] for trial in (first, second, retry, third)] == [0.9, 0.8, 0.9, 0.7]
    with pytest.raises(optuna.TrialPruned, match="all 3 points of the grid are taken"):
        propose(fourth, settings, exactly)


def test_a_grid_says_how_many_trials_there_are_and_which_miss_the_target(make_settings, caplog):
    settings = make_settings(sampler="grid", grid={"c_ssvd": (0.9, 0.8), "c_cp": (0.55, 0.625)})
    with caplog.at_level("INFO", logger="compress_search"):
        assert trials_in_reach(settings, 20) == 4
    assert "2 of the 4 points of the grid are not within the tolerance of the target 0.5;" in caplog.text
    assert "0.9 x 0.625, 0.8 x 0.55." in caplog.text
    assert "the study ends with 4 trials, not 20" in caplog.text
    assert trials_in_reach(settings, 3) == 3
    assert trials_in_reach(make_settings(), 20) == 20


def test_proposals_never_leave_the_band_that_the_selector_can_fill(make_settings):
    settings = make_settings(target=0.33)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        trial = study.ask()
        propose(trial, settings, exactly)
        product = trial.params["c_ssvd"] * trial.params["c_cp"]
        assert 0.33 * 0.99 - 1e-9 <= product <= 0.33 * 1.02 + 1e-9
        assert min(abs(trial.params["c_ssvd"] - point) for point in ratio_grid(0.33, 0.05)[1:]) < 1e-9


def run_one(study, settings):
    trial = study.ask()
    propose(trial, settings, exactly)
    return trial


def test_the_first_trial_of_a_first_ratio_aims_at_the_target_and_others_choose_around_it(
    make_settings, study_in_memory
):
    settings = make_settings(target=0.33)
    study = study_in_memory(settings)
    seen = {}
    for _ in range(40):
        trial = run_one(study, settings)
        first, last = trial.params.values()
        study.tell(trial, (0.9, 0.33))
        seen.setdefault(first, []).append((trial.distributions["c_cp"], first * last))
    assert len(seen) == len(ratio_grid(0.33, 0.05)) - 1
    others = [one for found in seen.values() for one in found[1:]]
    for (bounds, product), *_ in seen.values():
        assert bounds.single()
        assert product == pytest.approx(0.33)
    assert not any(bounds.single() for bounds, _ in others)
    assert len({round(product, 6) for _, product in others}) == len(others) > 10


def test_a_second_ratio_that_the_user_queued_is_taken_and_again_by_its_retry(make_settings, study_in_memory):
    settings = make_settings()
    study = study_in_memory(settings)
    study.enqueue_trial({"c_ssvd": 0.8, "c_cp": 0.63})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = run_one(study, settings)
        study.tell(first, state=TrialState.FAIL)
        study.enqueue_trial(first.params, user_attrs={RETRY_OF: first.number})
        retry = run_one(study, settings)
    assert list(first.params.values()) == list(retry.params.values()) == [0.8, 0.63]


def test_a_retry_aims_at_the_target_if_its_trial_did(make_settings, study_in_memory):
    settings = make_settings()
    study = study_in_memory(settings)
    first = run_one(study, settings)
    study.tell(first, state=TrialState.FAIL)
    study.enqueue_trial(first.params, user_attrs={RETRY_OF: first.number})
    retry = run_one(study, settings)
    assert retry.params == first.params
    assert retry.distributions == first.distributions
    assert retry.distributions["c_cp"].single()
