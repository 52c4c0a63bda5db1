"""The networks of :mod:`cifar10_networks` as AIMET must have them: each ReLU and each sum a module.

Parameters have the same names and the outputs are the same. PyTorch alone is imported here, because this is
read in the peers' environments too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

INPUT_SHAPE = (1, 3, 32, 32)

NewModule = Callable[[], nn.Module]


class Add(nn.Module):
    """The sum of two tensors."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Add tensors of equal shapes."""
        return torch.add(one, other)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, add: NewModule) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.first = _convolution(inputs, outputs, stride=stride)
        self.first_relu = nn.ReLU()
        self.second = _convolution(outputs, outputs)
        self.shortcut = _convolution(inputs, outputs, kernel=1, stride=stride) if stride > 1 else None
        self.add = add()
        self.second_relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        residual = self.second(self.first_relu(self.first(images)))
        beside = images if self.shortcut is None else self.shortcut(images)
        sums: Tensor = self.second_relu(self.add(residual, beside))
        return sums


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def resnet(blocks: int, add: NewModule) -> nn.Sequential:
    """He et al. 2016, section 4.2: three stages of so many blocks, 16, 32 and 64 channels wide."""
    layers: list[nn.Module] = [_convolution(3, 16), nn.ReLU()]
    for inputs, outputs in itertools.pairwise((16, 16, 32, 64)):
        layers.append(_Block(inputs, outputs, add=add))
        layers += [_Block(outputs, outputs, add=add) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


PEER_NETWORKS: Mapping[str, Callable[[NewModule], nn.Sequential]] = {"resnet20": lambda add: resnet(3, add)}
"""Each network by its name in :data:`cifar10_networks.NETWORKS`, given what makes a sum."""
