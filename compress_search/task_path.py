"""From ``path/to/file.py:function`` or ``package.module:function`` to the Task that the function makes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from compress_search.exceptions import TaskError
from compress_search.fingerprint import content_hash
from compress_search.task import Task


def resolve_task_path(task: str, folder: Path) -> str:
    """Make the file of a task path absolute.

    Args:
        task: ``path/to/file.py:function``, or ``package.module:function``, which stays as it is.
        folder: What a relative path is relative to.

    Raises:
        TaskError: It is neither form, or there is no such file.
    """
    place, colon, function = task.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise TaskError(
            f"task is {task!r}; it must read path/to/file.py:function or package.module:function."
        )
    if not _is_file(place):
        return task
    path = (folder / place).resolve()
    if not path.is_file():
        raise TaskError(
            f"task is {task!r}, but there is no file {str(path)!r}. "
            f"A relative path is relative to the configuration's folder, {str(folder.resolve())!r}."
        )
    return f"{path}:{function}"


def load_task(task: str, arguments: Mapping[str, Any]) -> Task:
    """Import the function of a task path and call it.

    A file is imported as ``python file.py`` would find it: its folder comes first in :data:`sys.path`,
    so that it can import its neighbours.

    Args:
        task: ``/absolute/file.py:function`` or ``package.module:function``.
        arguments: Keyword arguments of the function.

    Raises:
        TaskError: The module does not import, has no such function, the arguments do not fit, the
            function raises, or it returns something else. The underlying error is in the message.
    """
    place, _, name = task.rpartition(":")
    try:
        module = _import_file(Path(place)) if _is_file(place) else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise TaskError(f"The task {task!r} does not import: {_describe(error)}.") from error
    function = _function(module, name, task)
    _check_arguments(function, arguments, task)
    try:
        made = function(**arguments)
    except Exception as error:
        raise TaskError(f"The task function {task!r} raised {_describe(error)}.") from error
    if not isinstance(made, Task):
        raise TaskError(
            f"The task function {task!r} returned a {type(made).__name__}; "
            "it must return a compress_search.Task."
        )
    return made


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _import_file(path: Path) -> ModuleType:
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Worker processes of a DataLoader look the module up by the file's name, so it has that name
    # unless another module has taken it.
    taken = sys.modules.get(path.stem)
    is_own = taken is None or getattr(taken, "__file__", None) == str(path)
    name = path.stem if is_own else f"{path.stem}_{content_hash(str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(module: ModuleType, name: str, task: str) -> Callable[..., Any]:
    found: Any = getattr(module, name, None)
    if callable(found):
        function: Callable[..., Any] = found
        return function
    if found is not None:
        raise TaskError(
            f"The task {task!r} names a {type(found).__name__}; "
            "it must name a function that returns a compress_search.Task."
        )
    there = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    near = difflib.get_close_matches(name, there, n=1)
    remedy = f"Did you mean {near[0]!r}? " if near else ""
    raise TaskError(
        f"The task {task!r} does not exist: {module.__name__} has no {name!r}. {remedy}"
        f"Its functions: {', '.join(there) or 'none'}."
    )


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], task: str) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TaskError(
            f"task_args does not fit the task function {task!r}: {error}. It takes {signature}."
        ) from error


def _describe(error: BaseException) -> str:
    """The type, message and innermost place of an error, in one line."""
    text = "".join(traceback.format_exception_only(error)).strip().replace("\n", " ")
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")
    ]
    if not frames or isinstance(error, SyntaxError):
        return text
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})"
