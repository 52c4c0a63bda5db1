from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from compress_search.exceptions import TaskError
from compress_search.task import Task
from compress_search.task_path import load_task, resolve_task_path

GOOD = """
import torch
from torch import nn
from compress_search.task import Task

def make(width=2):
    data = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    return Task(model=nn.Linear(3, width), example_input=torch.zeros(1, 3), train=data, validation=data)

def broken():
    raise OSError("the disk is elsewhere")

def number():
    return 5

VALUE = 3
"""


@pytest.fixture(autouse=True)
def _imports_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in [name for name in sys.modules if name.startswith("own_task")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own_task.py"
    path.write_text(GOOD)
    return path


def test_a_file_is_imported_and_its_function_called_with_the_arguments(file: Path) -> None:
    task = load_task(f"{file}:make", {"width": 7})
    assert isinstance(task, Task)
    assert task.build_model().out_features == 7


def test_a_file_can_import_its_neighbours(file: Path) -> None:
    (file.parent / "own_task_neighbour.py").write_text("WIDTH = 4\n")
    file.write_text("from own_task_neighbour import WIDTH\n" + GOOD.replace("width=2", "width=WIDTH"))
    assert load_task(f"{file}:make", {}).build_model().out_features == 4


def test_a_file_with_the_name_of_an_imported_module_does_not_replace_it(tmp_path: Path) -> None:
    import math

    (tmp_path / "math.py").write_text(GOOD)
    assert isinstance(load_task(f"{tmp_path / 'math.py'}:make", {}), Task)
    assert sys.modules["math"] is math


def test_two_files_of_one_name_are_two_modules(file: Path) -> None:
    other = file.parent / "other" / "own_task.py"
    other.parent.mkdir()
    other.write_text(GOOD.replace("width=2", "width=9"))
    widths = [load_task(f"{path}:make", {}).build_model().out_features for path in (file, other)]
    assert widths == [2, 9]


def test_a_changed_file_is_read_again(file: Path) -> None:
    load_task(f"{file}:make", {})
    file.write_text(GOOD.replace("width=2", "width=10"))
    assert load_task(f"{file}:make", {}).build_model().out_features == 10


def test_a_module_on_the_path_is_imported(file: Path) -> None:
    sys.path.insert(0, str(file.parent))
    assert isinstance(load_task("own_task:make", {}), Task)


@pytest.mark.parametrize(
    ("source", "function", "arguments", "message"),
    [
        (
            "import no_such_thing",
            "make",
            {},
            "does not import: ModuleNotFoundError: No module named 'no_such",
        ),
        ("x = 1\ny = x / 0", "make", {}, r"ZeroDivisionError: division by zero \(.*own_task.py, line 2\)"),
        ("def make(:\n  pass", "make", {}, "does not import: .*line 1.*SyntaxError"),
        ("raise SystemExit(3)", "make", {}, "does not import: SystemExit: 3"),
        (GOOD, "maek", {}, r"has no 'maek'. Did you mean 'make'\? Its functions: make, broken, number"),
        (GOOD, "VALUE", {}, "names a int; it must name a function"),
        (GOOD, "make", {"widht": 3}, r"unexpected keyword argument 'widht'. It takes \(width=2\)"),
        (GOOD, "broken", {}, r"raised OSError: the disk is elsewhere \(.*own_task.py, line 11\)"),
        (GOOD, "number", {}, "returned a int; it must return a compress_search.Task"),
    ],
)
def test_what_is_wrong_with_a_task_is_shown(
    file: Path, source: str, function: str, arguments: dict[str, int], message: str
) -> None:
    file.write_text(source)
    with pytest.raises(TaskError, match=message):
        load_task(f"{file}:{function}", arguments)


def test_a_file_that_failed_to_import_leaves_no_module(file: Path) -> None:
    file.write_text("1 / 0")
    with pytest.raises(TaskError):
        load_task(f"{file}:make", {})
    assert "own_task" not in sys.modules


def test_a_relative_file_is_relative_to_the_folder(file: Path) -> None:
    assert resolve_task_path("../own_task.py:make", file.parent / "configs") == f"{file}:make"


def test_a_module_stays_as_it_is(tmp_path: Path) -> None:
    assert resolve_task_path("package.module:make", tmp_path) == "package.module:make"


@pytest.mark.parametrize("task", ["own_task.py", "own_task.py:", ":make", "own_task.py:not a name"])
def test_a_task_of_another_form_is_refused(task: str, tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=re.escape(f"task is {task!r}; it must read path/to/file.py:function")
    ):
        resolve_task_path(task, tmp_path)


def test_a_missing_file_is_named_whole(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=re.escape(f"there is no file {str(tmp_path / 'gone.py')!r}")):
        resolve_task_path("gone.py:make", tmp_path)
