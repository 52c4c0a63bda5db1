from __future__ import annotations

import subprocess
import sys

import pytest

from compress_search.cli import COMMANDS, main

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys=capsys)
    assert all(f"\n    {name}" in text for name in NAMES)


@pytest.mark.parametrize("name", [*NAMES, "configs ls", "configs cp"])
def test_the_help_of_each_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Example: compress-search {name}" in help_of(*name.split(), capsys=capsys)


def test_help_does_not_wait_for_pytorch() -> None:
    code = "import sys, compress_search.cli; sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "compress_search", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("compress-search ")


def test_an_error_goes_to_stderr_and_the_exit_status_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such-file.yaml"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: no-such-file.yaml has 1 fault:\n  - The file cannot be read")


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "resume"])
@pytest.mark.parametrize(("option", "least"), [("--workers", 1), ("--restarts", 0)])
@pytest.mark.parametrize("number", ["-1", "two", "1.5"])
def test_workers_are_counted_in_whole_numbers(
    command: str, option: str, least: int, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (number, str(least - 1)):
        with pytest.raises(SystemExit) as ended:
            main([command, "digits", f"{option}={given}"])
        assert ended.value.code == 2
        said = f"argument {option}: '{given}' is not a whole number of {least} or more"
        assert said in capsys.readouterr().err
