"""Two networks for CIFAR-10 that a CPU can train: ResNet-20 and a plain one in the manner of VGG.

Each is trained once, for about twenty minutes on a thread of its own, and its weights are kept. Launch it
with ``python studies/cifar10_networks.py`` to train beforehand what is not there. The weights of ResNet-20
that this made are in ``studies/weights``, whose README says how.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar10 import Images, load_cifar10
from torch import Tensor, nn

from compress_search import FineTune, Task
from compress_search.checkpoint import load_weights, save_weights
from compress_search.fingerprint import seeded
from compress_search.progress import Progress
from compress_search.training.fine_tuning import fine_tune

VALIDATION_IMAGES = 1_000
BATCH = 128
SEED = 0
BASELINES = Path("runs/baselines")
SHIPPED = Path(__file__).parent / "weights"
EXAMPLE = torch.zeros(1, 3, 32, 32)


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A padded convolution with batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = convolution(outputs, outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = convolution(inputs, outputs, kernel=1, stride=stride) if changes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        residual = self.second(torch.relu(self.first(images)))
        return torch.relu(residual + self.shortcut(images))


def resnet20() -> nn.Sequential:
    """He et al. 2016, *Deep residual learning*, section 4.2, with projections (their option B)."""
    layers: list[nn.Module] = [convolution(3, 16), nn.ReLU()]
    for inputs, outputs in itertools.pairwise((16, 16, 32, 64)):
        layers.append(Block(inputs, outputs, stride=outputs // inputs))
        layers += [Block(outputs, outputs), Block(outputs, outputs)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg() -> nn.Sequential:
    """A plain network of six 3x3 convolutions, halved after every second one."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 32, 64, 128)):
        layers += [convolution(inputs, outputs), nn.ReLU(), convolution(outputs, outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


NETWORKS: Mapping[str, tuple[Callable[[], nn.Sequential], int]] = {
    "resnet20": (resnet20, 20),
    "vgg": (vgg, 8),
}
"""Each network with the number of epochs that it is trained for."""


def normalised(pixels: Tensor) -> Tensor:
    """Map bytes ``(batch, 3, height, width)`` to numbers of about mean 0 and deviation 1."""
    inputs = (pixels.float() / 255 - 0.45) / 0.25
    # The order in memory that convolutions on a CPU are a quarter faster in.
    return inputs.contiguous(memory_format=torch.channels_last)


def whole_batches(images: Images, *, batch: int = 500) -> list[tuple[Tensor, Tensor]]:
    """Split images into batches ``(inputs, labels)``, in their order and unchanged."""
    inputs, labels = normalised(images.pixels), images.labels.long()
    return list(zip(torch.split(inputs, batch), torch.split(labels, batch), strict=True))


@dataclass(frozen=True)
class AugmentedBatches:
    """Training batches in a random order: of each image a random part of 24 x 24 pixels, flipped or not.

    The networks end in a mean over all positions, so they take whole images too; on parts, an epoch costs
    little more than half.
    """

    images: Images

    def __len__(self) -> int:
        """Number of batches; the images that fill no batch are left out, others in each epoch."""
        return len(self.images.labels) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(inputs, labels)``."""
        order = torch.randperm(len(self.images.labels))
        for chosen in torch.split(order, BATCH)[: len(self)]:
            rows, columns = (torch.randint(9, (BATCH, 1)) + torch.arange(24) for _ in range(2))
            columns = torch.where(torch.rand(BATCH, 1) < 0.5, columns, columns.flip(1))
            parts = self.images.pixels[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            yield normalised(parts.movedim(-1, 1)), self.images.labels[chosen].long()


def trained(name: str, train: Images, *, folder: Path = BASELINES) -> nn.Sequential:
    """Return a trained network; train it if its weights are neither shipped nor in the folder.

    The last thousand training images are held out to pick the best epoch.
    """
    build, epochs = NETWORKS[name]
    with seeded(SEED):
        network = build()
    weights = weights_of(name, folder=folder)
    if not weights.exists():
        parts = [
            Images(train.pixels[part], train.labels[part])
            for part in (slice(-VALIDATION_IMAGES), slice(-VALIDATION_IMAGES, None))
        ]
        task = Task(
            name=name,
            model=network,
            example_input=EXAMPLE,
            train=AugmentedBatches(parts[0]),
            validation=whole_batches(parts[1]),
        )
        # Twice as fast on processors that multiply in bfloat16, and many times slower on those that do not.
        quick = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
        schedule = FineTune(
            epochs=epochs,
            lr=0.1,
            warmup=0.2,
            distillation=0.0,
            precision="bfloat16" if quick else "float32",
        )
        fine_tune(network, None, task, schedule, seed=SEED, progress=Progress())
        save_weights(network, weights)
    load_weights(network, weights)
    return network.eval()


def weights_of(name: str, *, folder: Path = BASELINES) -> Path:
    """The file of a network's weights: the shipped one, or else where :func:`trained` keeps them."""
    file = f"cifar10-{name}.safetensors"
    return SHIPPED / file if (SHIPPED / file).exists() else folder / file


def main() -> None:
    """Train what is not trained yet; show every epoch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    train, _ = load_cifar10()
    for name in NETWORKS:
        trained(name, train)


if __name__ == "__main__":
    main()
