"""What the original says of each training batch: asked once, and known to every fine-tuning that sees it.

The data of a fine-tuning follow from the study's seed and from the place of the stage in its recipe, not from
the compressed model. So all trials of a study see the same batches in the same epochs, augmentation
included, and what the original says of them is the same as well. It is kept, a file for each epoch. A batch
is known by the hash of its content: where a loader draws other batches after all, the original is asked.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_search.fingerprint import content_hash, update_with_tensor
from compress_search.training.sealed_tensors import sealed, unsealed
from compress_search.workspace import write_bytes_atomically

logger = logging.getLogger("compress_search")

LARGEST = 4 * 2**30
"""Bytes of all epochs of one fine-tuning; what would be larger is not kept. Dense outputs are, soon."""

_ON_GPU_BYTES = 2**26
"""What may wait on a GPU to be kept. To fetch each batch's outputs would make the GPU wait for each; those of
a whole epoch could take the memory that the training needs."""

_HASH_BYTES = 16

Teacher = Callable[[Tensor], Any]


@dataclass(frozen=True)
class TeacherOutputs:
    """The outputs of one teacher on the training data of one fine-tuning.

    Attributes:
        folder: Where they lie.
        lesson: Hash of the teacher, the data, and what seeds them.
        largest: Bytes that all epochs may take.
    """

    folder: Path
    lesson: str
    largest: int = LARGEST

    def epoch(self, number: int, setting: Sequence[str]) -> Path:
        """The file of one epoch, whether it exists or not.

        Args:
            number: Of the epoch, from 1.
            setting: What else the bits of an output depend on: precision, layout and device.
        """
        return self.folder / f"{content_hash([self.lesson, number, *setting])}.outputs"


class EpochOutputs:
    """The outputs of one teacher in one epoch: read where they are known, asked for and kept where not.

    Args:
        teacher: Maps a batch ``(batch, ...)`` to its outputs.
        file: Where they lie or will lie; ``None`` to keep nothing.
        batches: How many there are in the epoch.
        largest: Bytes that they may take.

    Attributes:
        seconds_saved: Time that asking for what was known would have taken, as it took who asked for it.
    """

    def __init__(self, teacher: Teacher, file: Path | None, *, batches: int, largest: int) -> None:
        self._teacher, self._file, self._batches, self._largest = teacher, file, batches, largest
        self._known, self._seconds = ([], 0.0) if file is None else _read(file)
        self.seconds_saved = 0.0
        self._asked: list[tuple[bytes, Tensor]] = []
        self._on_gpu = 0
        self._keeps = file is not None and not self._known
        self._given: tuple[int, bytes] | None = None
        # One stands for all, as a GPU has to be waited for; not the first, which warms up.
        self._timed = min(1, batches - 1)

    def of(self, number: int, given: Tensor, parts: Sequence[Tensor]) -> list[Any]:
        """What the teacher says of one batch.

        Args:
            number: Of the batch in its epoch, from 0.
            given: The batch as the loader gave it.
            parts: The same on the teacher's device, in parts that fit into memory.

        Returns:
            The outputs of each part.
        """
        if not self._keeps and number >= len(self._known):
            return list(map(self._teacher, parts))
        digest = self._digest(number, given)
        known = self._known or self._asked
        if number < len(known) and known[number][0] == digest:
            outputs = known[number][1].to(parts[0].device)
            if self._known:
                self.seconds_saved += self._seconds / self._batches
            return list(torch.split(outputs, list(map(len, parts))))
        said = self._ask(parts, is_timed=number == self._timed)
        if self._keeps:
            self._note(number, digest, parts, said)
        return said

    def _ask(self, parts: Sequence[Tensor], *, is_timed: bool) -> list[Any]:
        if not is_timed:
            return list(map(self._teacher, parts))
        _wait_for(parts[0].device)
        start = time.perf_counter()
        said = list(map(self._teacher, parts))
        _wait_for(parts[0].device)
        self._seconds = self._batches * (time.perf_counter() - start)
        return said

    def keep(self) -> None:
        """Write what the teacher was asked, if it was asked about the whole epoch."""
        if not self._keeps or self._file is None or len(self._asked) != self._batches:
            return
        digests = b"".join(digest for digest, _ in self._asked)
        outputs = [output.cpu() for _, output in self._asked]
        tensors = {
            "digests": torch.frombuffer(bytearray(digests), dtype=torch.uint8),
            "outputs": torch.cat(outputs).contiguous(),
            "sizes": torch.tensor(list(map(len, outputs))),
        }
        try:
            write_bytes_atomically(self._file, sealed(tensors, {"seconds": self._seconds}))
        except OSError as error:
            # Nothing is lost: who needs it asks the teacher again.
            logger.warning("What the original says of an epoch was not kept in %s: %s", self._file, error)

    def _digest(self, number: int, given: Tensor) -> bytes:
        # A batch that did not fit into memory comes again, in smaller parts.
        if self._given is None or self._given[0] != number:
            digest = hashlib.blake2b(digest_size=_HASH_BYTES)
            update_with_tensor(digest, given)
            self._given = number, digest.digest()
        return self._given[1]

    def _note(self, number: int, digest: bytes, parts: Sequence[Tensor], said: Sequence[Any]) -> None:
        if not all(
            isinstance(one, Tensor) and one.shape[:1] == part.shape[:1]
            for one, part in zip(said, parts, strict=True)
        ):
            self._give_up()
            return
        output = torch.cat(list(said)).detach()
        like = self._asked[0][1] if self._asked else output
        fits = output.nbytes * self._batches <= self._largest
        if number == len(self._asked) and output.shape[1:] == like.shape[1:] and fits:
            self._asked.append((digest, output))
            self._on_gpu += output.nbytes if output.device.type != "cpu" else 0
            if self._on_gpu > _ON_GPU_BYTES:
                self._asked = [(digest, output.cpu()) for digest, output in self._asked]
                self._on_gpu = 0
        else:
            # An epoch that was begun by another process, images of several sizes, or outputs too large.
            self._give_up()

    def _give_up(self) -> None:
        self._keeps = False
        self._asked = []


def _wait_for(device: torch.device) -> None:
    """Until what a GPU was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(file: Path) -> tuple[list[tuple[bytes, Tensor]], float]:
    """The outputs of an epoch, with the hash of each batch, none if they are not known; and their seconds."""
    try:
        tensors, values = unsealed(file.read_bytes())
        seconds = float(values.get("seconds", 0.0))
        digests = bytes(tensors["digests"].numpy())
        outputs = torch.split(tensors["outputs"], tensors["sizes"].tolist())
    except FileNotFoundError:
        return [], 0.0
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        logger.warning("The original's outputs in %s are damaged (%s). It is asked again.", file, error)
        return [], 0.0
    # The file's time says when it was last wanted, which `cache prune` goes by.
    with suppress(OSError):
        os.utime(file)
    starts = range(0, len(digests), _HASH_BYTES)
    known = [
        (digests[start : start + _HASH_BYTES], output) for start, output in zip(starts, outputs, strict=True)
    ]
    return known, seconds
