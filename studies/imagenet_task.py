"""The task of every ImageNet study: a network of torchvision's with its weights, and a tree of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from image_data.folders import load_folder
from image_data.images import DataError
from torch import nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from compress_search import Task
from compress_search.exceptions import TaskError

CLASSES = 1_000


def imagenet_task(
    network: str,
    *,
    folder: str | Path | None = None,
    weights: str | None = "IMAGENET1K_V1",
    images: int | None = None,
    held_out: int = 10_000,
    batch: int = 256,
    workers: int | None = None,
    image_size: int = 224,
) -> Task:
    """Build the task around a network of torchvision's.

    Args:
        network: Its name there, such as ``"resnet50"``.
        folder: ``train`` and ``val``, or ImageNet's archives; see :mod:`image_data.folders`. By default
            ``$IMAGENET``, else ``runs/data/imagenet``.
        weights: The name of its weights there, which are downloaded once; ``None`` for random weights and
            as many classes as the tree has.
        images: How many images to fine-tune on; ``None`` is all.
        held_out: How many training images are kept for the search to judge by. ``val`` is the test data.
        batch: Images a batch.
        workers: Processes that read images, for each loader; by default one for each core, 8 at most.
        image_size: Height and width of what the network sees, in pixels.

    Raises:
        DataError: There is no such tree, or the weights are for other classes.
        TaskError: The weights cannot be downloaded, or there are none of that name.
    """
    place = Path(folder or os.environ.get("IMAGENET", "runs/data/imagenet"))
    loaders = load_folder(
        place,
        # The share of the image that is seen is the usual one: 224 of 256 pixels.
        evaluation=ImageClassification(crop_size=image_size, resize_size=image_size * 8 // 7),
        batch=batch,
        workers=min(8, os.cpu_count() or 1) if workers is None else workers,
        held_out=held_out,
        images=images,
        crop=image_size,
    )
    if weights is not None and loaders.classes != CLASSES:
        raise DataError(
            f"{place} has {loaders.classes} classes, but {weights} is for the {CLASSES} of ImageNet. "
            "Give the whole ImageNet, or write a task of your own around a network that was trained on these."
        )
    return Task(
        name=f"imagenet-{network}",
        model=pretrained(network, weights, loaders.classes),
        example_input=torch.zeros(1, 3, image_size, image_size),
        train=loaders.train,
        calibration=loaders.calibration,
        validation=loaders.validation,
        test=loaders.test,
    )


def pretrained(network: str, weights: str | None, classes: int) -> nn.Module:
    """Return a network of torchvision's, downloaded once, in evaluation mode.

    Raises:
        TaskError: See :func:`imagenet_task`.
    """
    there: Any = models.get_model_weights(network)
    if weights is not None and weights not in there.__members__:
        raise TaskError(f"{network} has no weights {weights!r}; it has {', '.join(there.__members__)}.")
    try:
        model: nn.Module = models.get_model(
            network, weights=None if weights is None else there[weights], num_classes=classes
        )
    except (OSError, RuntimeError) as error:
        url = there[weights].url if weights is not None else ""
        raise TaskError(
            f"The weights of {network} cannot be downloaded ({error}). Fetch {url} where that is possible, "
            f"and put it in {Path(torch.hub.get_dir()) / 'checkpoints'}."
        ) from error
    return model.eval()
