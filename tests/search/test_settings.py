from __future__ import annotations

import json

import pytest

from compress_search.exceptions import ConfigError
from compress_search.recipe import FineTune
from compress_search.search.settings import SearchSettings
from compress_search.search.variables import Choice, Range


def test_settings_survive_json():
    settings = SearchSettings(
        target=0.4,
        methods=("channel_pruning",),
        fine_tune=FineTune(epochs=3),
        final_fine_tune=FineTune(lr=0.1),
        per_layer_fine_tune=FineTune(epochs=1),
        max_drop_after_ssvd=0.0,
        ignore=("head.*",),
        round_to=8,
        keep_channels={"head": (0, 3)},
    )
    assert SearchSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    grid = SearchSettings(target=0.4, sampler="grid", grid={"c_ssvd": [0.8, 0.6], "c_cp": [0.5]})
    assert SearchSettings.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
    plain = SearchSettings(target=0.4)
    assert SearchSettings.from_dict(plain.to_dict()) == plain


def test_settings_from_before_grids_and_training_after_each_layer_are_read():
    stored = SearchSettings(target=0.4).to_dict()
    del stored["per_layer_fine_tune"], stored["grid"]
    assert SearchSettings.from_dict(stored) == SearchSettings(target=0.4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": 0}, "target is 0"),
        ({"target": 1}, "target is 1"),
        ({"target": float("nan")}, "target is nan"),
        ({"target": "0.5"}, "target is '0.5'; it must be in"),
        ({"target": True}, "target is True"),
        ({"tolerance": "0.02"}, "tolerance is '0.02'; it must be a number"),
        ({"tolerance": None}, "tolerance is None; it must be a number"),
        ({"step": "0.05"}, "step is '0.05'; it must be in"),
        ({"max_drop_after_ssvd": "0.05"}, "max_drop_after_ssvd is '0.05'; it must be 0 or more"),
        ({"max_drop_after_ssvd": True}, "max_drop_after_ssvd is True"),
        ({"seed": None}, "seed is None; it must be a whole number, 0 or more"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"selection": ["uniform"]}, r"selection names \['uniform'\], which does not exist"),
        ({"sampler": ["tpe"]}, r"sampler names \['tpe'\], which does not exist"),
        ({"target": ()}, r"target is \[\]; it must be in \(0, 1\)"),
        ({"target": (0.8, 0.3)}, r"target is \[0.8, 0.3\]; it must be the lowest ratio of a range and then"),
        ({"target": [0.5, 0.5]}, r"target is \[0.5, 0.5\]; it must be the lowest"),
        ({"target": (0.3, 0.5, 0.8)}, r"target is \[0.3, 0.5, 0.8\]; it must be the lowest"),
        ({"target": (0.3,)}, r"target is \[0.3\]; .*or a single ratio without brackets"),
        ({"target": (0, 0.5)}, r"target is \[0, 0.5\]; it must be in \(0, 1\)"),
        ({"target": (0.3, 1)}, r"target is \[0.3, 1\]; it must be in \(0, 1\)"),
        ({"target": (0.3, float("nan"))}, r"target is \[0.3, nan\]; it must be in"),
        (
            {"target": (0.3, 0.9), "tolerance": 0.12},
            r"the target \[0.3, 0.9\] leaves \(0, 1\). Give less than 0.1111",
        ),
        (
            {"target": (0.3, 0.8), "sampler": "grid", "grid": {"c_ssvd": [0.9]}},
            "grid has no c_cp, but what is",
        ),
        (
            {"variables": {"methods": Choice(("spatial_svd", "chanel_pruning"))}},
            "Did you mean 'channel_pruning'?",
        ),
        ({"variables": {"methods": Choice(("spatial_svd+spatial_svd",))}}, "names 'spatial_svd' twice"),
        ({"variables": {"methods": Choice((("spatial_svd",),))}}, "each must be a text"),
        ({"variables": {"methods": Range(1, 2)}}, "methods is no number"),
        ({"tolerance": 0}, "leaves no room"),
        ({"tolerance": -0.1}, "leaves no room"),
        ({"tolerance": float("nan")}, "leaves no room"),
        ({"target": 0.9, "tolerance": 0.12}, r"leaves \(0, 1\). Give less than 0.1111"),
        ({"target": 0.1, "tolerance": 1.0}, r"leaves \(0, 1\). Give less than 1,"),
        ({"methods": ()}, "methods has 0 names"),
        ({"methods": ("spatial_svd", "spatial_svd")}, "names 'spatial_svd' twice"),
        ({"methods": ("spatial_svd", "chanel_pruning")}, "Did you mean 'channel_pruning'?"),
        ({"selection": "unifrom"}, "Did you mean 'uniform'?"),
        ({"sampler": "magic"}, "There are: tpe, random"),
        ({"sampler": "grid"}, r"needs the ratios to try: grid={'c_ssvd': \[0.9, 0.8\]"),
        ({"grid": {"c_ssvd": [0.9]}}, "the sampler 'tpe' does not use it. Choose sampler='grid'"),
        ({"sampler": "grid", "grid": [0.9]}, r"grid is \[0.9\]; it must be a mapping"),
        ({"sampler": "grid", "grid": {"c_cp": [0.9]}}, "grid has no c_ssvd, the ratio of spatial_svd"),
        ({"sampler": "grid", "grid": {"c_ssvd": [0.9], "c_sp": [0.6]}}, "Did you mean 'c_cp'?"),
        ({"sampler": "grid", "grid": {"c_ssvd": []}}, r"grid.c_ssvd is \[\]; it must be a list"),
        ({"sampler": "grid", "grid": {"c_ssvd": "0.9"}}, "grid.c_ssvd is '0.9'; it must be a list"),
        ({"sampler": "grid", "grid": {"c_ssvd": [0.9, 0, 1.5]}}, "grid.c_ssvd has 0, 1.5; ratios are in"),
        ({"sampler": "grid", "grid": {"c_ssvd": [0.9, 0.9]}}, "grid.c_ssvd has 0.9 twice"),
        ({"sampler": "grid", "grid": {"c_ssvd": [0.9, 0.4]}}, "has 0.4, less than the target 0.5"),
        ({"sampler": "grid", "grid": {"c_ssvd": [1, 0.5], "c_cp": [0.5, 1]}}, "which is the original model"),
        ({"step": 0}, "step is 0"),
        ({"step": 1}, "step is 1"),
        ({"samples": -1}, "samples is -1"),
        ({"round_to": 0}, "round_to is 0"),
        ({"keep_channels": {"head": (0, -3)}}, r"keep_channels\['head'\] is \(0, -3\)"),
        ({"per_layer_fine_tune": 3}, "per_layer_fine_tune is 3; it must be settings of fine-tuning"),
        ({"max_drop_after_ssvd": -0.01}, "max_drop_after_ssvd is -0.01"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_each_fault_is_named_alone(changes, said):
    with pytest.raises(ConfigError, match=said) as caught:
        SearchSettings(**{"target": 0.5} | changes)
    assert len(caught.value.faults) == 1


def test_a_grid_beside_variables_is_refused():
    with pytest.raises(ConfigError, match="variables names fine_tune.lr, but the sampler 'grid' tries"):
        SearchSettings(
            target=0.5,
            sampler="grid",
            grid={"c_ssvd": [0.9]},
            variables={"fine_tune.lr": Range(0.001, 0.1)},
        )


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError) as caught:
        SearchSettings(target=2, tolerance=0, selection="x", sampler="y", step=2, samples=-3, seed=-1)
    assert len(caught.value.faults) == 7
