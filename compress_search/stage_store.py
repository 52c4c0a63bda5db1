"""The store of finished stages: one folder each, named by the hash of everything that made it.

A folder appears whole or not at all. What is read back is checked against the checksums written with it; a
damaged folder is set aside under another name, reported, and computed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from compress_search.checkpoint import load_weights, save_weights
from compress_search.disk_space import write_when_there_is_room
from compress_search.exceptions import LostStageError, UnreadableStageError
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.results import StageResult
from compress_search.stage_files import PLAN, WEIGHTS, fault_of, raise_unless_damage, read_result, seal
from compress_search.workspace import Workspace, new_folder, remove_folder, write_text_atomically

logger = logging.getLogger("compress_search")

DAMAGED = ".damaged-"
"""Stands in the name of a folder that was set aside, after the stage's key."""


def key_of_set_aside(folder: Path) -> str:
    """The key of the stage that a folder held before it was set aside."""
    return folder.name.partition(DAMAGED)[0]


@dataclass(frozen=True)
class StageStore:
    """The finished stages of a workspace.

    Attributes:
        workspace: Where they lie.
    """

    workspace: Workspace

    def folder(self, key: str) -> Path:
        """The folder of the stage with this key, whether it exists or not."""
        return self.workspace.stages / key

    def find(self, key: str) -> StageResult | None:
        """Return the result of a finished stage, or ``None`` if there is none that is whole.

        All its files are checked, each time: what was whole an hour ago need not be so now.

        Raises:
            UnreadableStageError: They cannot be read, whole or not.
        """
        folder = self.folder(key)
        if not folder.is_dir():
            return None
        if (fault := fault_of(folder)) is not None:
            self.set_aside(key, fault)
            return None
        # The folder's time says when the stage was last wanted, which `cache prune` goes by.
        with contextlib.suppress(OSError):
            os.utime(folder)
        try:
            return StageResult.from_dict(read_result(folder))
        except FileNotFoundError:
            return None

    def find_asked(self, asked: str) -> StageResult | None:
        """Return the result of the finished stage that a ratio led to before, if any; see :meth:`note`.

        Raises:
            UnreadableStageError: See :meth:`find`.
        """
        note = self.workspace.plans / asked
        try:
            key = note.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return None
        except OSError as error:
            raise_unless_damage(error, note)
            return None
        # Whatever else a damaged file says is no name of a folder.
        return self.find(key) if key.isalnum() else None

    def note(self, asked: str, key: str, *, say: Callable[[str], None]) -> None:
        """Note which stage a ratio leads to, so that its sizes need not be chosen again.

        Args:
            asked: Hash of all that decides about the stage, with the ratio that was asked for.
            key: Of the stage.
            say: Tells the user of a full disk.
        """
        path = self.workspace.plans / asked
        write_when_there_is_room(partial(write_text_atomically, path, key), self.workspace.root, say=say)

    def set_aside(self, key: str, fault: str) -> Path | None:
        """Move a damaged stage out of the way, under another name, and report it.

        Args:
            key: Of the stage.
            fault: What is wrong with it.

        Returns:
            Where it is now; ``None`` if another process moved it first.

        Raises:
            UnreadableStageError: It cannot be read any more; it stays where it is.
        """
        folder = self.folder(key)
        aside = folder.with_name(f"{key}{DAMAGED}{time.time_ns()}")
        try:
            folder.rename(aside)
        except FileNotFoundError:
            return None
        try:
            # Another process may have set the damaged one aside and computed it again: this is the new one.
            if fault_of(aside) is None and self._move_back(aside):
                return None
        except UnreadableStageError:
            self._move_back(aside)
            raise
        said = "The stored stage %s is damaged (%s). It was moved to %s and is computed again."
        logger.warning(said, key, fault, aside)
        return aside

    def put_back(self, aside: Path) -> bool:
        """Move a stage that was set aside back if it is whole after all, and its place is free.

        Args:
            aside: Where it is.

        Returns:
            Whether it is in its place again.

        Raises:
            UnreadableStageError: It cannot be read, whole or not.
        """
        return fault_of(aside) is None and self._move_back(aside)

    def _move_back(self, aside: Path) -> bool:
        try:
            aside.rename(self.folder(key_of_set_aside(aside)))
        except OSError:
            return False
        return True

    def save(
        self,
        result: StageResult,
        plan: CompressionPlan,
        model: nn.Module,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Store a finished stage under its key, as soon as there is room for it.

        Args:
            result: Its numbers, with the key.
            plan: What was done so far.
            model: The model.
            say: Tells the user of a full disk.
        """

        def write() -> None:
            with new_folder(self.folder(result.key)) as folder:
                plan.save(folder / PLAN)
                save_weights(model, folder / WEIGHTS)
                seal(folder, result.to_dict())

        write_when_there_is_room(write, self.workspace.root, say=say)

    def remove(self, key: str) -> None:
        """Forget a stage, if it is there."""
        remove_folder(self.folder(key))

    def model(self, key: str, original: nn.Module) -> nn.Module:
        """Build the model of a finished stage, in evaluation mode.

        Args:
            key: Of the stage.
            original: The model that its plan begins with. It is not changed.

        Raises:
            LostStageError: The stage's files were damaged or removed since it was found.
            UnreadableStageError: They cannot be read, whole or not.
        """
        model = apply_plan(original, self.plan(key))
        load_weights(model, self.weights(key))
        return model.eval()

    def plan(self, key: str) -> CompressionPlan:
        """Read the plan of a finished stage; see :meth:`model` for what it raises."""
        return CompressionPlan.load(self._sound(key, PLAN))

    def weights(self, key: str) -> Path:
        """The weights of a finished stage, a safetensors file; see :meth:`model` for what it raises."""
        return self._sound(key, WEIGHTS)

    def _sound(self, key: str, name: str) -> Path:
        """A file that was looked at just before it is used: the stage may have been found hours ago."""
        if (fault := fault_of(self.folder(key), (name,))) is not None:
            aside = self.set_aside(key, fault)
            what = "is gone" if aside is None else "was damaged while it was in use"
            where = "" if aside is None else f" It was moved to {str(aside)!r}."
            raise LostStageError(
                f"The stored stage {key} {what} ({fault}).{where} Run the same again: it is computed again."
            )
        return self.folder(key) / name
