from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from compress_search.exceptions import RatioError
from compress_search.search.history import ANCHOR
from compress_search.search.space import anchors

KEYS = {"recipe", "stages", "accuracy", "drop", "mac_ratio", "macs", "params", "achieved", "seconds"}


@pytest.fixture
def ask(study_in_memory):
    study = study_in_memory()

    def make(label=None):
        if label is not None:
            study.enqueue_trial({}, user_attrs={ANCHOR: label})
        return study.ask()

    return make


def test_a_complete_trial_tells_everything(ask, objective, runner):
    trial = ask("guidebook")
    accuracy, mac_ratio = objective(runner)(trial)
    told = trial.user_attrs
    assert set(told) >= KEYS
    assert mac_ratio == told["mac_ratio"] == told["macs"] / 1_000_000 == pytest.approx(0.5 * 0.999, rel=1e-5)
    assert told["achieved"] == pytest.approx({"c_ssvd": 0.75 * 0.999, "c_cp": 0.5 / 0.75}, rel=1e-5)
    first = 0.25**2 / 4
    second = (1 - trial.params["c_cp"]) ** 2
    assert accuracy == pytest.approx(0.9 - (first + second) / 4)
    assert told["drop"] == pytest.approx(0.9 - accuracy)
    assert [stage["name"] for stage in told["stages"]] == [
        "spatial_svd",
        "fine_tune",
        "channel_pruning",
        "fine_tune",
    ]
    assert told["key"] == told["stages"][-1]["key"]
    assert (told["seconds"], told["seconds_saved"]) == (8.0, 0.0)
    assert told["recipe"][0]["mac_ratio"] == 0.75


def test_every_complete_trial_has_its_constraint_and_both_parameters(ask, objective, runner, make_settings):
    for label in [*(anchor.label for anchor in anchors(make_settings())), *[None] * 20]:
        trial = ask(label)
        _, mac_ratio = objective(runner)(trial)
        assert trial.constraints == {"mac_ratio": pytest.approx(abs(mac_ratio - 0.5) / 0.5 - 0.02)}
        assert trial.constraints["mac_ratio"] <= 0
        assert set(trial.params) == {"c_ssvd", "c_cp"}


def test_a_left_out_method_achieved_one(ask, objective, runner):
    trial = ask("channel_pruning only")
    objective(runner)(trial)
    assert trial.user_attrs["achieved"] == {"c_ssvd": 1.0, "c_cp": 0.4995}


def test_reused_stages_cost_no_time(ask, objective, runner):
    objective(runner)(ask("guidebook"))
    trial = ask("guidebook")
    objective(runner)(trial)
    assert (trial.user_attrs["seconds"], trial.user_attrs["seconds_saved"]) == (0.0, 8.0)


def test_the_gate_prunes_after_the_first_half_with_its_reason(ask, objective, runner, make_settings):
    settings = make_settings(max_drop_after_ssvd=0.01)
    trial = ask("equal ratios")
    with pytest.raises(
        optuna.TrialPruned, match="after spatial_svd, fine_tune the accuracy is 0.8775, 0.0225"
    ):
        objective(runner, settings)(trial)
    assert [stage["name"] for stage in trial.user_attrs["stages"]] == ["spatial_svd", "fine_tune"]
    assert len(runner.store) == 2
    assert trial.constraints == {}


def test_the_gate_lets_pass_what_lost_little_and_what_is_at_its_end(ask, objective, runner, make_settings):
    objective(runner, make_settings(max_drop_after_ssvd=0.0226))(ask("equal ratios"))
    trial = ask("spatial_svd only")
    objective(runner, make_settings(max_drop_after_ssvd=0.0))(trial)
    assert trial.user_attrs["drop"] > 0


def test_stages_are_told_one_by_one(ask, objective, runner):
    trial = ask("guidebook")

    def stop_at_the_third(stage):
        if stage.name == "channel_pruning":
            raise ZeroDivisionError

    runner.before_stage = stop_at_the_third
    with pytest.raises(ZeroDivisionError):
        objective(runner)(trial)
    told = trial.storage.get_trial(trial._trial_id)
    assert [stage["name"] for stage in told.user_attrs["stages"]] == ["spatial_svd", "fine_tune"]
    assert told.state == TrialState.RUNNING


def test_what_cannot_be_reached_raises(ask, objective, runner):
    runner.lowest = 0.6
    with pytest.raises(RatioError):
        objective(runner)(ask("spatial_svd only"))
