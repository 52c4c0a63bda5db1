"""Sensitivity tables on the disk: one file each, a line for every cell, shared by all trials and workers.

A line is appended as soon as its cell is measured, so an interrupted measurement goes on where it stopped. A
line that is torn or damaged is left out, and its cell is measured again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from compress_search.fingerprint import content_hash
from compress_search.selection.table import Cell
from compress_search.workspace import Workspace

logger = logging.getLogger("compress_search")

Identity = Mapping[str, Any]
"""JSON-able: everything that a table's numbers depend on."""


@dataclass(frozen=True)
class TableStore:
    """The tables of a workspace.

    Attributes:
        workspace: Where they lie.
    """

    workspace: Workspace

    def file(self, identity: Identity) -> Path:
        """The file of one table, whether it exists or not."""
        return self.workspace.tables / f"{content_hash(identity)}.jsonl"

    def cells(self, identity: Identity) -> dict[tuple[str, int], Cell]:
        """The cells that were stored so far, by unit and size."""
        file = self.file(identity)
        if not file.exists():
            return {}
        known: dict[tuple[str, int], Cell] = {}
        damaged = 0
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            cell = _cell_of(line)
            if cell is None:
                damaged += 1
            else:
                known[cell.unit, cell.size] = cell
        if damaged:
            logger.warning(
                "%d lines of the sensitivity table %s are torn or damaged. Their cells are measured again.",
                damaged,
                file,
            )
        return known

    def append(self, identity: Identity, cells: Sequence[Cell]) -> None:
        """Add measured cells."""
        file = self.file(identity)
        # A torn last line of an earlier process must not swallow the first of these.
        torn = file.exists() and not file.read_bytes().endswith(b"\n")
        lines = "\n" * torn + "".join(f"{_line_of(cell)}\n" for cell in cells)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as handle:
            handle.write(lines.encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())

    @contextmanager
    def measuring(self, identity: Identity) -> Iterator[None]:
        """Let one process at a time measure a table; the others wait, and find it measured.

        The operating system gives the lock back when a process dies, however it dies.
        """
        file = self.file(identity)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(file.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("Another process is measuring the sensitivity table %s; waiting for it.", file)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _line_of(cell: Cell) -> str:
    value = asdict(cell)
    return json.dumps(value | {"checksum": content_hash(value)})


def _cell_of(line: str) -> Cell | None:
    try:
        value = json.loads(line)
        checksum = value.pop("checksum")
        return Cell(**value) if checksum == content_hash(value) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
