from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress_search.latency import LatencyRow, LatencyTable, Spread
from compress_search.recipe import FineTune
from compress_search.reports.layers import LayerRow
from compress_search.reports.page import Details, ReportFiles, write_report
from compress_search.reports.sensitivity import StageSensitivity
from compress_search.results import Candidate, ParetoFront
from compress_search.selection.table import Cell, SensitivityTable

Make = Callable[..., Candidate]
MakeFront = Callable[..., ParetoFront]
NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


class _Page(HTMLParser):
    """Tags, texts outside of scripts, and what the page would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        self.loads += [value or "" for name, value in attrs if name == "src" or (tag == "link" and value)]

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += " ".join(data.split()) + " "


def _texts(value: Any) -> list[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inside for text in _texts(item)]


def _read(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def _write(folder: Path, front: ParetoFront, chosen: Candidate | None = None, **more: Any) -> ReportFiles:
    return write_report(folder, title="digits", front=front, chosen=chosen, **more)


@pytest.fixture
def front(make_candidate: Make, make_front: MakeFront) -> ParetoFront:
    return make_front(
        make_candidate(0, 0.495, 0.970),
        make_candidate(1, 0.500, 0.975, reused=2),
        make_candidate(2, 0.700, 0.979),
        make_candidate(3, 0.5, 0.9, state="pruned", reason="the drop after spatial_svd is 0.17"),
        make_candidate(4, 0.5, 0.9, state="failed", reason="RatioError: cannot be reached"),
        make_candidate(5, 0.5, 0.9, state="running", stages=(), params={}),
    )


def test_the_page_needs_nothing_else(front: ParetoFront, tmp_path: Path) -> None:
    files = _write(tmp_path / "new" / "folder", front, front.best[-1])
    for path in (files.page, files.plot):
        page = _read(path)
        assert page.loads == []
        # The figures' JSON, what sorts tables, plotly.js once, and the lines that draw.
        assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
        assert path.stat().st_size < 10_000_000
    written = {files.page, files.plot, files.picture, files.table, *files.more_tables}
    assert set(files.page.parent.iterdir()) == written
    assert {path.name for path in written if path.suffix != ".parquet"} == {
        "report.html",
        "front.html",
        "front.png",
        "candidates.csv",
        "latency.csv",
        "layers.csv",
        "sensitivity.csv",
        "stages.csv",
    }


def test_the_answer_comes_first(front: ParetoFront, tmp_path: Path) -> None:
    text = _read(_write(tmp_path, front, front.best[-1], details=Details(test=(0.96, 0.95))).page).text
    assert "The answer: trial 1" in text
    assert "validation accuracy 97.50 % original 98.00 %, drop +0.50 points" in text
    assert "test accuracy 95.00 % original 96.00 %, drop +1.00 points" in text
    assert "MACs per example 500 k of 1.00 M" in text
    assert text.index("The answer") < text.index("Accuracy against MACs") < text.index("All trials")


def test_the_answer_has_the_measured_latency(front: ParetoFront, tmp_path: Path) -> None:
    rows = (
        LatencyRow(
            "eager",
            1,
            {"original": Spread(0.004, 0.003, 0.005, 20), "compressed": Spread(0.002, 0.001, 0.003, 20)},
        ),
        LatencyRow("onnxruntime", 32, {}, f"it is not installed {NASTY}"),
    )
    table = LatencyTable("a processor", 2, "2.15", 0.5, rows)
    files = _write(tmp_path, front, front.best[-1], details=Details(latency=table))
    text = _read(files.page).text
    assert "eager 1 4.00 (3.00-5.00) 2.00 (1.00-3.00) 2.00" in text
    assert "on a processor, 2 threads" in text
    assert "MACs are not latency" not in text
    assert "left out: it is not installed </script>" in text
    assert text.index("The answer") < text.index("Measured latency") < text.index("Accuracy against MACs")
    assert (tmp_path / "latency.csv").read_text().splitlines()[1:3] == [
        "eager,1,original,0.004,0.003,0.005,20,,a processor,2,2.15",
        "eager,1,compressed,0.002,0.001,0.003,20,,a processor,2,2.15",
    ]
    slow = dataclasses.replace(table, mac_ratio=0.25)
    text = _read(_write(tmp_path, front, front.best[-1], details=Details(latency=slow)).page).text
    assert "MACs are not latency: there are 4.00 times fewer of them." in text
    # Not measured, none is claimed.
    other = _write(tmp_path, front, front.best[-1])
    assert "Measured latency" not in _read(other.page).text
    assert (tmp_path / "latency.csv").read_text().count("\n") == 1


def test_without_a_test_score_none_is_claimed(front: ParetoFront, tmp_path: Path) -> None:
    assert "test accuracy" not in _read(_write(tmp_path, front, front.best[-1]).page).text


def test_the_figure_of_the_page_has_the_points_of_the_study(front: ParetoFront, tmp_path: Path) -> None:
    figures = json.loads(_read(_write(tmp_path, front).page).scripts[0])
    assert set(figures["layouts"]) == {"wide", "narrow"}
    assert set(figures["layouts"]["narrow"]) == {"light", "dark"}
    points = {
        (x, round(y, 6))
        for trace in figures["data"]
        if trace["name"].startswith("trial ")
        for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert points == {(0.495, 97.0), (0.5, 97.5), (0.7, 97.9)}


def test_every_trial_is_listed_with_its_state_and_reason(front: ParetoFront, tmp_path: Path) -> None:
    text = _read(_write(tmp_path, front).page).text
    for word in ("on the front", "outside the band", "pruned", "failed", "running", "(reused)"):
        assert word in text
    for candidate in front.candidates[3:5]:
        assert candidate.reason
        assert text.count(candidate.reason) == 2
    assert "6 trials: 3 complete, 1 pruned, 1 failed, 1 running; 2 in the band." in text


def test_text_from_outside_is_escaped_everywhere(
    make_candidate: Make, make_front: MakeFront, tmp_path: Path
) -> None:
    chosen = make_candidate(0, 0.5, 0.97, params={NASTY: 0.5}, folder=Path(NASTY))
    failed = make_candidate(1, 0.5, 0.9, state="failed", reason=NASTY)
    row = LayerRow(NASTY, NASTY, NASTY, 10, 5, NASTY)
    cells = (Cell(NASTY, 1, 0.5), Cell(NASTY, 2, 0.1))
    table = StageSensitivity("spatial_svd", "divergence (nats)", SensitivityTable(cells))
    files = write_report(
        tmp_path,
        title=NASTY,
        front=make_front(chosen, failed),
        chosen=chosen,
        details=Details(layers=[row], sensitivities=[table], fault=NASTY),
        settings={NASTY: NASTY},
    )
    for path, least in ((files.page, 11), (files.plot, 2)):
        page = _read(path)
        assert "img" not in page.tags
        # Said as text, once for each place it was given.
        assert page.text.count("onerror=alert(1)") >= least
        assert not any(script.startswith("alert") for script in page.scripts)
        figures = [json.loads(script) for script in page.scripts if script.startswith("{")]
        # Plotly reads tags in texts: what came from outside has none.
        assert figures
        assert not any("<img" in text or "<script" in text for text in _texts(figures))


def test_a_damaged_model_is_said_in_place_of_how_to_load_it(front: ParetoFront, tmp_path: Path) -> None:
    details = Details(fault="The stored model of trial 1 is damaged")
    text = _read(_write(tmp_path, front, front.best[-1], details=details).page).text
    assert "The answer: trial 1" in text
    assert "The stored model of trial 1 is damaged" in text
    assert "Load it" not in text


def test_only_a_page_of_a_running_study_reads_itself_again(front: ParetoFront, tmp_path: Path) -> None:
    still = _write(tmp_path, front).page.read_text(encoding="utf-8")
    running = _write(tmp_path, front, refresh=7.5).page.read_text(encoding="utf-8")
    assert "reads itself again every 7.5 s" in running
    assert "followStudy(7.5)" in running
    assert "followStudy(7" not in still
    assert "reads itself again every" not in still


def test_every_column_of_the_trials_can_be_sorted_with_the_keyboard(
    front: ParetoFront, tmp_path: Path
) -> None:
    html = _write(tmp_path, front).page.read_text(encoding="utf-8")
    table = html[html.index('<table id="trials"') :]
    head = table[: table.index("</thead>")]
    assert head.count("<th") - head.count("<thead") == head.count('<button type="button">') == 12
    # What is written for people is not what is sorted by.
    assert re.search(r'<td class="number" data-value="0.975">\s*97.50 %</td>', table)


def test_a_study_of_five_hundred_trials_makes_a_page_below_ten_megabytes(
    many_trials: Callable[[int], ParetoFront], tmp_path: Path
) -> None:
    front = many_trials(500)
    rows = [LayerRow(f"layer{n}.conv", "Conv2d", f"rank {n}", 1000 + n, 500, "") for n in range(60)]
    cells = tuple(Cell(f"layer{n}.conv", size, 1.0 / size) for n in range(60) for size in range(1, 10))
    table = StageSensitivity("spatial_svd", "divergence (nats)", SensitivityTable(cells))
    files = _write(
        tmp_path, front, front.best[-1], details=Details(layers=rows, sensitivities=[table, table])
    )
    assert files.page.stat().st_size < 10_000_000
    page = _read(files.page)
    assert page.tags.count("tr") > 500 + 60


@pytest.mark.parametrize("case", ["empty", "failed", "running", "outside", "not chosen"])
def test_a_study_without_an_answer_says_why(
    case: str, make_candidate: Make, make_front: MakeFront, tmp_path: Path
) -> None:
    front, words = {
        "empty": (make_front(), "The study has no trial yet"),
        "failed": (
            make_front(make_candidate(0, 0.5, 0.9, state="failed", reason="it broke")),
            "No trial has completed",
        ),
        "running": (make_front(make_candidate(0, 0.5, 0.9, state="running")), "No trial has completed"),
        "outside": (
            make_front(make_candidate(0, 0.9, 0.97), make_candidate(1, 0.6, 0.97)),
            "the nearest is trial 1 at 0.6000",
        ),
        "not chosen": (make_front(make_candidate(0, 0.5, 0.5)), "none keeps the accuracy that was asked"),
    }[case]
    text = _read(_write(tmp_path, front).page).text
    assert "No model to ship yet" in text
    assert words in text


def test_a_chosen_model_outside_the_band_is_called_that(
    make_candidate: Make, make_front: MakeFront, tmp_path: Path
) -> None:
    far = make_candidate(0, 0.9, 0.97)
    assert "does not meet the target" in _read(_write(tmp_path, make_front(far), far).page).text


def test_settings_are_written_out(front: ParetoFront, tmp_path: Path) -> None:
    settings = {"methods": ("a", "b"), "fine_tune": FineTune(epochs=7), "nested": {"deep": {"er": 3}}}
    text = _read(_write(tmp_path, front, settings=settings).page).text
    for name, value in [
        ("methods", "a, b"),
        ("fine_tune.epochs", "7"),
        ("nested.deep.er", "3"),
        ("torch", ""),
    ]:
        assert f"{name} {value}" in text


def test_layers_are_listed_with_their_sum(front: ParetoFront, tmp_path: Path) -> None:
    rows = [
        LayerRow("conv1", "Conv2d", "spatial SVD, rank 9", 300, 100, ""),
        LayerRow("fc", "Linear", "", 100, 100, "spatial SVD: it is a Linear"),
    ]
    text = _read(_write(tmp_path, front, front.best[0], details=Details(layers=rows)).page).text
    assert re.search(r"conv1\s+Conv2d\s+spatial SVD, rank 9\s+300\s+100\s+0\.3333", text)
    assert re.search(r"fc\s+Linear\s+nothing\s+100\s+100\s+1\.0000\s+spatial SVD: it is a Linear", text)
    assert re.search(r"all layers\s+400\s+200\s+0\.5000", text)


def test_the_exported_files_are_preferred_for_loading(front: ParetoFront, tmp_path: Path) -> None:
    export = tmp_path / "export"
    gone = _read(_write(tmp_path, front, front.best[0], details=Details(export_folder=export)).page).text
    assert "weights.safetensors" in gone
    export.mkdir()
    (export / "model.safetensors").touch()
    there = _read(_write(tmp_path, front, front.best[0], details=Details(export_folder=export)).page).text
    assert json.dumps(str(export / "model.safetensors")) in there
    assert "torch.export.load" not in there
    (export / "model.pt2").touch()
    assert (
        "torch.export.load"
        in _read(_write(tmp_path, front, front.best[0], details=Details(export_folder=export)).page).text
    )


def test_writing_again_replaces_every_file(front: ParetoFront, make_front: MakeFront, tmp_path: Path) -> None:
    _write(tmp_path, front, front.best[0])
    files = _write(tmp_path, make_front())
    assert "The study has no trial yet" in _read(files.page).text
    assert files.table.read_text().count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 4 + len(files.more_tables)
