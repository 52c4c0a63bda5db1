"""Reports of studies with something odd in them: a model that was deleted, and HTML."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from markupsafe import escape

from compress_search.exceptions import PlanError
from compress_search.search.compression_study import CompressionStudy

HTML = "<img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def study(
    synthetic_study: Callable[..., CompressionStudy], tmp_path_factory: pytest.TempPathFactory
) -> CompressionStudy:
    # The last trial has failed, with HTML in its reason.
    study = synthetic_study(tmp_path_factory.mktemp("odd"), trials=6)
    study.optuna_study.set_user_attr(HTML, HTML)
    return study


def test_html_is_text_in_the_report(study: CompressionStudy) -> None:
    page = study.report().page.read_text(encoding="utf-8")
    assert escape(HTML) in page
    assert HTML not in page


def test_the_report_says_what_is_wrong_with_a_model_that_was_deleted(
    study: CompressionStudy, tmp_path: Path
) -> None:
    best = study.front().choose()
    assert best.folder is not None
    shutil.copytree(best.folder, tmp_path / "kept")
    shutil.rmtree(best.folder)
    with pytest.raises(PlanError) as gone:
        best.plan  # noqa: B018
    page = study.report(best).page.read_text(encoding="utf-8")
    shutil.copytree(tmp_path / "kept", best.folder)
    assert f"The answer: trial {best.number}" in page
    assert escape(str(gone.value)) in page
    assert "Load it" not in page
    assert "Load it" in study.report(best).page.read_text(encoding="utf-8")
