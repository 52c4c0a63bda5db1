"""ImageNet, and any tree of images with one folder a class, by the ordinary ``DataLoader``.

The tree is ``FOLDER/train/<class>/<image>`` and ``FOLDER/val/<class>/<image>``. Where FOLDER holds ImageNet's
three official archives instead, torchvision makes that tree of them, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder, ImageNet

from image_data.images import DataError

Transform = Callable[[Any], Tensor]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FolderLoaders:
    """The loaders of a tree of images.

    Attributes:
        train: Augmented training images, in a random order.
        calibration: Training images as they are, in a random order, to compress with.
        validation: Training images that are in neither, for the search to judge by.
        test: All images of ``val``.
        classes: How many there are.
    """

    train: DataLoader[Any]
    calibration: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]
    classes: int


def load_folder(
    folder: Path,
    *,
    evaluation: Transform,
    batch: int,
    workers: int,
    held_out: int,
    images: int | None = None,
    crop: int = 224,
) -> FolderLoaders:
    """Open a tree of images.

    Args:
        folder: The tree, or ImageNet's archives.
        evaluation: Maps an image to what the network takes, without augmentation.
        batch: Images a batch.
        workers: Processes that read images.
        held_out: How many training images are kept for validation, drawn once and for all.
        images: So many training images at most; ``None`` is all that are not held out.
        crop: Height and width of what the network is trained on, in pixels.

    Raises:
        DataError: There is no such tree, or it has too few images or other classes in ``val``.
    """
    augmented, plain, test = (
        _open(folder, split, transform)
        for split, transform in (("train", training(crop)), ("train", evaluation), ("val", evaluation))
    )
    if augmented.classes != test.classes:
        raise DataError(f"{folder / 'val'} has other classes than {folder / 'train'}.")
    if len(augmented) < held_out + batch:
        raise DataError(
            f"{folder / 'train'} has {len(augmented)} images: too few to hold out {held_out} and to train on "
            f"batches of {batch}."
        )
    order = torch.randperm(len(augmented), generator=torch.Generator().manual_seed(0)).tolist()
    unseen, seen = order[:held_out], order[held_out:][:images]

    def loader(part: Dataset[Any], **settings: Any) -> DataLoader[Any]:
        pinned = torch.cuda.is_available()
        return DataLoader(part, batch, num_workers=workers, pin_memory=pinned, **settings)

    return FolderLoaders(
        train=loader(Subset(augmented, seen), shuffle=True, drop_last=True),
        calibration=loader(Subset(plain, seen), shuffle=True),
        validation=loader(Subset(plain, unseen)),
        test=loader(test),
        classes=len(augmented.classes),
    )


def training(crop: int) -> Transform:
    """The usual augmentation: a random part of a random size and shape, flipped or not."""
    steps = [
        transforms.RandomResizedCrop(crop),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, DEVIATION),
    ]
    composed: Transform = transforms.Compose(steps)
    return composed


def _open(folder: Path, split: str, transform: Transform) -> Any:
    """One half of the tree, made of the archive if need be."""
    if not (folder / split).is_dir() and any(folder.glob("ILSVRC2012_*.tar*")):
        return ImageNet(str(folder), split=split, transform=transform)
    try:
        return ImageFolder(str(folder / split), transform=transform)
    except (FileNotFoundError, RuntimeError) as error:
        raise DataError(
            f"{folder} holds no images to read ({error}). It must have train/<class>/<image> and "
            "val/<class>/<image>, or ImageNet's archives (https://image-net.org, after signing up): "
            "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. "
            "Say where it is: IMAGENET=FOLDER in the environment, or task_args.folder=FOLDER."
        ) from error
