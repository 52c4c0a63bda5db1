"""Three tools at three shares of the MACs: what is run, and the table. Nothing is trained here."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
from pathlib import Path

import pytest

from compress_search import FineTune
from compress_search.progress import Progress

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

ROOT = Path(__file__).parents[1]
BEFORE = {"aimet": 0.82, "compress_search": 0.85, "torch_pruning": 0.4}


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")


@pytest.fixture
def field():
    return importlib.import_module("benchmarks.field")


@pytest.fixture
def table():
    return importlib.import_module("benchmarks.field_table")


@pytest.fixture
def cases():
    return importlib.import_module("benchmarks.cases")


@pytest.fixture
def bench(field, cases, tmp_path, monkeypatch):
    """One that compresses and trains nothing; what was asked for is noted in the list beside it."""
    running = importlib.import_module("benchmarks.running")
    tunings = importlib.import_module("benchmarks.tunings")
    weights = tmp_path / "weights"
    weights.write_text("weights")
    asked = []

    def compress(self, request):
        asked.append((request.case.name, request.budget))
        home = self.home(request.case)
        home.mkdir(parents=True)
        (home / "request.json").write_text(request.to_json())
        (home / "model.safetensors").write_text(request.case.name)
        effort = cases.Effort(1.0, 2.0, None, None, 1.0, 1.0, "fake 1")
        macs = 370 + request.case.seed
        result = cases.Result(request.case.name, BEFORE[request.case.tool], macs, 0.9, 1_000, effort)
        (home / "result.json").write_text(result.to_json())
        return result

    def tune(self, case, result, tuning):
        asked.append((f"tune {case.name}", tuning.seed))
        return tunings.Tuned(0.37, 0.9, result.accuracy, result.accuracy + 0.02, 0.9, 60.0, 50.0)

    monkeypatch.setattr(running.Laboratory, "run", compress)
    monkeypatch.setattr(running.Laboratory, "weights", lambda self, network: weights)
    monkeypatch.setattr(field.Bench, "run", tune)
    laboratory = running.Laboratory(tmp_path / "laboratory", 1)
    return field.Bench(laboratory, FineTune(epochs=2), 1_000, Progress()), asked


def run(field, bench, ratios=(0.5,), seeds=(0,), *, tunings=1, table=False):
    return field.run(
        bench, "resnet20", ratios, seeds, tunings=tunings, table=table, written=lambda rows: None
    )


def test_each_tool_is_run_at_each_share_and_seed_with_the_macs_that_aimet_left(field, bench):
    bench, asked = bench
    rows = run(field, bench, (0.7, 0.33), (0, 1))
    assert [(row.asked, row.seed) for row in rows[::3]] == [(0.7, 0), (0.33, 0), (0.7, 1), (0.33, 1)]
    assert [row.tool for row in rows] == ["aimet", "compress_search", "torch_pruning"] * 4
    assert len(asked) == 2 * len(rows)
    budgets = dict(asked)
    assert budgets["field-0.7-aimet-seed1"] is None
    for tool in ("compress_search", "torch_pruning"):
        assert (budgets[f"field-0.7-{tool}-seed0"], budgets[f"field-0.7-{tool}-seed1"]) == (370, 371)
        assert budgets[f"tune field-0.33-{tool}-seed1"] == 0


def test_spatial_svd_alone_and_fewer_tools(field, bench):
    bench, asked = bench
    rows = field.run(
        bench,
        "resnet20",
        [0.5],
        [0],
        plan="spatial_svd",
        tools=["compress_search"],
        tunings=1,
        table=False,
        written=lambda rows: None,
    )
    name = "field-0.5-spatial_svd-compress_search-seed0"
    # AIMET's is compressed, as its MACs are the measure, but not fine-tuned.
    assert asked == [("field-0.5-spatial_svd-aimet-seed0", None), (name, 370), (f"tune {name}", 0)]
    assert [len(row.tuned) for row in rows] == [0, 1]
    aimet, ours, _ = field.cases_of("resnet20", 0.5, 0, plan="spatial_svd")
    assert [(step.method, step.mac_ratio) for step in ours.steps] == [("spatial_svd", 0.5)]
    assert ours.steps == aimet.steps


def test_what_is_there_is_not_run_again(field, bench):
    bench, asked = bench
    first = run(field, bench)
    done = list(asked)
    assert run(field, bench) == run(field, bench, table=True) == first
    assert run(field, bench, (0.7, 0.5), table=True) == first
    assert asked == done


def test_each_network_is_fine_tuned_from_several_seeds(field, bench, table):
    bench, asked = bench
    run(field, bench)
    rows = run(field, bench, tunings=3)
    tuned = [(name, seed) for name, seed in asked if name.startswith("tune ")]
    assert len(tuned) == len(set(tuned)) == 9
    assert len(asked) == 3 + 9
    assert [len(row.tuned) for row in rows] == [3, 3, 3]
    assert len(table.as_csv(rows).splitlines()) == 1 + 9


def test_failed_tool_is_in_the_table_and_holds_nobody_up(field, bench, cases, table, monkeypatch):
    bench, asked = bench
    compress = type(bench.laboratory).run

    def failing(self, request):
        result = compress(self, request)
        if request.case.tool != "aimet":
            return result
        return dataclasses.replace(result, accuracy=None, macs=None, effort=None, error="it | broke")

    monkeypatch.setattr(type(bench.laboratory), "run", failing)
    rows = run(field, bench)
    budgets = dict(asked)
    assert budgets["field-0.5-compress_search-seed0"] is budgets["field-0.5-torch_pruning-seed0"] is None
    assert "tune field-0.5-aimet-seed0" not in budgets
    text = table.as_markdown(rows, "Head.")
    assert "| 0.5 | aimet | failed: it / broke |" in text
    assert "| 0.5 | compress_search | 0.3700 | 85.00% | 87.00% | 3.00 | 1 | 1 | 2 | 50 |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(table.COLUMNS) + 1}


def test_all_spend_as_many_macs_as_the_share_says(field):
    splits = importlib.import_module("benchmarks.field_cases")
    for ratio, (svd, pruning) in splits.SPLITS.items():
        assert svd * pruning == pytest.approx(ratio, rel=0.02)
        names = [case.name for seed in (0, 1) for case in splits.cases_of("resnet20", ratio, seed)]
        assert len(set(names)) == 6


def row(table, cases, tool, before, after, seed):
    tunings = importlib.import_module("benchmarks.tunings")
    effort = cases.Effort(1.0, 2.0 + 2 * seed, None, None, 1.0, 1.0, "fake 1")
    result = cases.Result("case", before, 370, 0.9, 1_000, effort)
    return table.Row(0.5, tool, seed, result, (tunings.Tuned(0.37, 0.9, before, after, 0.9, 60.0, 50.0),))


def test_ahead_is_only_who_is_ahead_with_every_seed(table, cases):
    rows = [
        row(table, cases, "aimet", 0.80, 0.870, 0),
        row(table, cases, "aimet", 0.81, 0.880, 1),
        row(table, cases, "compress_search", 0.84, 0.875, 0),
        row(table, cases, "compress_search", 0.85, 0.885, 1),
        row(table, cases, "torch_pruning", 0.90, 0.890, 0),
        row(table, cases, "torch_pruning", 0.90, 0.890, 1),
    ]
    text = table.as_markdown(rows, "Head.")
    assert (
        "| 0.5 | aimet | 0.3700 | 80.50% (80.00-81.00) | 87.50% (87.00-88.00) | 2.50 | 2 | 2 | 3 | 50 |"
        in text
    )
    assert "* 0.5, before fine-tuning, beside aimet: +4.00 points, ahead with every seed." in text
    assert "* 0.5, after fine-tuning, beside aimet: +0.50 points, within the spread of the seeds." in text
    assert "* 0.5, before fine-tuning, beside torch_pruning: -5.50 points, behind with every seed." in text
    assert "one each, so the spread is not known" in table.as_markdown(rows[::2], "Head.")
    first, *_ = csv.DictReader(io.StringIO(table.as_csv(rows)))
    assert (first["tool"], first["seed"], first["after"]) == ("aimet", "0", "0.87")
    assert float(first["drop_points"]) == pytest.approx(3.0)


def test_table_of_nothing_is_empty(table):
    assert "|" not in table.as_markdown([], "Head.")
    assert table.as_csv([]) == ""
