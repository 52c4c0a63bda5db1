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


class FairDraw:
    """Draws rows without knowing how many will come: each gets a random number, and the lowest stay.

    Vitter 1985, *Random sampling with a reservoir*. Rows at even distances would be simpler, and wrong where
    the distance meets the width of an image.

    Args:
        most: How many rows stay at most. Fewer all stay, in their order.
        seed: Fixes the numbers.
    """

    def __init__(self, most: int, *, seed: int = 0) -> None:
        self._most = most
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.empty(0)

    @property
    def kept(self) -> int:
        """How many rows have stayed so far."""
        return len(self._numbers)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Look at the next rows.

        Args:
            number: How many there are.

        Returns:
            The places, below ``most``, where new rows are to be kept, in place of others where these are
            taken; and the numbers of the rows that come there, below ``number``.
        """
        drawn = torch.rand(number, generator=self._generator)
        kept = self.kept
        fitting = min(self._most - kept, number)
        self._numbers = torch.cat([self._numbers, drawn[:fitting]])
        places, rows = torch.arange(kept, kept + fitting), torch.arange(fitting)
        if fitting < number:
            leaving, entering = self._exchange(drawn[fitting:])
            # A row that has just come may have to leave again.
            stays = ~torch.isin(places, leaving)
            places, rows = torch.cat([places[stays], leaving]), torch.cat([rows[stays], entering + fitting])
        return places, rows

    def _exchange(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Put low numbers in the place of the highest; return these places, and which numbers came there."""
        kept = self.kept
        order = torch.cat([self._numbers, drawn]).argsort()
        low, high = order[:kept], order[kept:]
        entering, leaving = low[low >= kept] - kept, high[high < kept]
        self._numbers[leaving] = drawn[entering]
        return leaving, entering


class RowSampling:
    """A fair draw from a layer's input rows.

    Args:
        layer: A convolution or a linear layer: how its inputs become rows, see
            :func:`compress_search.patches.input_patches`.
        seed: Fixes which rows are drawn.
    """

    def __init__(self, layer: nn.Module, *, seed: int = 0) -> None:
        self._layer = layer
        self._seed = seed
        self._draw: FairDraw | None = None
        self._rows = torch.empty(0)
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
        assert self._draw is not None
        return SampledRows(self._rows[:, : self._draw.kept])

    def _add_rows(self, rows: Tensor) -> None:
        groups, number, features = rows.shape
        if self._draw is None:
            most = most_rows(groups * features)
            self._draw = FairDraw(most, seed=self._seed)
            # Memory that nothing has been written to yet is not taken.
            self._rows = rows.new_empty(groups, most, features)
        self.seen += number
        places, taken = (chosen.to(rows.device) for chosen in self._draw.draw(number))
        self._rows[:, places] = rows[:, taken]


def most_rows(features: int) -> int:
    """How many rows of so many features, in all groups together, are kept at most."""
    return max(1, min(_MOST_ROWS, _MOST_ELEMENTS // features))
