from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard._app as dashboard_app
import pytest

from compress_search.search.compression_study import CompressionStudy
from compress_search.search.dashboard_access import why_refused
from compress_search.search.storage import open_storage

# Looked at for optuna-dashboard 0.21: none of these writes anything.
READING = {
    "/",
    "/api/meta",
    "/api/studies",
    "/api/studies/<study_id:int>",
    "/api/studies/<study_id:int>/param_importances",
    "/api/studies/<study_id:int>/plot/<plot_type>",
    "/artifacts/<study_id:int>/<artifact_id:re:[0-9a-fA-F-]+>",
    "/artifacts/<study_id:int>/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>",
    "/csv/<study_id:int>",
    "/dashboard<:re:(/.*)?>",
    "/favicon.ico",
    "/incompatible-rdb-schema",
    "/static/<filename:path>",
}
BODY = {
    "study_name": "renamed",
    "directions": ["minimize"],
    "version": 2,
    "body": "changed",
    "state": "Fail",
    "user_attrs": {"changed": 1},
    "file": "data:text/plain;base64,YQ==",
    "filename": "a.html",
    "output_type": "note",
    "mode": "ChooseWorst",
    "candidates": [1],
    "clicked": 1,
}


@pytest.fixture
def study(synthetic_study: Callable[..., CompressionStudy], tmp_path: Path) -> CompressionStudy:
    return synthetic_study(tmp_path / "runs", trials=4, unfinished=True)


def content(study: CompressionStudy) -> object:
    storage = open_storage(None, study.workspace)
    found = [(vars(s), storage.get_all_trials(s._study_id)) for s in storage.get_all_studies()]
    storage.engine.dispose()
    return found


def routes() -> set[tuple[str, str]]:
    app = dashboard_app.create_app(optuna.storages.InMemoryStorage())
    return {(route.method, route.rule) for route in app.routes}


def path_of(rule: str) -> str:
    ids = {"study_id": "1", "trial_id": "2", "artifact_id": "00000000000000000000-a1", "history_id": "x"}
    return re.sub(r"<(\w+)[^>]*>", lambda match: ids.get(match[1], "x"), rule)


def ask(server: Any, method: str, path: str) -> tuple[int, bytes]:
    request = urllib.request.Request(
        server.root + path,
        method=method,
        data=json.dumps(BODY).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_what_the_dashboard_can_read_was_looked_at() -> None:
    assert {rule for method, rule in routes() if method == "GET"} == READING


@pytest.mark.filterwarnings("default")
def test_read_only_refuses_every_request_that_could_change_something(
    study: CompressionStudy, serve: Callable[..., Any]
) -> None:
    before = content(study)
    server = serve(study, read_only=True)
    changing = {(method, path_of(rule)) for method, rule in routes() if method != "GET"}
    assert len(changing) > 15
    for method, path in changing:
        for spelling in (path, f"{path}/"):
            status, answer = ask(server, method, spelling)
            assert (status, "read-only" in json.loads(answer)["reason"]) == (403, True), (method, spelling)
    for method in ("PATCH", "OPTIONS", "delete", "get", "TRACE"):
        assert ask(server, method, "/api/studies/1")[0] == 403
    for rule in READING - {"/static/<filename:path>", "/"}:
        assert ask(server, "GET", path_of(rule))[0] in (200, 302, 404), rule
    assert content(study) == before


def test_without_it_studies_can_be_deleted_but_not_renamed_nor_their_files_touched(
    study: CompressionStudy, serve: Callable[..., Any]
) -> None:
    before = content(study)
    server = serve(study)
    files = "/api/artifacts/1/00000000000000000000-a1"
    for method, path in (
        ("POST", "/api/studies/1/rename"),
        ("POST", "/api/studies/1/rename/"),
        ("POST", "/api/artifacts/1"),
        ("POST", "/api/artifacts/1/7"),
        ("DELETE", files),
    ):
        status, answer = ask(server, method, path)
        assert status == 403
        assert re.search("not renamed here|`compress-search cache prune`", json.loads(answer)["reason"])
    assert content(study) == before
    assert ask(server, "DELETE", "/api/studies/1")[0] == 204
    assert content(study) == []


@pytest.mark.parametrize("read_only", [True, False])
def test_reading_is_never_refused(read_only: bool) -> None:
    paths = ("/api/studies/1/rename", "/api/artifacts/1/2", "/dashboard")
    assert {why_refused(m, p, read_only=read_only) for m in ("GET", "HEAD") for p in paths} == {None}


def test_a_refusal_reaches_a_client_that_sends_a_lot(
    study: CompressionStudy, serve: Callable[..., Any]
) -> None:
    server = serve(study, read_only=True)
    request = urllib.request.Request(server.root + "/api/artifacts/1", method="POST", data=b"x" * 900_000)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=20)
