from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

from compress_search.cli import main
from compress_search.search.study import load_study
from compress_search.task_path import load_task

Output = pytest.CaptureFixture[str]


@pytest.fixture
def copy(finished: tuple[Path, str, str], project: Path) -> Path:
    """The workspace of the finished study, copied into the project."""
    shutil.copytree(finished[0] / "runs", project / "runs")
    return project / "runs"


@pytest.fixture
def beside(copy: Path) -> set[str]:
    """Keys of the stages of one trial alone, which another one was made to beat."""
    most_macs = load_study("tiny").front().best[-1].number
    with sqlite3.connect(copy / "study.db") as database:
        database.execute(
            "UPDATE trial_user_attributes SET value_json = '-1.0' WHERE key = 'accuracy' AND trial_id = "
            "(SELECT trial_id FROM trials WHERE number = ?)",
            (most_macs,),
        )
    database.close()
    study = load_study("tiny")
    on_front = {stage.key for candidate in study.front() for stage in candidate.stages}
    keys = {stage.key for candidate in study.candidates() for stage in candidate.stages} - on_front
    assert on_front and keys
    return keys


def stages(workspace: Path) -> set[str]:
    return {path.name for path in (workspace / "stages").iterdir()}


def teacher(workspace: Path) -> list[Path]:
    files = [*(workspace / "teacher").iterdir()]
    assert files
    return files


def test_ls_shows_every_stage_with_its_numbers_and_its_trials(copy: Path, capsys: Output) -> None:
    assert main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for candidate in load_study("tiny").candidates():
        for stage in candidate.stages:
            (line,) = [line for line in lines if line.startswith(stage.key[:10])]
            assert f" {stage.name} " in line and f" {stage.accuracy:.4f} " in line
            assert f" {stage.mac_ratio:.4f} " in line and str(candidate.number) in line.split("tiny: ")[1]
    assert sum("tiny: original" in line for line in lines) == 1
    assert sum("the original's outputs of an epoch" in line for line in lines) == len([*teacher(copy)])
    assert sum("sensitivity table" in line for line in lines) == len([*(copy / "tables").glob("*.jsonl")])
    assert any(line.startswith(f"{len(stages(copy))} stages, ") for line in lines)


def test_ls_as_json_says_the_same_in_full(copy: Path, capsys: Output) -> None:
    assert main(["cache", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    results = {stage["key"]: stage["result"] for stage in listed["stages"]}
    assert set(results) == stages(copy)
    for candidate in load_study("tiny").candidates():
        for stage in candidate.stages:
            assert results[stage.key] == stage.to_dict() | {"reused": False}
    assert {Path(item["path"]).name for item in listed["teacher"]} == {file.name for file in teacher(copy)}
    parts = [copy / part for part in ("stages", "tables", "teacher")]
    files = [file for part in parts for file in part.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert listed["bytes"] == sum(file.stat().st_size for file in files)
    assert listed["gaps"] == []


def test_verify_finds_one_flipped_bit_and_names_the_trials(copy: Path, capsys: Output) -> None:
    assert main(["cache", "verify"]) == 0
    assert f"{len(stages(copy))} stages, all whole." in capsys.readouterr().out
    last = load_study("tiny").candidates()[0].stages[-1]
    weights = copy / "stages" / last.key / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(["cache", "verify"]) == 1
    shown = capsys.readouterr()
    assert f"{last.key}: weights.safetensors does not have the checksum it was written with." in shown.out
    assert "affected: tiny: trial 0 (complete)" in shown.out
    assert f"The stored stage {last.key} is damaged" in shown.err
    assert last.key not in stages(copy) and any(name.startswith(last.key) for name in stages(copy))
    assert main(["cache", "verify"]) == 0
    assert main(["cache", "prune", "--yes"]) == 0
    assert not any(name.startswith(last.key) for name in stages(copy))


def test_prune_finds_nothing_to_remove_after_a_whole_study(copy: Path, capsys: Output) -> None:
    before = stages(copy)
    assert main(["cache", "prune"]) == 0
    assert capsys.readouterr().out == "There is nothing to prune.\n"
    assert stages(copy) == before


def test_a_dry_run_removes_nothing(copy: Path, beside: set[str], capsys: Output) -> None:
    before = stages(copy)
    assert main(["cache", "prune", "--keep-front", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(key[:10] in shown for key in beside)
    assert f"Would be removed: {len(beside)} things, " in shown and "Nothing was removed." in shown
    assert stages(copy) == before


def test_the_front_and_the_study_outlive_pruning(copy: Path, beside: set[str], capsys: Output) -> None:
    before = stages(copy)
    assert main(["cache", "prune", "--keep-front", "--yes"]) == 0
    assert f"Removed: {len(beside)} things, " in capsys.readouterr().out
    assert stages(copy) == before - beside
    study = load_study("tiny", load_task(f"{copy.parent / 'tiny_task.py'}:make", {}))
    assert study.task is not None
    for candidate in study.front():
        assert study.task.score(candidate.load_model()) == candidate.accuracy
    assert main(["resume", "tiny", "--n-trials", "3"]) == 0
    assert main(["cache", "verify"]) == 0


def test_older_than_keeps_what_is_young(copy: Path, beside: set[str], capsys: Output) -> None:
    assert main(["cache", "prune", "--keep-front", "--older-than", "1", "--yes"]) == 0
    assert capsys.readouterr().out == "There is nothing to prune.\n"


def test_without_a_terminal_nothing_is_removed_unless_told(
    copy: Path, beside: set[str], capsys: Output
) -> None:
    before = stages(copy)
    assert main(["cache", "prune", "--keep-front"]) == 2
    assert "Say --yes to remove all of this, or --dry-run" in capsys.readouterr().err
    assert stages(copy) == before


@pytest.mark.parametrize(("answer", "goes"), [("", False), ("n", False), ("y", True), ("Yes", True)])
def test_on_a_terminal_it_asks(
    answer: str,
    goes: bool,
    copy: Path,
    beside: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, asked = stages(copy), []

    def reply(question: str) -> str:
        asked.append(question)
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", reply)
    assert main(["cache", "prune", "--keep-front"]) == 0
    assert len(asked) == 1 and f"Remove {len(beside)} things, " in asked[0]
    assert stages(copy) == (before - beside if goes else before)


def test_stages_stay_while_a_studys_database_is_not_known(
    copy: Path, beside: set[str], capsys: Output
) -> None:
    (copy / "study.db").unlink()
    before = stages(copy)
    assert main(["cache", "prune", "--keep-front", "--yes"]) == 0
    shown = capsys.readouterr()
    assert "so all stages stay" in shown.err and "The study 'tiny' is in no database" in shown.err
    assert shown.out == "There is nothing to prune.\n"
    assert stages(copy) == before


@pytest.mark.parametrize("action", ["ls", "verify", "prune"])
def test_what_is_no_workspace_is_named(action: str, project: Path, capsys: Output) -> None:
    assert main(["cache", action, "--workspace", "nowhere"]) == 2
    assert "There is no workspace 'nowhere'" in capsys.readouterr().err
    assert not (project / "nowhere").exists()


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_a_wrong_number_of_days_is_refused(days: str, project: Path, capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["cache", "prune", f"--older-than={days}"])
    assert f"{days} is no number of days" in capsys.readouterr().err
