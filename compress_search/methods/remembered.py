"""Results that depend on calibration batches, kept as long as the same batches are used.

Choosing sizes and applying them look at the same data: what the first has computed, the second need not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class Remembered(Generic[T]):
    """Results by name, for one sequence of batches."""

    _batches: Sequence[Tensor] | None = field(default=None, repr=False)
    _results: dict[str, T] = field(default_factory=dict, repr=False)

    def of(self, batches: Sequence[Tensor]) -> dict[str, T]:
        """What is known for these batches, to be read and added to; others' results are forgotten.

        Batches are the same if they are the same tensors, not if they are equal.
        """
        same = self._batches is not None and len(self._batches) == len(batches)
        if not same or any(a is not b for a, b in zip(self._batches or (), batches, strict=True)):
            self._batches, self._results = list(batches), {}
        return self._results
