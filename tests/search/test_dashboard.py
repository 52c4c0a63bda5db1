from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage

from compress_search.exceptions import StudyError
from compress_search.search.dashboard import DashboardServer, FeasibilityView

# (accuracy, mac_ratio, constraint): the infeasible trial dominates a feasible one.
TRIALS = ((0.90, 0.50, -0.01), (0.97, 0.48, 0.02), (0.95, 0.49, 0.0), (0.80, 0.51, -0.01))


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[RDBStorage]:
    storage = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.create_study(storage=storage, study_name="own", directions=["maximize", "minimize"])
    for accuracy, mac_ratio, constraint in TRIALS:
        trial = study.ask()
        trial.suggest_float("c_ssvd", 0.5, 1.0)
        trial.set_constraint("mac_ratio", constraint)
        study.tell(trial, [accuracy, mac_ratio])
    study.tell(study.ask(), state=optuna.trial.TrialState.PRUNED)
    yield storage
    storage.engine.dispose()


def read(server: DashboardServer, path: str) -> bytes:
    root = server.url.partition("/dashboard")[0]
    with urllib.request.urlopen(root + path, timeout=20) as answer:
        body: bytes = answer.read()
    return body


@pytest.fixture
def server(storage: RDBStorage) -> Iterator[DashboardServer]:
    with DashboardServer(storage, "own", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_dashboard_gets_each_trials_constraint_and_the_feasible_front(server: DashboardServer) -> None:
    study: dict[str, Any] = json.loads(read(server, "/api/studies/1"))
    assert [trial["constraints"] for trial in study["trials"]] == [[c] for _, _, c in TRIALS] + [[]]
    assert [trial["number"] for trial in study["best_trials"]] == [2]


def test_the_page_of_the_study_is_served_on_this_machine_only(server: DashboardServer) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert b"<html" in read(server, "/dashboard/studies/1")


def test_the_view_changes_nothing_in_the_storage(storage: RDBStorage) -> None:
    view = FeasibilityView(storage)
    for _ in range(2):
        viewed = view.get_all_trials(1)
    assert [trial.system_attrs for trial in viewed[:4]] == [{"constraints": [c]} for _, _, c in TRIALS]
    assert view.get_trial(2).system_attrs == {"constraints": [0.02]}
    stored = storage.get_all_trials(1)
    assert [trial.constraints for trial in stored[:4]] == [{"mac_ratio": c} for _, _, c in TRIALS]


def test_a_taken_port_is_an_error_with_a_remedy(storage: RDBStorage, server: DashboardServer) -> None:
    port = int(server.url.split(":")[2].partition("/")[0])
    with pytest.raises(
        StudyError, match=rf"Port {port} .* is taken by another program. Choose another: --port"
    ):
        DashboardServer(storage, "own", port=port)


def test_a_port_that_does_not_exist_is_an_error(storage: RDBStorage) -> None:
    with pytest.raises(StudyError, match="Port 99999 .* cannot be used"):
        DashboardServer(storage, "own", port=99999)
