"""Images with their labels, as all data sets that fit in memory give them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress_search.exceptions import CompressSearchError

FOLDER = Path("runs/data")
"""Where data sets are kept that were fetched, relative to the current folder."""


class DataError(CompressSearchError):
    """The data cannot be had, or is not what it should be."""


@dataclass(frozen=True)
class Images:
    """Images with their labels.

    Attributes:
        pixels: ``(images, channels, height, width)`` in uint8.
        labels: ``(images,)`` in uint8, from 0.
    """

    pixels: Tensor
    labels: Tensor

    def part(self, *bounds: int | None) -> Images:
        """The images of a slice, ``part(stop)`` or ``part(start, stop)``, without copying them."""
        where = slice(*bounds)
        return Images(self.pixels[where], self.labels[where])
