"""Checkpoints of a training that is not finished: one file each, with its checksum in front."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_search.training.sealed_tensors import sealed, unsealed
from compress_search.workspace import remove_folder, write_bytes_atomically

logger = logging.getLogger("compress_search")


@dataclass
class Snapshot:
    """A training at one instant, whole.

    Attributes:
        tensors: Everything large, by name; copies on the CPU.
        values: Everything else, JSON-able.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps were done."""
        step: int = self.values["step"]
        return step

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``name/``, by the rest of their names."""
        return {k.removeprefix(f"{name}/"): t for k, t in self.tensors.items() if k.startswith(f"{name}/")}


@dataclass
class CheckpointFolder:
    """Where one training leaves its checkpoints: the last end of an epoch, and the last instant since.

    Attributes:
        folder: The folder; it appears with the first checkpoint.
        seconds: A checkpoint is due so long after the last one.
        clock: Tells the time, in seconds.
    """

    folder: Path
    seconds: float = 60.0
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is so old that the next one is due."""
        return self.clock() - self._last >= self.seconds

    def save_step(self, snapshot: Snapshot) -> None:
        """Keep an instant within an epoch."""
        self._save("step", snapshot)

    def save_epoch(self, snapshot: Snapshot) -> None:
        """Keep the end of an epoch."""
        self._save("epoch", snapshot)

    def load(self) -> tuple[Snapshot | None, Snapshot | None]:
        """Read what there is.

        A file that is damaged is set aside and reported, and the other one is used.

        Returns:
            The latest checkpoint, and the last end of an epoch; ``None`` for what there is none of.
        """
        step, epoch = self._read("step"), self._read("epoch")
        # Of two at the same step, the end of the epoch is the one that was evaluated.
        latest = max((s for s in (epoch, step) if s is not None), key=lambda s: s.step, default=None)
        return latest, epoch

    def remove(self) -> None:
        """Remove all of it, for when the training is finished and its outcome is stored."""
        remove_folder(self.folder)

    def _save(self, name: str, snapshot: Snapshot) -> None:
        try:
            write_bytes_atomically(self._file(name), sealed(snapshot.tensors, snapshot.values))
        except OSError as error:
            # Training does not need it: to go on is better than to lose what was done since the last one.
            logger.warning(
                "A checkpoint could not be written to %s (%s). The training goes on; were it killed now, it "
                "would be resumed from an earlier one.",
                self.folder,
                error,
            )
        self._last = self.clock()

    def _read(self, name: str) -> Snapshot | None:
        file = self._file(name)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Snapshot(*unsealed(content))
        except ValueError as error:
            aside = file.with_name(f"{file.name}.damaged-{time.time_ns()}")
            os.replace(file, aside)
            logger.warning("The checkpoint %s is damaged (%s). It was moved to %s.", file, error, aside)
            return None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.checkpoint"


def copies(tensors: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them, under ``prefix/name``."""
    return {
        f"{prefix}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }
