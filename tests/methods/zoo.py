"""Small networks that hold one difficulty each, for tests that run over every method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two blocks, the second strided with a 1x1 shortcut; batch norm and in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.bn4 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        x = self.relu(self.shortcut(x) + self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x))))))
        return self.head(x.mean(dim=(2, 3)))


class Concatenation(nn.Module):
    """torch.cat of two branches, functional relu and pooling, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 10, (3, 5), padding=(1, 2))
        self.merge = nn.Conv2d(16, 8, 3, padding=1, stride=2)
        self.hidden = nn.Linear(8 * 16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([functional.relu(self.left(x)), torch.sigmoid(self.right(x))], dim=1)
        x = torch.flatten(functional.max_pool2d(functional.relu(self.merge(x)), 2), 1)
        return self.head(functional.relu(self.hidden(x)))


class DepthwiseWithGate(nn.Module):
    """Inverted residual with a depthwise convolution, PReLU and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.expand, self.bn1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.bn2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.act = nn.PReLU(24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project, self.bn3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.act(self.bn2(self.depthwise(torch.relu(self.bn1(self.expand(x))))))
        gate = self.excite(torch.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1))))
        x = x + self.bn3(self.project(y * gate.sigmoid()))
        return self.head(x.mean(dim=(2, 3)))


class Reused(nn.Module):
    """One convolution used twice, a grouped one, and one registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.shared
        self.tail = nn.Conv2d(8, 4, 3, dilation=2, padding="same", padding_mode="circular")
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.shared(x))
        x = torch.relu(self.alias(x))
        x = torch.relu(self.grouped(torch.relu(self.tail(x))))
        return self.head(x.mean(dim=(2, 3)))


class DenseOutput(nn.Module):
    """A small U-Net whose output is a map; the head's channels are the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(12, 12, (1, 5), padding=(0, 2))
        self.up = nn.Conv2d(20, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = functional.relu(self.down1(x))
        deep = functional.relu(self.middle(functional.relu(self.down2(shallow))))
        deep = functional.interpolate(deep, scale_factor=2.0)
        return self.head(functional.relu(self.up(torch.cat([shallow, deep], dim=1))))


class Grouped(nn.Module):
    """Convolutions of many small groups (ResNeXt) and of few large ones (AlexNet), with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.small = nn.Conv2d(16, 24, 3, padding=1, groups=8)
        self.mix, self.bn = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.large = nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.silu(self.bn(self.mix(functional.relu(self.small(x)))))
        return self.head(functional.relu(self.up(functional.relu(self.large(x)))))


class Shuffled(nn.Module):
    """ShuffleNet's split, branch, concatenation and channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1))
        self.mix = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = functional.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([one, self.branch(other)], dim=1)
        batch, channels, height, width = x.shape
        x = (
            x.view(batch, 2, channels // 2, height, width)
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        return self.head(functional.relu(self.mix(x)))


class SpaceToDepth(nn.Module):
    """A YOLO-like detector: space-to-depth, tensors made in forward, and a head of several maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, 16, 3, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.lateral = nn.Conv2d(32, 12, 1)
        self.fine, self.coarse = nn.Conv2d(12, 18, 1), nn.Conv2d(16, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], dim=1)
        shallow = functional.leaky_relu(self.stem(x))
        deep = functional.silu(self.deep(shallow))
        up = functional.interpolate(deep, scale_factor=2.0)
        fine = self.fine(functional.relu(self.lateral(torch.cat([up, shallow], dim=1))))
        boxes = []
        for level in (fine, self.coarse(deep)):
            batch, _, height, width = level.shape
            level = level.view(batch, 3, 6, height, width).permute(0, 1, 3, 4, 2)
            grid = torch.full((1, 1, height, width, 1), 0.5) + torch.zeros_like(level[..., :1])
            boxes.append(torch.cat([level[..., :5].sigmoid(), level[..., 5:] + grid], dim=-1).flatten(1, 3))
        return torch.cat(boxes, dim=1).transpose(1, 2)


class TwoOutputs(NamedTuple):
    main: Tensor
    auxiliary: Tensor


class Auxiliary(nn.Module):
    """GoogLeNet's second classifier, which runs in training alone: with it, the output is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.aux = nn.Sequential(
            nn.Conv2d(20, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.aux_head = nn.Linear(16, 5)
        self.tail, self.head = nn.Conv2d(12, 10, 3, padding=1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor | TwoOutputs:
        shallow = torch.relu(self.bn(self.stem(x)))
        deep = torch.relu(self.body(shallow))
        main = self.head(torch.relu(self.tail(deep)).mean(dim=(2, 3)))
        if not self.training:
            return main
        both = torch.cat([functional.max_pool2d(shallow, 2), deep], dim=1)
        return TwoOutputs(main, self.aux_head(self.aux(both)))


ZOO: dict[str, type[nn.Module]] = {
    net.__name__: net
    for net in (
        Residual,
        Concatenation,
        DepthwiseWithGate,
        Reused,
        DenseOutput,
        Grouped,
        Shuffled,
        SpaceToDepth,
        Auxiliary,
    )
}
EXAMPLE_SHAPE = (1, 3, 16, 16)


def build(name: str) -> nn.Module:
    """A network of the zoo with fixed weights and lived-in batch-norm statistics."""
    torch.manual_seed(0)
    net = ZOO[name]()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, *EXAMPLE_SHAPE[1:]))
    return net.eval()
