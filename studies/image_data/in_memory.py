"""Batches of images that fit in memory: cut out of one tensor, and augmented a batch at a time.

The ordinary ``DataLoader`` fetches and augments images one by one, which keeps a small network waiting. Here
a batch is a few operations on whole tensors. Random numbers come from torch's generator of the CPU, whatever
device the images are on: an epoch is the same on every device, and a training that was killed draws the same
batches again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from image_data.images import DataError, Images


def normalised(pixels: Tensor) -> Tensor:
    """Map bytes ``(batch, channels, height, width)`` to numbers of about mean 0 and deviation 1."""
    inputs = (pixels.float() / 255 - 0.45) / 0.25
    # The order in memory that convolutions on a CPU are a quarter faster in.
    return inputs.contiguous(memory_format=torch.channels_last)


def whole_batches(
    images: Images, *, batch: int = 500, device: torch.device | str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """Split images into batches ``(inputs, labels)``, in their order and unchanged."""
    inputs, labels = normalised(images.pixels.to(device)), images.labels.to(device).long()
    return list(zip(torch.split(inputs, batch), torch.split(labels, batch), strict=True))


@dataclass(frozen=True)
class AugmentedBatches:
    """Training batches in a random order: of each image a random part, flipped or not.

    By default a part is 24 x 24 pixels. Networks that end in a mean over all positions take whole images too;
    on such parts, an epoch on CIFAR-10 costs little more than half. With a ``crop`` of 32 and a ``padding``
    of 4 it is the usual augmentation of that data (He et al. 2016, section 4.2).

    Attributes:
        images: What is drawn from.
        batch: Images a batch. Those that fill no batch are left out, others in each epoch.
        crop: Height and width of a part, in pixels.
        padding: Black pixels around each image, of which a part may have some.
        flip: Whether half of the parts are mirrored.
        cutout: Side of a square, in pixels, that is made grey at a random place of each part, of which it may
            stick out (DeVries & Taylor 2017); 0 for none.
        device: Where the images are kept, and the batches made.
    """

    images: Images
    batch: int = 128
    crop: int = 24
    padding: int = 0
    flip: bool = True
    cutout: int = 0
    device: torch.device | str = "cpu"
    _pixels: Tensor = field(init=False, repr=False)
    _labels: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count, least = len(self.images.labels), min(self.images.pixels.shape[-2:]) + 2 * self.padding
        if not 0 < self.batch <= count:
            raise DataError(f"batch is {self.batch!r}, of {count} images; it must be from 1 to {count}.")
        if not 0 < self.crop <= least:
            raise DataError(f"crop is {self.crop!r}, of images of {least} pixels; it must be 1 to {least}.")
        pixels = pad(self.images.pixels, [self.padding] * 4).to(self.device)
        object.__setattr__(self, "_pixels", pixels)
        object.__setattr__(self, "_labels", self.images.labels.to(self.device).long())

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.images.labels) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs ``(batch, channels, crop, crop)`` and labels ``(batch,)``."""
        order = torch.randperm(len(self.images.labels))
        for chosen in torch.split(order, self.batch)[: len(self)]:
            inputs = normalised(self._parts(chosen))
            if self.cutout:
                inputs.masked_fill_(self._squares(), 0.0)
            yield inputs, self._labels[chosen.to(self.device)]

    def _parts(self, chosen: Tensor) -> Tensor:
        height, width = self._pixels.shape[-2:]
        rows, columns = (
            torch.randint(size - self.crop + 1, (self.batch, 1)) + torch.arange(self.crop)
            for size in (height, width)
        )
        if self.flip:
            columns = torch.where(torch.rand(self.batch, 1) < 0.5, columns, columns.flip(1))
        images, rows, columns = (
            index.to(self.device) for index in (chosen[:, None, None], rows[:, :, None], columns[:, None, :])
        )
        return self._pixels[images, :, rows, columns].movedim(-1, 1)

    def _squares(self) -> Tensor:
        """Which pixels of each part are cut out, ``(batch, 1, crop, crop)``."""
        rows, columns = (
            torch.arange(self.crop) - torch.randint(self.crop, (self.batch, 1)) + self.cutout // 2
            for _ in range(2)
        )
        inside = [(place >= 0) & (place < self.cutout) for place in (rows, columns)]
        return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(self.device)
