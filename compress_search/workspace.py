"""The workspace: the folder that holds stage results, studies and reports.

Layout::

    runs/                      the workspace
      study.db                 the Optuna studies (SQLite)
      stages/<key>/            one finished stage: result.json, plan.json, weights.safetensors
      checkpoints/<key>/       one fine-tuning that is not finished
      stages/<key>.lease      somebody computes this stage now
      plans/<key>              the key of the stage that a ratio led to, by the sizes of the layers
      tables/<key>.jsonl       one sensitivity table, a line for each cell
      teacher/<key>.outputs    what the original says of the training batches of one epoch
      <study name>/            one study: config.yaml, study.log, report.html, front.png, export/
      .workspace/token         tells this workspace from all others, wherever it is moved or mounted

Whatever is written here appears whole or not at all: it is written under a temporary name on the same
file system, flushed to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_search.exceptions import WorkspaceError

WORKSPACE_VARIABLE = "COMPRESS_SEARCH_WORKSPACE"

_STAGES, _CHECKPOINTS, _PLANS, _TABLES, _TEACHER = "stages", "checkpoints", "plans", "tables", "teacher"
_DATABASE = "study.db"
INTERNAL_NAMES = (_STAGES, _CHECKPOINTS, _PLANS, _TABLES, _TEACHER, _DATABASE)
"""What lies in a workspace and is no study's folder; no study can have such a name."""


@dataclass(frozen=True)
class Workspace:
    """Where a study's files lie.

    Args:
        root: The folder. It is created by :meth:`prepare`.
    """

    root: Path

    def prepare(self) -> Workspace:
        """Create the folder and prove that it can be written.

        Returns:
            The workspace itself.

        Raises:
            WorkspaceError: The folder cannot be created or written.
        """
        with self._said_if_not_writable():
            self.stages.mkdir(parents=True, exist_ok=True)
            prove_writable(self.stages)
        return self

    def check(self) -> None:
        """Prove that :meth:`prepare` can create the folder, and leave nothing behind.

        Raises:
            WorkspaceError: The folder cannot be created or written.
        """
        nearest = next(folder for folder in (self.stages, *self.stages.absolute().parents) if folder.exists())
        with self._said_if_not_writable():
            prove_writable(nearest)

    @contextmanager
    def _said_if_not_writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkspaceError(
                f"The workspace {str(self.root)!r} cannot be written ({error}). "
                "Choose another folder: workspace=DIR, after `compress-search run CONFIG` and in Python."
            ) from error

    @property
    def token(self) -> str | None:
        """What tells this workspace from all others; ``None`` before :meth:`make_token`."""
        try:
            return self._token_file.read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def make_token(self) -> str:
        """Return the token; make a random one if there is none yet.

        Processes that do so at the same time get the same one.
        """
        if self.token is None:
            # The folder of whoever came first is kept.
            with new_folder(self._token_file.parent) as folder:
                write_text_atomically(folder / self._token_file.name, secrets.token_hex(8) + "\n")
        token = self.token
        assert token is not None
        return token

    @property
    def _token_file(self) -> Path:
        return self.root / ".workspace" / "token"

    @property
    def database(self) -> Path:
        """The SQLite file of the studies."""
        return self.root / _DATABASE

    @property
    def stages(self) -> Path:
        """The folder of all stage results, shared by every study of this workspace."""
        return self.root / _STAGES

    @property
    def checkpoints(self) -> Path:
        """The folder of all fine-tunings that are not finished, a folder of checkpoints each, by key."""
        return self.root / _CHECKPOINTS

    @property
    def plans(self) -> Path:
        """The folder of notes of which stage each ratio that was asked for led to, by its sizes."""
        return self.root / _PLANS

    @property
    def tables(self) -> Path:
        """The folder of all sensitivity tables, shared by every study of this workspace."""
        return self.root / _TABLES

    @property
    def teacher(self) -> Path:
        """The folder of what the original says of training batches, shared by every study."""
        return self.root / _TEACHER

    def study_folder(self, name: str) -> Path:
        """The folder of one study's configuration, log, reports and exports."""
        return self.root / name


def prove_writable(folder: Path) -> None:
    """Write a file without a name into a folder.

    Raises:
        OSError: It cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"writable")


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def default_workspace() -> Path:
    """The folder that the command line uses where none is named."""
    return Path(os.environ.get(WORKSPACE_VARIABLE, "runs"))


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; see :func:`write_bytes_atomically`."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; see :func:`write_text_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``target`` when the block ends without an error.

    If another process made ``target`` meanwhile, theirs is kept: stage folders are named by the hash of
    what made them, so both hold the same thing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Remove a folder so that a reader sees all of it or nothing; one that does not exist is no error."""
    temporary = _temporary_beside(target)
    try:
        os.rename(target, temporary)
    except FileNotFoundError:
        return
    shutil.rmtree(temporary, ignore_errors=True)


def _temporary_beside(path: Path) -> Path:
    # Not tempfile's functions: what those make only its owner can read, for good.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")
