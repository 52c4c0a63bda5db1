"""Shares that a study cannot use are refused before any work; a pattern serves both methods."""

from __future__ import annotations

import re

import pytest
from torch import nn

from compress_search import create_study
from compress_search.exceptions import ConfigError
from compress_search.search.manual_shares import check_manual_shares
from compress_search.search.settings import SearchSettings
from compress_search.search.variables import Choice

PRUNING = ("channel_pruning",)


def settings(shares, **options):
    return SearchSettings(target=0.5, shares=shares, **{"selection": "manual", **options})


@pytest.mark.parametrize(
    "sound",
    [
        SearchSettings(target=0.5),
        settings({"stem": 0.5}, methods=("spatial_svd",)),
        settings({"stem": 0.5}, methods=("channel_pruning", "spatial_svd")),
        settings({"stem*": 0.5, "head": 1.0}),
        settings({"stem*": 0.5}, selection="optimal", variables={"selection": Choice(("optimal", "manual"))}),
        settings({"stem": 0.5}, variables={"methods": Choice(("spatial_svd", "channel_pruning"))}),
    ],
    ids=repr,
)
def test_shares_that_can_be_used(sound):
    check_manual_shares(sound)


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        (settings({"stem": 0.5}, selection="uniform", methods=PRUNING), ["selection is 'uniform'"]),
        (
            settings(
                {"stem": 0.5},
                methods=PRUNING,
                variables={"selection": Choice(("optimal", "uniform"))},
            ),
            ["selection is 'optimal' or 'uniform', which"],
        ),
        (
            settings({"stem": 0.5, "body.*.conv": 0.4}),
            ["'stem', which spatial_svd factorises.*'stem\\*'", "'body.\\*.conv'.*'body.\\*.conv\\*'"],
        ),
        (
            settings({"stem": 0.5}, variables={"methods": Choice(("weight_svd+channel_pruning",))}),
            ["'stem', which weight_svd factorises, so that channel_pruning would not find it"],
        ),
    ],
)
def test_shares_that_cannot_be_used(settings, faults):
    with pytest.raises(ConfigError) as caught:
        check_manual_shares(settings)
    assert len(caught.value.faults) == len(faults)
    for fault, pattern in zip(caught.value.faults, faults, strict=True):
        assert re.search(pattern, fault)


def test_a_pattern_serves_both_methods_and_a_name_is_refused_at_once(tiny_task, tmp_path):
    layers = (
        nn.Conv2d(1, 12, 3, padding=1),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    task = tiny_task(model=nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)))
    options = {"target": 0.6, "tolerance": 0.3, "sampler": "grid", "grid": {"c_ssvd": [0.8], "c_cp": [0.8]}}

    def create(share_name):
        return create_study(
            "own-shares", task, selection="manual", shares={share_name: 0.7}, workspace=tmp_path, **options
        )

    with pytest.raises(ConfigError, match="shares names '0', which spatial_svd factorises"):
        create("0")
    assert list(tmp_path.iterdir()) == []
    study = create("0*")
    study.optimize(1)
    (candidate,) = study.candidates()
    assert candidate.state == "complete"
    assert len(candidate.stages) == 4
