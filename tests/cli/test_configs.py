from __future__ import annotations

from pathlib import Path

import pytest

from compress_search.cli import configs, main

LAUNCH = "compress-search run configs/own.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shipped files in one folder, and another one to copy them to."""
    shipped = tmp_path / "shipped"
    for path, text in (
        ("configs/own.yaml", f"# {LAUNCH}\nname: own\ntask: ../studies/own.py:make\ntarget: 0.5\n"),
        ("configs/other.yaml", "# other\nname: other\ntask: package.module:make\ntarget: 0.5\n"),
        ("studies/own.py", "def make(): ...\n"),
    ):
        (shipped / path).parent.mkdir(parents=True, exist_ok=True)
        (shipped / path).write_text(text)
    monkeypatch.setattr(configs, "shipped_root", lambda: shipped)
    destination = tmp_path / "project"
    destination.mkdir()
    monkeypatch.chdir(destination)
    return destination


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_ls_shows_names_and_launch_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "ls"]) == 0
    assert capsys.readouterr().out == f"other  other\nown    {LAUNCH}\n"


def test_cp_copies_the_script_so_that_the_task_path_still_leads_there(project: Path) -> None:
    assert main(["configs", "cp", "own", "sub"]) == 0
    assert files_in(project) == ["sub/configs/own.yaml", "sub/studies/own.py"]


def test_cp_copies_a_configuration_of_an_installed_module_alone(project: Path) -> None:
    assert main(["configs", "cp", "other"]) == 0
    assert files_in(project) == ["configs/other.yaml"]


def test_cp_replaces_nothing_unless_forced(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "studies").mkdir()
    (project / "studies/own.py").write_text("mine")
    assert main(["configs", "cp", "own"]) == 2
    assert "There is already: studies/own.py. --force replaces it." in capsys.readouterr().err
    assert files_in(project) == ["studies/own.py"]
    assert main(["configs", "cp", "own", "--force"]) == 0
    assert (project / "studies/own.py").read_text() == "def make(): ...\n"


def test_an_unknown_name_is_answered_with_the_nearest(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["configs", "cp", "onw"]) == 2
    assert "Did you mean 'own'?" in capsys.readouterr().err


def test_an_installed_package_has_the_files_inside_and_a_checkout_beside(tmp_path: Path) -> None:
    package = tmp_path / "compress_search"
    package.mkdir()
    assert configs.shipped_root(package) == tmp_path
    (package / "shipped").mkdir()
    assert configs.shipped_root(package) == package / "shipped"


def test_what_is_shipped_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "ls"]) == 0
    assert "compress-search run configs/digits.yaml" in capsys.readouterr().out
