"""The files of one finished stage, and whether they are still what was written.

A stage is a folder of three files. ``result.json`` holds the stage's numbers, the SHA-256 of the two others,
and a checksum of itself.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_search.checkpoint import file_checksum
from compress_search.exceptions import UnreadableStageError
from compress_search.fingerprint import content_hash
from compress_search.workspace import write_json_atomically

RESULT, PLAN, WEIGHTS = "result.json", "plan.json", "weights.safetensors"

_NOT_AS_WRITTEN = "does not have the checksum it was written with"
_OF_THE_FILE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "EIO", "EBADMSG", "EUCLEAN")
"""Errors of a file that is gone, is something else, or lies on a bad place of the disk, as far as a system
has them. All others (no more open files, no memory, no permission, a server away) say nothing of it."""


def seal(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json`` into a folder that has its plan and its weights.

    Args:
        folder: The folder.
        result: The stage's numbers, JSON-able.
    """
    checksums = {name: file_checksum(folder / name) for name in (PLAN, WEIGHTS)}
    stored = {"result": dict(result), "sha256": checksums}
    write_json_atomically(folder / RESULT, stored | {"checksum": content_hash(stored)})


def read_result(folder: Path) -> dict[str, Any]:
    """Return what :func:`seal` was given.

    Raises:
        ValueError: The file is not what was written.
        OSError: There is none.
    """
    result: dict[str, Any] = _read_sealed(folder)["result"]
    return result


def fault_of(folder: Path, names: Sequence[str] = (PLAN, WEIGHTS)) -> str | None:
    """Tell what is wrong with a stage's files, if anything.

    Args:
        folder: The stage's.
        names: Which of its files to look at, beside ``result.json``.

    Raises:
        UnreadableStageError: They cannot be looked at.
    """
    try:
        checksums = _read_sealed(folder)["sha256"]
        for name in names:
            if file_checksum(folder / name) != checksums[name]:
                return f"{name} {_NOT_AS_WRITTEN}"
    except ValueError as error:
        return str(error)
    except OSError as error:
        raise_unless_damage(error, folder)
        return f"{type(error).__name__}: {error}"
    return None


def raise_unless_damage(error: OSError, path: Path) -> None:
    """Tell a file that is gone or broken from one that this process cannot read now.

    Args:
        error: What reading it raised.
        path: What was to be read.

    Raises:
        UnreadableStageError: The error says nothing of the file.
    """
    if error.errno in {getattr(errno, name, None) for name in _OF_THE_FILE}:
        return
    remedy = "Make the workspace readable for this process, and run the same again."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = (
            "Raise the limit of open files (ulimit -n), or look for what leaves files open, such as the "
            "workers of data loaders, and run the same again."
        )
    raise UnreadableStageError(
        f"{str(path)!r} cannot be read ({type(error).__name__}: {error}), which does not mean that it is "
        f"damaged: it stays as it is. {remedy}"
    ) from error


def _read_sealed(folder: Path) -> dict[str, Any]:
    text = (folder / RESULT).read_bytes()
    try:
        stored: dict[str, Any] = json.loads(text)
        content = {name: value for name, value in stored.items() if name != "checksum"}
        # The text too: a flipped bit may leave the values as they are, and is a damage all the same.
        written = json.dumps(stored, indent=2, sort_keys=True) + "\n"
        if stored["checksum"] == content_hash(content) and text == written.encode():
            return stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{RESULT} cannot be read: {type(error).__name__}: {error}") from error
    raise ValueError(f"{RESULT} {_NOT_AS_WRITTEN}")
