from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable

import pytest
import torch
from markdown_it import MarkdownIt
from torch import nn

from compress_search.plan import CompressionPlan
from compress_search.search.compression_study import CompressionStudy
from compress_search.search.trial_note import escape_markdown, study_note, trial_note

# As the dashboard reads notes: tables and automatic links beside CommonMark, and here HTML is let through.
MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": False})


@pytest.fixture(scope="module")
def study(
    synthetic_study: Callable[..., CompressionStudy], tmp_path_factory: pytest.TempPathFactory
) -> CompressionStudy:
    return synthetic_study(tmp_path_factory.mktemp("runs"), trials=8, unfinished=True)


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "**bold** _it_ ~~gone~~ `code`",
        "[a](http://b) ![c](d) <http://e> me@f.org",
        "&lt;b&gt; \\< \\",
        "a | b",
    ],
)
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    shown = MARKDOWN.render(f"x {escape_markdown(text)} y")
    inner = shown.removeprefix("<p>x ").removesuffix(" y</p>\n")
    assert "<" not in inner
    assert html.unescape(inner) == text


def test_escaped_text_stays_on_its_line() -> None:
    assert escape_markdown("a\n\n# b\r\n\t* c") == "a # b \\* c"


def note_of(study: CompressionStudy, number: int) -> str:
    trial = study.trial_history(number)
    folder = trial.folder if trial.folder is not None and trial.folder.is_dir() else None
    plan = None if folder is None else CompressionPlan.load(folder / "plan.json")
    return trial_note(trial, reference=study.reference, folder=folder, plan=plan)


def test_an_infeasible_trial_is_called_that(study: CompressionStudy) -> None:
    assert note_of(study, 3).startswith("**Trial 3 is complete, but outside the band: it does not meet")
    assert note_of(study, 1).startswith("**Trial 1 is complete.**")


def table(note: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its header."""
    lines = note.partition(f"### {heading}\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_note_tells_what_each_stage_gave_and_what_was_reused(study: CompressionStudy) -> None:
    candidate = study.candidates()[1]
    rows = table(note_of(study, 1), "Stages")
    assert [row[0].replace("\\", "") for row in rows] == [
        "original model",
        "spatial_svd",
        "fine_tune after spatial_svd",
        "channel_pruning",
        "fine_tune after channel_pruning",
    ]
    assert [row[1] for row in rows] == [
        "",
        "reused, saved 10.0 s",
        "reused, saved 11.0 s",
        "12.0 s",
        "13.0 s",
    ]
    assert [row[2] for row in rows[1:]] == [f"{stage.accuracy:.4f}" for stage in candidate.stages]
    assert [row[4] for row in rows[1:]] == [f"{stage.macs:,}" for stage in candidate.stages]


def test_a_note_tells_what_became_of_each_layer(study: CompressionStudy) -> None:
    rows = {row[0]: row[1] for row in table(note_of(study, 1), "Layers")}
    assert rows == {
        "3": "spatial SVD, rank 5; 3 channels in",
        "0": "3 channels out",
        "1": "3 channels out",
        "7": "",
    }


def test_the_code_of_a_note_loads_the_model(
    study: CompressionStudy, tiny_net: Callable[..., nn.Module]
) -> None:
    code = note_of(study, 1).partition("```python\n")[2].partition("```")[0]
    names: dict[str, object] = {"original": tiny_net()}
    exec(code, names)
    loaded, wanted = names["model"], study.candidates()[1].load_model(tiny_net())
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(loaded.state_dict(), wanted.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (4, "**Trial 4 is pruned: after spatial\\_svd, fine\\_tune the accuracy is too low.**"),
        (5, "* Replaced by trial 9, which goes on from its stages and does count."),
        (6, "Its plan and weights have been removed from "),
        (8, "* Finalist: trains the model of trial 0 on."),
        (9, "* Retry of trial 5; 1 in a row died without finishing anything more."),
        (10, "| fine\\_tune | 1 of 2 epochs done |"),
        (11, "**Trial 11 is waiting.**"),
    ],
)
def test_trials_of_every_kind_have_a_note(study: CompressionStudy, number: int, said: str) -> None:
    assert said in note_of(study, number)


def test_what_a_user_wrote_is_shown_as_it_is_in_every_part_of_a_note(study: CompressionStudy) -> None:
    shown = MARKDOWN.render(note_of(study, 5))
    assert not re.search("<(img|script|a|del)|<strong>bold", shown)
    # The headline, a layer's reason, the traceback.
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "<pre><code>File ```x.py```\n" in shown


def test_the_note_of_a_study_names_its_best(study: CompressionStudy) -> None:
    note = study_note(study.front(), name=study.name)
    best = study.front().choose()
    assert f"**trial {best.number}**, {best.accuracy:.4f}" in note
    assert "compress-search status synthetic\n" in note
    assert f"compress-search export synthetic --trial {best.number}\n" in note


def test_the_note_of_a_study_without_an_answer_exports_nothing(study: CompressionStudy) -> None:
    none = dataclasses.replace(study.front(), candidates=())
    note = study_note(none, name=study.name)
    assert "compress-search report synthetic\n" in note and "export" not in note
