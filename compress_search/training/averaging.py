"""An exponential moving average of a model's weights, to be evaluated and kept in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model that follows it: call ``update_parameters(model)`` after each step.

    After ``n`` steps its weights are multiplied by ``d = min(decay, (1 + n) / (10 + n))`` and the model's by
    ``1 - d``: at first it follows quickly, so that short trainings are not held at their beginning
    (the warm-up of TensorFlow's ExponentialMovingAverage). Statistics of batch normalisation are averaged
    alike; counters are copied.

    Args:
        model: The model.
        decay: In (0, 1).
    """

    def average(averages: list[Tensor], latest: list[Tensor], steps: Tensor | int) -> None:
        done = int(steps)
        weight = 1 - min(decay, (1 + done) / (10 + done))
        for kept, new in zip(averages, latest, strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, weight)
            else:
                kept.copy_(new)

    update: Any = torch.no_grad()(average)
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
