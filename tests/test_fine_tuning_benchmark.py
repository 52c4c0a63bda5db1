"""The benchmark of fine-tuning: what is run, what is kept, and the table. Nothing is trained here."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
from pathlib import Path

import pytest
import torch

from compress_search import FineTune
from compress_search.progress import Progress

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")


@pytest.fixture
def study():
    return importlib.import_module("benchmarks.fine_tuning")


@pytest.fixture
def table():
    return importlib.import_module("benchmarks.fine_tuning_table")


@pytest.fixture
def tunings():
    return importlib.import_module("benchmarks.tunings")


@pytest.fixture
def bench(study, tunings, tmp_path, monkeypatch):
    """One that trains nothing: its outcomes are made up, and what was run is noted in ``ran``."""
    running = importlib.import_module("benchmarks.running")
    laboratory = running.Laboratory(tmp_path, 1)
    for case in study.CASES:
        laboratory.home(case).mkdir(parents=True)
        (laboratory.home(case) / "model.safetensors").write_text(case.name)
    ran = []

    def run(self, case, result, tuning):
        ran.append((case.name, tuning.distilled, tuning.seed))
        gain = 0.03 if tuning.distilled else 0.02
        return tunings.Tuned(0.37, 0.9, result.accuracy, result.accuracy + gain, 0.9, 60.0, 50.0)

    monkeypatch.setattr(study.Bench, "run", run)
    return study.Bench(laboratory, FineTune(epochs=2), 1_000, Progress()), ran


@pytest.fixture
def results(study):
    cases = importlib.import_module("benchmarks.cases")
    effort = cases.Effort(1.0, 1.0, None, None, 1.0, 1.0, "fake 1")
    accuracies = {"aimet": 0.82, "compress_search": 0.85, "torch_pruning": 0.4}
    return {
        case.name: cases.Result(case.name, accuracies[case.tool], 370, 0.9, 1_000, effort)
        for case in study.CASES
    }


def usual(study):
    return [case for case in study.CASES if case.name in study.USUAL]


def test_every_case_is_tuned_with_and_without_distillation_seed_after_seed(study, bench, results):
    bench, ran = bench
    rows = study.run(bench, usual(study), results, range(2), table=False)
    assert len(rows) == len(ran) == len(study.USUAL) * 2 * 2
    assert {name for name, _, _ in ran} == set(study.USUAL)
    assert [seed for _, _, seed in ran] == [0] * 6 + [1] * 6
    assert [distilled for _, distilled, _ in ran] == ([True] * 3 + [False] * 3) * 2
    # Nothing but the teacher differs within a case and a seed.
    labels, taught = (bench.tuning(usual(study)[0], 0, distilled=taught) for taught in (False, True))
    same = dataclasses.replace(labels.settings, distillation=taught.settings.distillation)
    assert dataclasses.replace(labels, settings=same) == taught


def test_finished_fine_tunings_are_not_run_again(study, bench, results, monkeypatch):
    bench, ran = bench
    whole = study.Bench.run

    def killed(self, case, result, tuning):
        if len(ran) == 3:
            raise KeyboardInterrupt
        return whole(self, case, result, tuning)

    monkeypatch.setattr(study.Bench, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run(bench, usual(study), results, [0], table=False)
    assert len(study.run(bench, usual(study), results, [0], table=True)) == len(ran) == 3
    monkeypatch.setattr(study.Bench, "run", whole)
    assert len(study.run(bench, usual(study), results, [0], table=False)) == len(ran) == 6
    assert len(set(ran)) == 6


def test_other_conditions_are_other_results(study, bench, results):
    bench, ran = bench
    case = usual(study)[:1]
    study.run(bench, case, results, [0], table=False)
    longer = dataclasses.replace(bench, settings=FineTune(epochs=3))
    fewer = dataclasses.replace(bench, images=500)
    threads = dataclasses.replace(bench, laboratory=dataclasses.replace(bench.laboratory, threads=2))
    for other in (longer, fewer, threads):
        assert study.run(other, case, results, [0], table=True) == []
    # A network that was compressed anew is another one.
    (bench.laboratory.home(case[0]) / "model.safetensors").write_text("compressed anew")
    assert study.run(bench, case, results, [0], table=True) == []
    assert len(ran) == 2


def test_case_without_a_network_is_left_out(study, bench, results):
    bench, ran = bench
    first, second, third = usual(study)
    del results[first.name]
    results[second.name] = dataclasses.replace(results[second.name], error="it broke", accuracy=None)
    study.run(bench, usual(study), results, [0], table=False)
    assert {name for name, _, _ in ran} == {third.name}


def test_validation_images_are_those_that_the_network_never_saw(study):
    images = importlib.import_module("image_data.images").Images(
        torch.arange(1_400).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32).to(torch.uint8), torch.arange(1_400)
    )
    task = study.task_of(torch.nn.Identity(), images, 10_000)
    assert torch.equal(task.train.images.labels, torch.arange(400))
    assert torch.equal(torch.cat([labels for _, labels in task.validation]), torch.arange(400, 1_400))
    assert len(study.task_of(torch.nn.Identity(), images, 128).train.images.labels) == 128


def test_all_usual_cases_have_the_same_macs_to_spend(study):
    cases = usual(study)
    assert {case.tool for case in cases} == {"aimet", "compress_search", "torch_pruning"}
    assert {case.rival or case.name for case in cases} == {study.RIVAL}


# The table


def test_table_has_the_mean_and_the_spread_of_the_seeds(table, tunings):
    tuning = tunings.Tuning("aimet-x", "m", "w", FineTune(distillation=0.0), 9, 1, 0, "v")
    ours = dataclasses.replace(tuning, case="ours-x", settings=FineTune())
    tuned = tunings.Tuned(0.37, 0.88, 0.82, 0.86, 0.9, 100.0, 90.0)
    rows = [
        (tuning, tuned),
        (dataclasses.replace(tuning, seed=1), dataclasses.replace(tuned, after=0.85, seconds=120.0)),
        (ours, dataclasses.replace(tuned, after=0.87)),
    ]
    text = table.as_markdown(rows, "Head.")
    assert "| aimet-x | labels | 0.3700 | 82.00% | 85.50% | 85.00% | 86.00% | 2.50 | 2 | 110 | 90 |" in text
    assert "* ours-x, distilled, loses 1.00 points; aimet-x, labels alone, 2.50: less (wanted: less)." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(table.COLUMNS) + 1}
    first, *_ = csv.DictReader(io.StringIO(table.as_csv(rows)))
    assert (first["case"], first["seed"], first["distillation"]) == ("aimet-x", "0", "0.0")
    assert float(first["drop_points"]) == pytest.approx(2.0)


def test_losing_as_much_is_not_less(table, tunings):
    tuned = tunings.Tuned(0.37, 0.88, 0.82, 0.86, 0.9, 100.0, 90.0)
    lines = [table.Line("ours-x", True, (tuned,)), table.Line("aimet-x", False, (tuned,))]
    assert table.findings(lines)[0].endswith("2.00: not less (wanted: less).")


def test_table_of_nothing_is_empty(table):
    assert "|" not in table.as_markdown([], "Head.")
    assert table.as_csv([]) == ""


def test_kept_outcome_is_read_again(tunings, tmp_path):
    tuning = tunings.Tuning("a", "m", "w", FineTune(), 9, 1, 0, "v")
    tuned = tunings.Tuned(0.37, 0.88, 0.82, 0.86, 0.9, 100.0, 90.0)
    assert tunings.stored(tuning, tmp_path) is None
    tunings.keep(tuning, tuned, tmp_path)
    assert tunings.stored(tuning, tmp_path) == tuned
    assert tunings.stored(dataclasses.replace(tuning, seed=1), tmp_path) is None
