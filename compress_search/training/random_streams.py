"""Random numbers of training: the data draws from a stream of its own.

Which images come in which order, and how they are augmented, then depends on the epoch's seed alone, and not
on what the model draws in between (dropout). So the batches of half an epoch can be passed over without
running the model on them, and those that follow are the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_search.fingerprint import begun


@dataclass
class RandomState:
    """The state of every random source that :func:`compress_search.fingerprint.seeded` fixes.

    Attributes:
        cpu: Of torch on the CPU, bytes.
        gpus: Of torch on GPUs, bytes, by number; none if no GPU was used yet.
        numpy: Of numpy's global generator.
        python: Of :mod:`random`.
    """

    cpu: Tensor
    gpus: dict[int, Tensor]
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomState:
        """Read the present state."""
        # To ask would start every GPU of the machine, even for work on the CPU.
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(
            torch.get_rng_state(), dict(enumerate(gpus)), tuple(np.random.get_state()), random.getstate()
        )

    def restore(self) -> None:
        """Make it the present state."""
        torch.set_rng_state(self.cpu)
        for number, state in self.gpus.items():
            torch.cuda.set_rng_state(state, number)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def batches_of(loader: Iterable[Any], *, skip: int = 0) -> Iterator[Any]:
    """Go once through a loader, with random numbers that go on from the present state, for it alone.

    Args:
        loader: The loader. It should be seeded: see :func:`compress_search.fingerprint.seeded`.
        skip: So many batches are drawn, but not yielded.

    Raises:
        IndexError: There are not as many to skip.
    """
    return _batches(loader, _Stream(), skip)


def _batches(loader: Iterable[Any], stream: _Stream, skip: int) -> Iterator[Any]:
    with stream.own():
        iterator = begun(loader)
    for number in itertools.count():
        with stream.own():
            batch = next(iterator, _END)
        if batch is _END:
            if number < skip:
                raise IndexError(f"the loader has ended after {number} batches; it had {skip} before")
            return
        if number >= skip:
            yield batch


_END = object()


class _Stream:
    """Random numbers that go on from the state that they were left in, whatever happened between."""

    def __init__(self) -> None:
        self._state = RandomState.now()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Draw from this stream within the block."""
        outside = RandomState.now()
        self._state.restore()
        try:
            yield
        finally:
            self._state = RandomState.now()
            outside.restore()
