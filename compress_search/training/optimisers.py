"""Optimisers: what turns gradients into steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from compress_search.recipe import FineTune

_SECOND_BETA = 0.999


def _sgd(groups: list[dict[str, Any]], settings: FineTune) -> Optimizer:
    return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def _adamw(groups: list[dict[str, Any]], settings: FineTune) -> Optimizer:
    return AdamW(groups, lr=settings.lr, betas=(settings.momentum, _SECOND_BETA))


OPTIMISERS: Mapping[str, Callable[[list[dict[str, Any]], FineTune], Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
}


def make_optimiser(parameters: list[nn.Parameter], settings: FineTune) -> Optimizer:
    """Make the optimiser that the settings name.

    Args:
        parameters: What is trained. Those of one axis (biases, normalisation) are exempt from weight decay.
        settings: Name the optimiser and its numbers.
    """
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMISERS[settings.optimiser](groups, settings)
