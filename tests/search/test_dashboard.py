from __future__ import annotations

import csv
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import optuna
import pytest
from safetensors.torch import load

from compress_search.exceptions import StudyError
from compress_search.plan import CompressionPlan
from compress_search.search.compression_study import CompressionStudy
from compress_search.search.dashboard import DashboardServer
from compress_search.search.dashboard_files import files_of_trial
from compress_search.search.storage import open_storage
from compress_search.stage_files import WEIGHTS
from compress_search.workspace import Workspace

MakeStudy = Callable[..., CompressionStudy]
Serve = Callable[..., Any]

# (accuracy, mac_ratio, constraint): the infeasible trial dominates a feasible one.
TRIALS = ((0.90, 0.50, -0.01), (0.97, 0.48, 0.02), (0.95, 0.49, 0.0), (0.80, 0.51, -0.01))


def ask(server: Any, path: str, method: str = "GET", body: object = None) -> HTTPResponse:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server.root + path, method=method, data=data, headers={"Content-Type": "application/json"}
    )
    answer: HTTPResponse = urllib.request.urlopen(request, timeout=20)
    return answer


def details(server: Any, study_id: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.load(ask(server, f"/api/studies/{study_id}"))
    return found


def files_of(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {file["filename"]: file for file in found["artifacts"]}


@pytest.fixture
def study(synthetic_study: MakeStudy, tmp_path: Path) -> CompressionStudy:
    return synthetic_study(tmp_path / "runs", trials=8, unfinished=True)


@pytest.fixture(scope="module")
def shared(synthetic_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> CompressionStudy:
    """One for the tests that change nothing."""
    return synthetic_study(tmp_path_factory.mktemp("shared"), trials=8, unfinished=True)


@pytest.fixture(scope="module")
def server(shared: CompressionStudy, serving: Any) -> Iterator[Any]:
    with serving(shared) as server:
        yield server


@pytest.fixture
def foreign(study: CompressionStudy) -> optuna.Study:
    """A study of another program, in the same database."""
    other = optuna.create_study(
        storage=study.storage, study_name="other", directions=["maximize", "minimize"]
    )
    other.add_trials(
        optuna.trial.create_trial(
            values=[accuracy, mac_ratio],
            params={"x": 0.5},
            distributions={"x": optuna.distributions.FloatDistribution(0.5, 1.0)},
            user_attrs={"stages": ["of another program"]},
            constraints={"mine": constraint},
        )
        for accuracy, mac_ratio, constraint in TRIALS
    )
    other.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED))
    return other


def test_each_trial_has_its_constraint_and_the_front_is_the_feasible_one(
    shared: CompressionStudy, server: Any
) -> None:
    found = details(server)
    stored = shared.optuna_study.get_trials()
    assert [trial["constraints"] for trial in found["trials"]] == [[*t.constraints.values()] for t in stored]
    assert any(trial["constraints"] > [0] for trial in found["trials"])
    front = sorted(candidate.number for candidate in shared.front().best)
    assert [trial["number"] for trial in found["best_trials"]] == front
    assert found["objective_names"] == ["accuracy", "mac_ratio"]


def test_a_study_of_another_program_is_shown_as_it_is(
    study: CompressionStudy, foreign: optuna.Study, serve: Serve
) -> None:
    found = details(serve(study), foreign._study_id)
    assert [trial["constraints"] for trial in found["trials"]] == [[c] for _, _, c in TRIALS] + [[]]
    assert [trial["number"] for trial in found["best_trials"]] == [2]
    assert found["plotly_graph_objects"] == found["artifacts"] == []
    assert found["note"]["body"] == found["trials"][0]["note"]["body"] == ""
    assert "of another program" in json.dumps(found["trials"][0]["user_attrs"])


def test_the_page_of_the_study_is_served_on_this_machine_only(shared: CompressionStudy, server: Any) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(server.url, timeout=20) as page:
        assert b"<html" in page.read()


def test_looking_writes_nothing(study: CompressionStudy, foreign: optuna.Study, serve: Serve) -> None:
    def content() -> tuple[object, ...]:
        storage = open_storage(None, study.workspace)
        studies = storage.get_all_studies()
        trials = [storage.get_all_trials(item._study_id) for item in studies]
        storage.engine.dispose()
        return ([vars(item) for item in studies], trials)

    before = content()
    server = serve(study)
    for number in (1, 2):
        for file in (found := details(server, number))["artifacts"]:
            ask(server, f"/artifacts/{number}/{file['artifact_id']}").read()
        assert found["trials"]
    assert content() == before


def test_the_figures_are_the_reports_and_come_in_its_order(shared: CompressionStudy, server: Any) -> None:
    plots = details(server)["plotly_graph_objects"]
    assert [plot["id"] for plot in plots] == [
        "00-front",
        "01-stages",
        "02-curves",
        "03-split",
        "04-hypervolume",
        "05-times",
    ]
    front = json.loads(plots[0]["graph_object"])
    shown = [x for trace in front["data"] if trace["name"] == "trial on the front" for x in trace["x"]]
    assert shown == [candidate.mac_ratio for candidate in shared.front().best] * 2


def test_figures_and_notes_follow_the_study(study: CompressionStudy, serve: Serve) -> None:
    server = serve(study)
    before = details(server)["plotly_graph_objects"][0]["graph_object"]
    assert details(server)["plotly_graph_objects"][0]["graph_object"] == before
    best = study.front().best[-1]
    template = study.optuna_study.get_trials()[best.number]
    template.user_attrs["mac_ratio"] = 0.4911
    study.optuna_study.add_trial(template)
    after = details(server)
    assert "0.4911" not in before
    assert "0.4911" in after["plotly_graph_objects"][0]["graph_object"]
    assert f"Trial {template.number + 5} is complete" not in after["note"]["body"]


def test_with_the_task_the_best_trials_layers_have_macs(
    study: CompressionStudy, serve: Serve, tiny_task: Callable[..., Any]
) -> None:
    server = serve(study, load_task=tiny_task)
    best = study.front().choose()
    file = files_of(details(server)["trials"][best.number])["layers.csv"]
    path = f"/artifacts/1/{best.number + 1}/{file['artifact_id']}"
    rows = list(csv.DictReader(io.StringIO(ask(server, path).read().decode())))
    assert [(row["layer"], row["macs_before"], row["macs_after"]) for row in rows] == [
        ("0", str(4 * 9 * 36), str(3 * 9 * 36)),
        ("3", str(8 * 4 * 9 * 9), str(5 * 3 * 3 * 18 + 8 * 5 * 3 * 9)),
        ("7", "216", "216"),
    ]
    # That table was asked for last, so those of the front, which the first request began, are made too.
    found = details(server)
    assert "MACs before" in found["trials"][best.number]["note"]["body"]
    assert "06-times" in {plot["id"] for plot in found["plotly_graph_objects"]}


def test_a_task_that_cannot_be_made_costs_only_the_macs(
    study: CompressionStudy, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def load_task() -> Any:
        raise StudyError("The data is not here.")

    server = serve(study, load_task=load_task)
    file = files_of(details(server)["trials"][1])["layers.csv"]
    rows = list(csv.reader(io.StringIO(ask(server, f"/artifacts/1/2/{file['artifact_id']}").read().decode())))
    assert rows[0] == ["layer", "done", "left_alone"]
    assert ["3", "spatial SVD, rank 5; 3 channels in", ""] in rows
    assert caplog.text.count("The data is not here.") == 1


def test_the_files_are_the_stages_under_their_media_types(shared: CompressionStudy, server: Any) -> None:
    found = details(server)
    files = files_of(found["trials"][1])
    assert {name: file["mimetype"] for name, file in files.items()} == {
        "layers.csv": "text/csv",
        "plan.json": "application/json",
        "model.safetensors": "application/octet-stream",
    }
    answers = {n: ask(server, f"/artifacts/1/2/{file['artifact_id']}") for n, file in files.items()}
    assert {name: answer.headers["Content-Type"] for name, answer in answers.items()} == {
        name: file["mimetype"] for name, file in files.items()
    }
    assert answers["plan.json"].headers["X-Content-Type-Options"] == "nosniff"
    candidate = shared.candidates()[1]
    assert CompressionPlan.from_dict(json.load(answers["plan.json"])) == candidate.plan
    assert set(load(answers["model.safetensors"].read())) == set(load(candidate.weights.read_bytes()))
    picture = ask(server, f"/artifacts/1/{files_of(found)['front.png']['artifact_id']}")
    assert picture.headers["Content-Type"] == "image/png"
    assert picture.read().startswith(b"\x89PNG")


def test_a_file_that_is_gone_is_not_listed_and_not_found(study: CompressionStudy, serve: Serve) -> None:
    server = serve(study)
    files = files_of(details(server)["trials"][1])
    assert study.candidates()[6].folder is not None
    assert details(server)["trials"][6]["artifacts"] == []
    assert "have been removed" in details(server)["trials"][6]["note"]["body"]
    path = f"/artifacts/1/2/{files['model.safetensors']['artifact_id']}"
    weights = study.candidates()[1].weights
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(urllib.error.HTTPError, match="404") as damaged:
        ask(server, path)
    assert b"does not have the checksum" in damaged.value.read()
    weights.unlink()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, path)
    assert details(server)["trials"]


@pytest.mark.parametrize("key", ["../../../etc", "0" * 19, None, 7])
def test_a_database_cannot_name_files_elsewhere(key: object, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    trial = optuna.trial.create_trial(value=1.0, user_attrs={"stages": [{"key": key}]})
    assert files_of_trial(trial, tmp_path / "a" / "b" / "c") == {}


def test_a_note_of_the_users_own_stays_and_one_that_is_emptied_gives_way(
    study: CompressionStudy, serve: Serve
) -> None:
    server = serve(study)

    def note() -> dict[str, Any]:
        found: dict[str, Any] = details(server)["trials"][1]["note"]
        return found

    made = note()
    assert made["body"].startswith("**Trial 1 is complete.**")
    ask(server, "/api/studies/1/2/note", "PUT", {"version": made["version"] + 1, "body": "my own"})
    assert note() == {"version": made["version"] + 1, "body": "my own"}
    ask(server, "/api/studies/1/2/note", "PUT", {"version": made["version"] + 2, "body": ""})
    assert note() == {"version": made["version"] + 2, "body": made["body"]}


def test_studies_without_an_answer(study: CompressionStudy, serve: Serve) -> None:
    trials = study.optuna_study.get_trials()
    running, waiting = trials[-2:]
    kinds = {"empty": (), "failed": (trials[5],), "infeasible": (trials[3],), "begun": (running, waiting)}
    ids = {}
    for kind, chosen in kinds.items():
        alone = optuna.create_study(
            storage=study.storage, study_name=kind, directions=["maximize", "minimize"]
        )
        alone.set_user_attr("compress_search", study.optuna_study.user_attrs["compress_search"])
        alone.add_trials(chosen)
        ids[kind] = alone._study_id
    server = serve(study)
    for kind, chosen in kinds.items():
        found = details(server, ids[kind])
        assert len(found["trials"]) == len(chosen)
        assert found["best_trials"] == []
        assert found["plotly_graph_objects"][0]["id"] == "00-front"
        assert kind in found["note"]["body"]
        picture = files_of(found)["front.png"]["artifact_id"]
        assert ask(server, f"/artifacts/{ids[kind]}/{picture}").read().startswith(b"\x89PNG")
    begun, waits = details(server, ids["begun"])["trials"]
    assert "Trial 0 is running." in begun["note"]["body"]
    assert "| fine\\_tune | 1 of 2 epochs done |" in begun["note"]["body"]
    assert "Trial 1 is waiting." in waits["note"]["body"]


def test_one_odd_trial_does_not_take_the_dashboard_along(
    study: CompressionStudy, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    # Complete, but without what the objective writes.
    study.optuna_study.add_trial(optuna.trial.create_trial(values=[0.5, 0.5]))
    server = serve(study)
    assert len(details(server)["trials"]) == len(details(server)["trials"]) == 13
    assert caplog.text.count("without notes and plots") == 1


def test_a_taken_port_is_an_error_with_a_remedy_before_anything_starts(
    shared: CompressionStudy, server: Any
) -> None:
    port = int(server.root.rpartition(":")[2])
    with pytest.raises(
        StudyError, match=rf"Port {port} .* is taken by another program. Choose another: --port"
    ):
        shared.serve_dashboard(port=port)


def test_a_port_that_does_not_exist_is_an_error(shared: CompressionStudy) -> None:
    with pytest.raises(StudyError, match="Port 99999 .* cannot be used"):
        shared.serve_dashboard(port=99999)


def test_python_serves_it_until_ctrl_c(
    shared: CompressionStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(server: DashboardServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DashboardServer, "serve_forever", interrupted)
    shared.serve_dashboard(port=0, read_only=True)
    shown = capsys.readouterr().out
    assert re.fullmatch(r"http://127.0.0.1:\d+/dashboard/studies/1\nCtrl-C ends it.\n", shown)


def test_deleting_a_study_keeps_its_stages(study: CompressionStudy, serve: Serve) -> None:
    weights = study.candidates()[1].weights
    ask(serve(study), "/api/studies/1", "DELETE", {"remove_associated_artifacts": True})
    assert weights.is_file()
    assert weights.name == WEIGHTS
    assert open_names(study.workspace) == []


def open_names(workspace: Workspace) -> list[str]:
    storage = open_storage(None, workspace)
    names = [study.study_name for study in storage.get_all_studies()]
    storage.engine.dispose()
    return names
