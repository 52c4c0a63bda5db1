from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress_search.recipe import FineTune
from compress_search.reports.layers import LayerRow
from compress_search.reports.page import ReportFiles, write_report
from compress_search.results import Candidate, ParetoFront

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
    assert all(getattr(files, field.name).is_file() for field in dataclasses.fields(files))
    for path in (files.page, files.plot):
        page = _read(path)
        assert page.loads == []
        # The JSON of the figure, plotly.js once, and the lines that draw.
        assert [len(script) > 1_000_000 for script in page.scripts] == [False, True, False]
        assert path.stat().st_size < 10_000_000
    assert {path.name for path in files.page.parent.iterdir()} == {
        "report.html",
        "front.html",
        "front.png",
        "candidates.csv",
    }


def test_the_answer_comes_first(front: ParetoFront, tmp_path: Path) -> None:
    text = _read(_write(tmp_path, front, front.best[-1], test=(0.96, 0.95)).page).text
    assert "The answer: trial 1" in text
    assert "validation accuracy 97.50 % original 98.00 %, drop +0.50 points" in text
    assert "test accuracy 95.00 % original 96.00 %, drop +1.00 points" in text
    assert "MACs per example 500 k of 1.00 M" in text
    assert text.index("The answer") < text.index("Accuracy against MACs") < text.index("All trials")


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
    files = write_report(
        tmp_path,
        title=NASTY,
        front=make_front(chosen, failed),
        chosen=chosen,
        layers=[row],
        settings={NASTY: NASTY},
    )
    for path, least in ((files.page, 10), (files.plot, 2)):
        page = _read(path)
        assert len(page.scripts) == 3
        assert "img" not in page.tags
        # Said as text, once for each place it was given.
        assert page.text.count("onerror=alert(1)") >= least
        json.loads(page.scripts[0])


@pytest.mark.parametrize("case", ["empty", "failed", "outside", "not chosen"])
def test_a_study_without_an_answer_says_why(
    case: str, make_candidate: Make, make_front: MakeFront, tmp_path: Path
) -> None:
    front, words = {
        "empty": (make_front(), "The study has no trial yet"),
        "failed": (
            make_front(make_candidate(0, 0.5, 0.9, state="failed", reason="it broke")),
            "No trial has completed",
        ),
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
    text = _read(_write(tmp_path, front, front.best[0], layers=rows).page).text
    assert re.search(r"conv1\s+Conv2d\s+spatial SVD, rank 9\s+300\s+100\s+0\.3333", text)
    assert re.search(r"fc\s+Linear\s+nothing\s+100\s+100\s+1\.0000\s+spatial SVD: it is a Linear", text)
    assert re.search(r"all layers\s+400\s+200\s+0\.5000", text)


def test_the_exported_files_are_preferred_for_loading(front: ParetoFront, tmp_path: Path) -> None:
    export = tmp_path / "export"
    gone = _read(_write(tmp_path, front, front.best[0], export_folder=export).page).text
    assert "weights.safetensors" in gone
    export.mkdir()
    (export / "model.safetensors").touch()
    there = _read(_write(tmp_path, front, front.best[0], export_folder=export).page).text
    assert json.dumps(str(export / "model.safetensors")) in there
    assert "torch.export.load" not in there
    (export / "model.pt2").touch()
    assert (
        "torch.export.load" in _read(_write(tmp_path, front, front.best[0], export_folder=export).page).text
    )


def test_writing_again_replaces_every_file(front: ParetoFront, make_front: MakeFront, tmp_path: Path) -> None:
    _write(tmp_path, front, front.best[0])
    files = _write(tmp_path, make_front())
    assert "The study has no trial yet" in _read(files.page).text
    assert files.table.read_text().count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 4
