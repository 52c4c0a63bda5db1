"""A bounded sample of a layer's input rows, in place of a Gram matrix that would not fit into memory.

Of a layer with 25,088 inputs the Gram matrix takes 5 GB in float64, whatever the number of rows. It has no
more rank than there were rows, so some rows say the same in less memory: all of them where they are few, as
behind a flatten, where an example is a row; else as many as fit, drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search.moments import examples_at_a_time, in_full_precision
from compress_search.patches import input_patches

_MOST_ROWS = 2**12
"""How many rows are kept at most."""

_MOST_ELEMENTS = 2**25
"""How many elements they have at most (128 MB in float32): 1,337 rows of 25,088 features."""


@dataclass(frozen=True)
class SampledRows:
    """Rows whose second moments stand for those of all rows.

    Attributes:
        values: ``(groups, rows, features)``, in float32 or float64.
    """

    values: Tensor

    @property
    def mean(self) -> Tensor:
        """``(groups, features)`` in float64."""
        return self.values.mean(dim=1, dtype=torch.float64)

    @property
    def mean_energy(self) -> Tensor:
        """Mean of the squares, ``(groups,)`` in float64."""
        norm: Tensor = torch.linalg.vector_norm(self.values, dim=(1, 2), dtype=torch.float64)
        return norm.square() / self.values[0].numel()


class RowSampling:
    """Draws rows without knowing how many will come: each gets a random number, and the lowest stay.

    Vitter 1985, *Random sampling with a reservoir*. Rows at even distances would be simpler, and wrong where
    the distance meets the width of an image.

    Args:
        layer: A convolution or a linear layer: how its inputs become rows, see
            :func:`compress_search.patches.input_patches`.
        seed: Fixes the numbers.
    """

    def __init__(self, layer: nn.Module, *, seed: int = 0) -> None:
        self._layer = layer
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Tensor | None = None
        self._numbers = torch.empty(0)
        self.seen = 0

    def add(self, inputs: Tensor) -> None:
        """Look at the rows of some inputs.

        Args:
            inputs: ``(batch, channels, *spatial)``, or ``(*, features)`` for a linear layer.
        """
        for piece in torch.split(inputs, examples_at_a_time(self._layer, inputs)):
            self._add_rows(in_full_precision(input_patches(self._layer, piece)))

    def sample(self) -> SampledRows:
        """The rows that are left; at least some must have been added."""
        assert self._rows is not None
        return SampledRows(self._rows[:, : len(self._numbers)])

    def _add_rows(self, rows: Tensor) -> None:
        groups, number, features = rows.shape
        if self._rows is None:
            # Memory that nothing has been written to yet is not taken.
            self._rows = rows.new_empty(groups, most_rows(groups * features), features)
        self.seen += number
        drawn = torch.rand(number, generator=self._generator)
        kept = len(self._numbers)
        fitting = min(self._rows.shape[1] - kept, number)
        self._rows[:, kept : kept + fitting] = rows[:, :fitting]
        self._numbers = torch.cat([self._numbers, drawn[:fitting]])
        if fitting < number:
            self._exchange(rows[:, fitting:], drawn[fitting:])

    def _exchange(self, rows: Tensor, drawn: Tensor) -> None:
        """Put rows of low numbers in the place of those of the highest."""
        assert self._rows is not None
        kept = len(self._numbers)
        order = torch.cat([self._numbers, drawn]).argsort()
        low, high = order[:kept], order[kept:]
        entering, leaving = low[low >= kept] - kept, high[high < kept]
        self._rows[:, leaving.to(rows.device)] = rows[:, entering.to(rows.device)]
        self._numbers[leaving] = drawn[entering]


def most_rows(features: int) -> int:
    """How many rows of so many features, in all groups together, are kept at most."""
    return max(1, min(_MOST_ROWS, _MOST_ELEMENTS // features))
