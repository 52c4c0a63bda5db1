from __future__ import annotations

import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest

from compress_search.cli import main
from compress_search.latency import LatencyTable
from compress_search.search.dashboard import DashboardServer
from compress_search.search.study import CompressionStudy, create_study, load_study
from compress_search.task_path import load_task
from compress_search.workspace import Workspace

Finished = tuple[Path, str, str]
Patch = pytest.MonkeyPatch
Output = pytest.CaptureFixture[str]


@pytest.fixture
def copy(finished: Finished, project: Path) -> Path:
    """The finished study, copied into the project."""
    shutil.copytree(finished[0] / "runs", project / "runs")
    return project


def test_run_prints_the_answer_and_where_it_lies(finished: Finished) -> None:
    folder, shown, _ = finished
    front = load_study("tiny", workspace=folder / "runs").front()
    assert str(front) in shown
    assert f"Chosen: trial {front.choose().number} (the most accurate one in the band)" in shown
    assert re.search(r"Test accuracy [\d.]+ %; the original's [\d.]+ %", shown)
    for label in ("Report", "Plot", "Picture", "Model"):
        found = re.search(rf"^{label} +(.+)$", shown, re.MULTILINE)
        assert found is not None
        assert (folder / found[1]).exists()


def test_without_a_terminal_progress_is_lines_of_text(finished: Finished) -> None:
    folder, _, lines = finished
    assert re.search(r"^\d\d:\d\d:\d\d trials 2/2: trial 1 .* left\)$", lines, re.MULTILINE)
    assert "\x1b" not in lines
    assert "trials 2/2: trial 1" in (folder / "runs/tiny/study.log").read_text()


def test_run_again_runs_nothing_and_answers_the_same(copy: Path, finished: Finished, capsys: Output) -> None:
    assert main(["run", "tiny.yaml"]) == 0
    shown = capsys.readouterr()
    assert shown.out == finished[1]
    assert "nothing to do" in shown.err


def test_run_with_other_settings_is_refused_and_changes_nothing(copy: Path, capsys: Output) -> None:
    saved = (copy / "runs/tiny/config.yaml").read_text()
    assert main(["run", "tiny.yaml", "target=0.5"]) == 2
    error = capsys.readouterr().err
    assert "target: stored 0.6, asked 0.5" in error
    assert "name=tiny-2" in error
    assert (copy / "runs/tiny/config.yaml").read_text() == saved


def test_resume_raises_the_total(copy: Path, capsys: Output) -> None:
    assert main(["resume", "tiny", "--n-trials", "3"]) == 0
    assert len(load_study("tiny").candidates()) == 3
    assert main(["status", "tiny"]) == 0
    assert "3 of 3 trials finished" in capsys.readouterr().out


def test_a_changed_recipe_is_gone_on_with_when_it_is_accepted(copy: Path, capsys: Output) -> None:
    config = copy / "runs/tiny/config.yaml"
    config.write_text(
        re.sub(r"^fine_tune:\n  epochs: 1$", "fine_tune:\n  epochs: 2", config.read_text(), flags=re.M)
    )
    assert main(["resume", "tiny"]) == 2
    error = capsys.readouterr().err
    assert (
        "  - fine_tune.epochs: stored 1, asked 2\n" in error and "--accept-changed (of run, resume" in error
    )
    assert main(["resume", "tiny", "--n-trials", "3", "--accept-changed"]) == 0
    assert "goes on with what has changed. fine_tune.epochs: 1 before trial 2" in capsys.readouterr().err
    assert main(["status", "tiny"]) == 0
    assert "Changed: fine_tune.epochs: 1 before trial 2, 2 from it on." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["worker", "resume"])
def test_a_workspace_that_is_not_the_studys_is_refused(command: str, copy: Path, capsys: Output) -> None:
    storage = f"sqlite:///{copy / 'runs/study.db'}"
    assert main([command, "tiny", "--workspace", "other", "--storage", storage]) == 2
    error = capsys.readouterr().err
    assert f"(token {Workspace(copy / 'runs').token})', asked '{copy / 'other'} on " in error
    assert "  - workspace: stored '/" in error and "mount it here" in error
    assert not (copy / "other").exists()


def test_a_worker_joins_in_a_copied_workspace_once_that_is_accepted(copy: Path, capsys: Output) -> None:
    shutil.copytree(copy / "runs", copy / "other", ignore=shutil.ignore_patterns(".workspace"))
    words = ["worker", "tiny", "--workspace", "other", "--storage", f"sqlite:///{copy / 'runs/study.db'}"]
    assert main(words) == 2
    assert "(token missing)'\n" in (error := capsys.readouterr().err) and "--accept-changed (of" in error
    assert main([*words, "--accept-changed"]) == 0
    assert main(["status", "tiny"]) == 0
    token = Workspace(copy / "other").token
    assert re.search(rf"^Changed: workspace: .*{copy / 'other'} on ", shown := capsys.readouterr().out, re.M)
    assert token is not None and "before trial 2" in shown


def test_status_tells_everything_of_one_trial(copy: Path, capsys: Output) -> None:
    assert main(["status", "tiny", "--trial", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Trial 1 is complete.\nAsks for: c_ssvd ")
    assert "(removed)" not in text
    assert main(["status", "tiny", "--trial", "99"]) == 2
    assert "has no trial 99; its trials are 0 to " in capsys.readouterr().err


def test_status_is_watched_until_the_study_is_over(copy: Path, capsys: Output) -> None:
    assert main(["status", "tiny", "--watch", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 trials finished" in shown and "MACs kept" in shown
    assert shown.count("2 of 2 trials finished") == 1


def test_a_study_is_watched_while_it_is_not_over(copy: Path, capsys: Output, monkeypatch: Patch) -> None:
    load_study("tiny").optuna_study.set_user_attr("n_trials", 3)
    looks = iter([None, None])

    def look_again(seconds: float) -> None:
        assert seconds == 5
        if next(looks, "no more") == "no more":
            raise KeyboardInterrupt

    monkeypatch.setattr("compress_search.cli.watching.time.sleep", look_again)
    assert main(["status", "tiny", "--watch"]) == 0
    # Not on a terminal, what has not changed is not said again.
    assert capsys.readouterr().out.count("2 of 3 trials finished") == 1
    assert next(looks, "no more") == "no more"


def test_report_follows_a_study_until_it_is_over(copy: Path, capsys: Output, monkeypatch: Patch) -> None:
    study = load_study("tiny").optuna_study
    study.set_user_attr("n_trials", 3)
    page = copy / "runs/tiny/report.html"

    def goes_on(seconds: float) -> None:
        assert "followStudy(7.0)" in page.read_text()
        study.set_user_attr("n_trials", 2)

    monkeypatch.setattr("compress_search.cli.watching.time.sleep", goes_on)
    assert main(["report", "tiny", "--follow", "7"]) == 0
    assert capsys.readouterr().out.startswith("Following the study: ")
    assert "followStudy(7.0)" not in page.read_text()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "often"])
def test_watching_takes_a_number_of_seconds(seconds: str, copy: Path, capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["status", "tiny", "--watch", seconds])
    assert f"'{seconds}' is no number of seconds above 0" in capsys.readouterr().err


def test_resume_finds_a_workspace_that_was_moved(copy: Path, capsys: Output) -> None:
    (copy / "runs").rename(copy / "moved")
    assert main(["resume", "moved/tiny"]) == 0
    assert "moved/tiny/report.html" in capsys.readouterr().out
    assert not (copy / "runs").exists()


@pytest.mark.parametrize(
    ("where", "words"), [("runs", "tiny"), ("runs", "./tiny"), ("runs", "tiny/"), ("runs/tiny", ".")]
)
def test_a_study_is_found_by_its_folder_from_everywhere(
    where: str, words: str, finished: Finished, monkeypatch: Patch, capsys: Output
) -> None:
    monkeypatch.delenv("COMPRESS_SEARCH_WORKSPACE", raising=False)
    monkeypatch.chdir(finished[0] / where)
    assert main(["status", words]) == 0
    assert "2 of 2 trials finished" in capsys.readouterr().out


def test_a_folder_that_is_no_study_does_not_stand_in_the_way_of_a_studys_name(
    copy: Path, capsys: Output
) -> None:
    (copy / "tiny").mkdir()
    (copy / "tiny" / "config.yaml").write_text("mine: 1")
    assert main(["status", "tiny"]) == 0
    assert "2 of 2 trials finished" in capsys.readouterr().out


def test_a_workspace_can_come_from_the_environment(
    finished: Finished, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("COMPRESS_SEARCH_WORKSPACE", str(finished[0] / "runs"))
    assert main(["status", "tiny"]) == 0
    assert "2 of 2 trials finished" in capsys.readouterr().out


def test_resume_cannot_know_the_task_of_a_study_made_from_python(project: Path, capsys: Output) -> None:
    create_study("own", load_task(f"{project / 'tiny_task.py'}:make", {}), target=0.5)
    assert main(["resume", "own"]) == 2
    assert "The study 'own' was made from Python" in (error := capsys.readouterr().err)
    assert 'load_study("own", task' in error
    assert main(["status", "own"]) == 0
    assert "0 trials finished" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["resume", "status", "report", "dashboard"])
def test_a_study_that_does_not_exist(command: str, copy: Path, capsys: Output) -> None:
    assert main([command, "tinny"]) == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_a_workspace_that_does_not_exist(project: Path, capsys: Output) -> None:
    assert main(["status", "tiny"]) == 2
    assert "--workspace DIR" in capsys.readouterr().err
    assert not (project / "runs").exists()


def test_report_writes_the_files_it_names(copy: Path, capsys: Output) -> None:
    for path in (copy / "runs/tiny").glob("*.html"):
        path.unlink()
    assert main(["report", "tiny"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == ["report.html", "front.html", "front.png", "candidates.csv"]
    assert all(path.stat().st_size > 0 for path in written)


def test_export_writes_any_complete_trial(copy: Path, capsys: Output) -> None:
    assert main(["export", "tiny", "--trial", "0", "--format", "onnx", "--output", "small"]) == 0
    assert capsys.readouterr().out == "small\n"
    names = {path.name for path in (copy / "small").iterdir()}
    assert names >= {"plan.json", "model.safetensors", "model.pt2", "model.onnx", "candidate.json"}


def test_export_of_a_trial_that_does_not_exist(copy: Path, capsys: Output) -> None:
    assert main(["export", "tiny", "--trial", "7"]) == 2
    assert "has no trial 7. Its complete trials: 0, 1." in capsys.readouterr().err


def test_benchmark_keeps_the_latency_of_a_trial_beside_the_study(copy: Path, capsys: Output) -> None:
    words = ["--runtime", "eager", "--batch", "1", "3", "--seconds", "0", "--output", "latency.md"]
    assert main(["benchmark", "tiny", "--trial", "1", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Trial 1 of 'tiny', mac_ratio ")
    assert re.search(r"^eager +3 +[\d.]+ \([\d.]+-[\d.]+\) ", shown, re.MULTILINE)
    assert "Median (quartiles) on " in shown
    kept = json.loads((copy / "runs/tiny/latency/trial-1.json").read_text())
    table = LatencyTable.from_dict(kept)
    assert [(row.runtime, row.batch) for row in table.rows] == [("eager", 1), ("eager", 3)]
    assert table.to_markdown() == (copy / "latency.md").read_text()
    study = load_study("tiny")
    best = study.candidates()[1]
    assert table.mac_ratio == best.mac_ratio
    page = study.report(best).page.read_text()
    assert table.caption in page
    assert table.cells()[2][2] in page
    # What cannot be read costs the latency, not the report.
    (copy / "runs/tiny/latency/trial-1.json").write_text('{"rows": 7}')
    assert "Measured latency" not in study.report(best).page.read_text()


def test_benchmark_of_a_program_needs_no_study(copy: Path, capsys: Output) -> None:
    (export,) = (copy / "runs/tiny/export").iterdir()
    words = ["--runtime", "eager", "--batch", "2", "--seconds", "0", "--output", "latency.json"]
    assert main(["benchmark", str(export), *words]) == 0
    (row,) = LatencyTable.from_dict(json.loads((copy / "latency.json").read_text())).rows
    assert list(row.times) == ["compressed"]
    assert main(["benchmark", str(export / "model.pt2"), "--against", str(export / "model.pt2"), *words]) == 0
    (row,) = LatencyTable.from_dict(json.loads((copy / "latency.json").read_text())).rows
    assert list(row.times) == ["original", "compressed"]
    assert "original, ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["tiny", "--trial", "9"], "has no trial 9. Its complete trials: 0, 1."),
        (["tinny"], "Did you mean 'tiny'?"),
        (["tiny", "--batch", "0"], "--batch is 0; it must be 1 or more."),
        (["tiny", "--threads", "0"], "--threads is 0; it must be 1 or more."),
        (["tiny", "--output", "latency.xls"], "must end with .md, .csv, .json."),
        (["tiny", "--against", "model.pt2"], "--against is for a program"),
        (["tiny.yaml"], "is no torch.export program"),
        (["nothing.pt2"], "There is no file 'nothing.pt2'"),
        (["runs/tiny/export/trial-1", "--device", "cuda:99"], "device is 'cuda:99', but PyTorch sees"),
        (["tiny.yaml", "--trial", "0"], "is a program, not a study"),
    ],
)
def test_benchmark_says_what_is_wrong(words: list[str], fault: str, copy: Path, capsys: Output) -> None:
    assert main(["benchmark", *words, "--runtime", "eager", "--seconds", "0"]) == 2
    assert fault in capsys.readouterr().err
    assert not (copy / "runs/tiny/latency").exists()


def test_the_dashboard_shows_the_study_until_ctrl_c(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    pages = []

    def answer_one_request(server: DashboardServer) -> None:
        import threading

        thread = threading.Thread(target=server._server.handle_request)
        thread.start()
        with urllib.request.urlopen(server.url, timeout=20) as page:
            pages.append(page.read())
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(DashboardServer, "serve_forever", answer_one_request)
    assert main(["dashboard", "tiny", "--port", "0"]) == 0
    assert b"Optuna Dashboard" in pages[0]
    assert "http://127.0.0.1:" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CompressionStudy, "optimize", interrupted)
        assert main(["run", "tiny.yaml"]) == 130
    assert "Go on with: compress-search resume runs/tiny" in capsys.readouterr().err


def test_ctrl_c_before_the_study_begins(project: Path, capsys: Output) -> None:
    task = project / "tiny_task.py"
    task.write_text(task.read_text().replace("torch.manual_seed(0)", "raise KeyboardInterrupt"))
    assert main(["run", "tiny.yaml"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_without_a_feasible_trial_there_is_a_report_and_exit_status_1(project: Path, capsys: Output) -> None:
    assert main(["run", "tiny.yaml", "tolerance=1e-6", "n_trials=1"]) == 1
    shown = capsys.readouterr().out
    assert "Run more trials, or widen the tolerance." in shown
    assert "Report    runs/tiny/report.html" in shown


def test_a_drop_that_no_trial_keeps_to_falls_back_on_the_most_accurate(copy: Path, capsys: Output) -> None:
    assert main(["run", "tiny.yaml", "max_drop=-1"]) == 0
    assert "(none drops at most -1, so the most accurate one)" in capsys.readouterr().out


def test_finalize_trains_on_and_answers(copy: Path, capsys: Output) -> None:
    assert main(["finalize", "tiny", "--top", "1", "--epochs", "2"]) == 0
    shown = capsys.readouterr()
    assert "Finalists:\ntrial  finalist of" in shown.out
    assert "Front of the study 'tiny'" in shown.out and "Chosen: trial" in shown.out
    assert "epochs 2/2" in shown.err
    assert main(["status", "tiny"]) == 0
    status = capsys.readouterr().out
    assert "2 of 2 trials finished" in status and "Finalists: 1 complete." in status
    assert main(["finalize", "tiny", "--top", "1", "--epochs", "2"]) == 0
    assert "epochs" not in capsys.readouterr().err
    assert main(["resume", "tiny"]) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "said"), [("--top", "top_k is 0"), ("--epochs", "epochs is 0")])
def test_finalize_with_nothing_to_do_is_an_error(copy: Path, capsys: Output, option: str, said: str) -> None:
    assert main(["finalize", "tiny", option, "0"]) == 2
    assert said in capsys.readouterr().err


def test_an_interrupted_finalize_is_gone_on_with_by_resume(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress_search.training.trainer.fine_tune", interrupted)
        assert main(["finalize", "tiny", "--top", "2", "--epochs", "2"]) == 130
    assert "Go on with: compress-search resume runs/tiny" in capsys.readouterr().err
    assert main(["resume", "tiny"]) == 0
    assert main(["status", "tiny"]) == 0
    assert "Finalists: 2 complete." in capsys.readouterr().out


def test_validate_shows_the_model_and_starts_nothing(project: Path, capsys: Output) -> None:
    before = sorted(project.iterdir())
    assert main(["validate", "tiny.yaml"]) == 0
    shown = capsys.readouterr().out
    # 3x3 kernels: 4*1 at 8x8 positions, 8*4 at 4x4; the linear layer has 8*2 weights.
    assert re.search(r"^0 +Conv2d +4x1x3x3 +2,304 +33.3$", shown, re.MULTILINE)
    assert re.search(r"^3 +Conv2d +8x4x3x3 +4,608 +66.5$", shown, re.MULTILINE)
    assert "6,928 MACs" in shown
    assert "spatial_svd can size:" in shown
    assert "channel_pruning can size:" in shown
    assert sorted(path for path in project.iterdir() if path.name != "__pycache__") == before


def test_validate_finds_what_is_wrong_with_the_task(project: Path, capsys: Output) -> None:
    task = project / "tiny_task.py"
    task.write_text(task.read_text().replace("nn.Linear(8, 2)", "nn.Linear(8, 1)"))
    assert main(["validate", "tiny.yaml"]) == 2
    assert "The model's output does not fit train's targets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["fine_tune.precision=float16", "device=cpu"], "cannot be fine-tuned:"),
        (["fine_tune.options={a: 1}"], "fine_tune.options is {'a': 1}"),
        (
            ["storage=sqlite:////nonexistent/folder/x.db"],
            "The database sqlite:////nonexistent/",
        ),
        (["workspace=tiny.yaml/runs"], "The workspace '"),
        (
            ["selection=manual", "shares={nolayer: 0.5}"],
            "shares names 'nolayer', which is no layer",
        ),
        (["ignore=[nolayer]"], "ignore names 'nolayer'"),
        (["keep_channels={nolayer: [0]}"], "nolayer"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_validate_refuses_what_run_refuses(
    words: list[str], fault: str, project: Path, capsys: Output
) -> None:
    for command in ("run", "validate"):
        before = {path for path in project.rglob("*") if "runs" in path.parts}
        assert main([command, "tiny.yaml", *words]) == 2
        assert fault in capsys.readouterr().err
        if command == "validate":
            assert {path for path in project.rglob("*") if "runs" in path.parts} == before


def test_validate_leaves_a_database_to_be_made_with_its_workspace(project: Path) -> None:
    assert main(["validate", "tiny.yaml", "storage=sqlite:///runs/own.db"]) == 0
    assert not (project / "runs").exists()
