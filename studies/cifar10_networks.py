"""Networks for CIFAR-10: ResNets of He et al.'s widths, VGG-16, and a small plain one in the manner of VGG.

``python studies/train_baseline.py`` trains them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

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


def resnet(blocks: int) -> nn.Sequential:
    """He et al. 2016, *Deep residual learning*, section 4.2, with projections (their option B).

    Args:
        blocks: How many in each of the three stages, which are 16, 32 and 64 channels wide.
    """
    layers: list[nn.Module] = [convolution(3, 16), nn.ReLU()]
    for inputs, outputs in itertools.pairwise((16, 16, 32, 64)):
        layers.append(Block(inputs, outputs, stride=outputs // inputs))
        layers += [Block(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg16() -> nn.Sequential:
    """Simonyan & Zisserman 2015, configuration D with batch normalisation, and one linear layer for CIFAR-10.

    The last halving is a mean over all positions in place of a maximum, so that parts of images do too.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [convolution(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def vgg() -> nn.Sequential:
    """A plain network of six 3x3 convolutions, halved after every second one."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 32, 64, 128)):
        layers += [convolution(inputs, outputs), nn.ReLU(), convolution(outputs, outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


NETWORKS: Mapping[str, Callable[[], nn.Sequential]] = {
    "resnet20": lambda: resnet(3),
    "resnet56": lambda: resnet(9),
    "vgg": vgg,
    "vgg16": vgg16,
}
"""What builds each network, in training mode with random weights."""
