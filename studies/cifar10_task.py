"""The task of every CIFAR-10 study: a trained network, and CIFAR-10 in batches cut out of memory."""

from __future__ import annotations

from pathlib import Path

import torch
from cifar10_networks import EXAMPLE
from image_data.cifar10 import load_cifar10
from image_data.images import FOLDER
from image_data.in_memory import AugmentedBatches, whole_batches
from train_baseline import BASELINES, held_out, trained

from compress_search import Task

CALIBRATION_IMAGES = 5_000
"""What the methods can draw their samples from."""


def cifar10_task(
    network: str,
    *,
    images: int | None = None,
    test_images: int | None = None,
    crop: int = 32,
    padding: int = 4,
    batch: int = 128,
    data: str | Path = FOLDER,
    baselines: str | Path = BASELINES,
) -> Task:
    """Build the task around a trained network; it is trained first if its weights are nowhere.

    Args:
        network: A key of :data:`cifar10_networks.NETWORKS`.
        images: How many images to fine-tune on; ``None`` is all 49,000.
        test_images: How many test images to look at; ``None`` is all 10,000.
        crop: Height and width of the parts of images to fine-tune on, in pixels.
        padding: Black pixels around each image, of which a part may have some.
        batch: Images a batch of fine-tuning.
        data: Where CIFAR-10 lies, or is fetched to.
        baselines: Where trained weights lie that are not shipped.

    Raises:
        DataError: CIFAR-10 cannot be had, or a number does not fit it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = load_cifar10(Path(data))
    seen, unseen = held_out(train)
    return Task(
        name=f"cifar10-{network}",
        model=trained(network, train, folder=Path(baselines)),
        example_input=EXAMPLE,
        train=AugmentedBatches(seen.part(images), batch=batch, crop=crop, padding=padding, device=device),
        calibration=whole_batches(seen.part(CALIBRATION_IMAGES)),
        validation=whole_batches(unseen, device=device),
        test=whole_batches(test.part(test_images), device=device),
    )
