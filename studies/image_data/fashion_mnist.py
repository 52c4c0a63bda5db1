"""Fashion-MNIST as tensors: 70,000 grey images of 28 x 28 pixels in ten classes.

Xiao, Rasul & Vollgraf 2017, *Fashion-MNIST: a novel image dataset*. It is drop-in for MNIST, and harder.
Launch ``python studies/fetch_data.py fashion_mnist`` to fetch it beforehand.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from image_data.fetching import fetch, verified
from image_data.images import FOLDER, Images

CHECKSUMS: Mapping[str, str] = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
"""MD5 of each file, decompressed: a header of four bytes, four more for each axis, and the numbers."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs the files."""


def load_fashion_mnist(folder: Path = FOLDER) -> tuple[Images, Images]:
    """Return the 60,000 training and the 10,000 test images, ``(images, 1, 28, 28)``; fetch them once.

    Args:
        folder: Where the four files (55 MB) are kept.

    Raises:
        DataError: They cannot be fetched, or differ from the official ones.
    """
    home = folder / "fashion-mnist"
    if not all((home / name).exists() for name in CHECKSUMS):
        fetch(
            "Fashion-MNIST",
            (_from_debian, _from_torchvision),
            lambda part: (home / part[0], part[1]),
            remedy=f"Install Debian's dataset-fashion-mnist, or put its files, decompressed, in {home}.",
        )
    read = {name: verified(home / name, CHECKSUMS[name], what="file") for name in CHECKSUMS}
    pixels, labels, test_pixels, test_labels = (_tensor(content) for content in read.values())
    return Images(pixels[:, None], labels), Images(test_pixels[:, None], test_labels)


def _tensor(content: bytes) -> Tensor:
    """Read the IDX format: two zeros, the type (8: bytes), the number of axes, the length of each."""
    axes = content[3]
    lengths = [int.from_bytes(content[4 * axis : 4 * axis + 4], "big") for axis in range(1, axes + 1)]
    return torch.frombuffer(bytearray(content[4 * (axes + 1) :]), dtype=torch.uint8).reshape(lengths)


def _from_torchvision(scratch: Path) -> Iterator[tuple[str, bytes]]:
    FashionMNIST(str(scratch), download=True)
    for name in CHECKSUMS:
        yield name, next(scratch.rglob(name)).read_bytes()


def _from_debian(_scratch: Path) -> Iterator[tuple[str, bytes]]:
    for name in CHECKSUMS:
        yield name, gzip.decompress((DEBIAN / f"{name}.gz").read_bytes())
