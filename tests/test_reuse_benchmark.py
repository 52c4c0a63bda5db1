"""The benchmark of reuse: a small study both ways, and the tables."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from compress_search import FineTune, Task
from compress_search.progress import Progress
from compress_search.results import StageResult
from compress_search.search.settings import SearchSettings

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")


@pytest.fixture
def study():
    return importlib.import_module("benchmarks.reuse")


@pytest.fixture
def table():
    return importlib.import_module("benchmarks.reuse_table")


def stage(name, seconds, *, reused=False, accuracy=0.9):
    return StageResult(f"key-{name}", name, accuracy, 500, 50, 0.5, seconds, reused)


def pipeline(table, name, *stages, seconds=10.0):
    alone = tuple(dataclasses.replace(one, reused=False) for one in stages)
    took = sum(one.seconds for one in stages if not one.reused)
    return table.Pipeline(
        name, {"c_ssvd": 0.75}, stages, table.Time(took + 1, took), alone, table.Time(seconds, seconds)
    )


@pytest.fixture
def comparison(table):
    return table.Comparison(
        table.Time(2.0, 1.0),
        (
            pipeline(table, "0", stage("spatial_svd", 3.0), stage("fine_tune", 5.0)),
            pipeline(table, "1", stage("spatial_svd", 3.0, reused=True), stage("fine_tune", 5.0)),
        ),
    )


def test_studies_and_pipelines_add_up(comparison, table):
    assert comparison.shared == table.Time(2 + (8 + 1) + (5 + 1), 1 + 8 + 5)
    assert comparison.alone == table.Time(20.0, 20.0)
    assert (comparison.ratio, comparison.cpu_ratio) == (17 / 20, 14 / 20)
    assert comparison.by_stage() == {
        "spatial_svd": table.StageTimes(2, 1, 3.0, 6.0),
        "fine_tune": table.StageTimes(2, 0, 10.0, 10.0),
        table.REST: table.StageTimes(0, 0, 4.0, 4.0),
    }


def test_tables(comparison, table):
    text = table.as_markdown({"default": comparison}, "Head.")
    assert "| default | 2 | 17.0 | 20.0 | 0.850 | 0.700 | 0.45 |" in text
    assert "| spatial_svd | 2 | 1 | 3.0 | 6.0 |" in text
    assert "| 1 | 0.7500 | 2 | 1 | 0.9000 | 6.0 | 10.0 |" in text
    rows = list(csv.DictReader(io.StringIO(table.as_csv({"default": comparison}))))
    assert [row["seconds_shared"] for row in rows] == ["3.0", "5.0", "0.0", "5.0"]
    assert [row["seconds_alone"] for row in rows] == ["3.0", "5.0", "3.0", "5.0"]


@pytest.mark.parametrize("change", [{"accuracy": 0.8}, {"key": "another"}, {"macs": 501}, {"params": 51}])
def test_difference_is_an_error(study, comparison, change):
    same = comparison.pipelines[0]
    study.check_same(same)
    other = (same.alone[0], dataclasses.replace(same.alone[1], **change))
    with pytest.raises(study.DifferenceError, match=f"Trial 0, fine_tune: {next(iter(change))} is"):
        study.check_same(dataclasses.replace(same, alone=other))


def test_plans_have_the_same_trials_in_all(study):
    settings = SearchSettings(target=0.5, fine_tune=FineTune(epochs=2, lr=0.01))
    plans = study.plans(settings, 12)
    assert tuple(plans) == study.PLANS
    assert [sum(part.n_trials for part in plan) for plan in plans.values()] == [12, 12, 12, 12, 12]
    assert plans["default"] == (study.Part(settings, 12),)
    assert [part.settings.final_fine_tune.lr for part in plans["variants"]] == [0.005, 0.01, 0.02]
    # They share everything but the last fine-tuning.
    for part in plans["variants"]:
        assert dataclasses.replace(part.settings, final_fine_tune=None) == settings


def test_grids_are_as_large_as_their_studies(study):
    for grid in (study.crossing(12), study.refinement(12)):
        assert len(grid["c_ssvd"]) * len(set(grid["c_cp"])) == 12
    one = study.refinement(8)
    assert one["c_ssvd"] == (0.75,)
    assert one["c_cp"] == (0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@pytest.mark.slow
def test_a_trial_alone_comes_to_what_it_came_to_in_its_study(study):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    data = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 4) for _ in range(2)]
    task = Task(model=model, example_input=torch.zeros(1, 3, 8, 8), train=data, validation=data)
    settings = SearchSettings(
        target=0.6, tolerance=0.2, selection="uniform", samples=32, fine_tune=FineTune(epochs=1)
    )
    plan = [
        study.Part(settings, 2),
        study.Part(dataclasses.replace(settings, final_fine_tune=FineTune(epochs=1, lr=0.01)), 2),
    ]
    comparison = study.compare(task, plan, Progress())
    assert [one.name for one in comparison.pipelines] == ["0.0", "0.1", "1.0", "1.1"]
    times = comparison.by_stage()
    assert times["spatial_svd"].reused == times["spatial_svd"].stages / 2 > 0
    assert not any(one.reused for pipeline in comparison.pipelines for one in pipeline.alone)
    assert min(comparison.shared.seconds, comparison.alone.seconds) > 0


def test_the_first_fine_tuning_may_be_longer_than_the_last(study):
    settings = SearchSettings(target=0.5, fine_tune=FineTune(epochs=5, lr=0.04))
    longer = study.with_first_epochs(settings, 15)
    assert longer.fine_tune == FineTune(epochs=15, lr=0.04)
    assert longer.final_fine_tune == FineTune(epochs=5, lr=0.04)
    variants = [part.settings.final_fine_tune for part in study.plans(longer, 12)["variants"]]
    assert variants == [FineTune(epochs=5, lr=lr) for lr in (0.02, 0.04, 0.08)]
