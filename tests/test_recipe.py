"""Recipes: their ranges, and JSON there and back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from compress_search.exceptions import ConfigError, RatioError
from compress_search.recipe import Compress, FineTune, Recipe, stage_to_dict

RECIPE = Recipe(
    (
        Compress(method="spatial_svd", mac_ratio=0.7, samples=0),
        FineTune(epochs=3, lr=0.05),
        Compress(
            method="channel_pruning",
            mac_ratio=1,
            selection="uniform",
            keep_channels={"layer1.conv": (0, 3), "stem": (7,)},
        ),
        FineTune(epochs=0),
        Compress(method="weight_svd", mac_ratio=0.9, per_layer_fine_tune=FineTune(epochs=1, lr=0.01)),
    )
)


def test_a_recipe_survives_json_unchanged():
    assert Recipe.from_dict(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE


def test_stages_are_named_after_what_they_do():
    names = [stage.name for stage in RECIPE.stages]
    assert names == ["spatial_svd", "fine_tune", "channel_pruning", "fine_tune", "weight_svd"]


def test_channels_to_keep_are_written_in_one_way():
    one = Compress(method="channel_pruning", mac_ratio=0.5, keep_channels={"b": [3, 0, 3], "a": {1}})
    other = Compress(method="channel_pruning", mac_ratio=0.5, keep_channels={"a": (1,), "b": (0, 3)})
    assert one == other
    assert json.dumps(stage_to_dict(one)) == json.dumps(stage_to_dict(other))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ([0, 3], r"keep_channels is \[0, 3\]; it must be a mapping"),
        ({"a": 3}, r"keep_channels\['a'\] is 3; it must be a list of whole numbers"),
        ({"a": "03"}, r"keep_channels\['a'\] is '03'"),
        ({"a": (0, -1)}, r"keep_channels\['a'\] is \(0, -1\)"),
        ({"a": (True,)}, r"keep_channels\['a'\] is \(True,\)"),
    ],
)
def test_channels_that_are_no_indices_are_refused(wanted, says):
    with pytest.raises(ConfigError, match=says):
        Compress(method="channel_pruning", mac_ratio=0.5, keep_channels=wanted)


def test_every_setting_of_a_stage_is_stored():
    stored = stage_to_dict(FineTune(lr=0.3))
    assert stored.pop("stage") == "fine_tune"
    assert FineTune(**stored) == FineTune(lr=0.3)


def test_a_stage_without_training_after_each_layer_is_stored_as_it_was_before_there_was_such_a_thing():
    plain = Compress(method="spatial_svd", mac_ratio=0.5)
    assert "per_layer_fine_tune" not in stage_to_dict(plain)
    assert Compress(method="spatial_svd", mac_ratio=0.5, per_layer_fine_tune=FineTune(epochs=0)) == plain
    assert stage_to_dict(Compress(method="spatial_svd", mac_ratio=0.5, per_layer_fine_tune=FineTune())) == {
        **stage_to_dict(plain),
        "per_layer_fine_tune": dataclasses.asdict(FineTune()),
    }


def test_training_after_each_layer_takes_settings_and_nothing_else():
    says = r"per_layer_fine_tune is \{'epochs': 1\}; it must be .* such as FineTune\("
    with pytest.raises(ConfigError, match=says) as caught:
        Compress(method="spatial_svd", mac_ratio=0.5, samples=-1, per_layer_fine_tune={"epochs": 1})
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, math.nan, math.inf, True, "0.5", None])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(RatioError, match=r"mac_ratio of spatial_svd is .*in \(0, 1\]"):
        Compress(method="spatial_svd", mac_ratio=ratio)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", -1),
        ("epochs", 2.5),
        ("lr", 0),
        ("lr", math.inf),
        ("momentum", 1),
        ("weight_decay", -1e-4),
        ("weight_decay", math.nan),
        ("warmup", 1),
        ("distillation", 1.1),
        ("temperature", 0),
        ("temperature", math.inf),
        ("gradient_clip", 0),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is {value!r}; it must be"):
        FineTune(**{setting: value})


def test_all_faults_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        FineTune(epochs=-1, lr=-1.0, warmup=2.0)
    assert [fault.split()[0] for fault in caught.value.faults] == ["epochs", "lr", "warmup"]


def test_the_ends_of_the_ranges_are_allowed():
    tuning = FineTune(epochs=0, momentum=0, weight_decay=0, warmup=0, distillation=1, gradient_clip=None)
    assert (tuning.epochs, tuning.gradient_clip) == (0, None)
    assert Compress(method="spatial_svd", mac_ratio=1).mac_ratio == 1
