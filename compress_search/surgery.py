"""Cutting channels out of single modules. Knows shapes and parameters, nothing of networks or methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress_search.exceptions import PlanError
from compress_search.profile import CONVOLUTIONS


def keep_channels(
    module: nn.Module,
    *,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
) -> None:
    """Keep only the named input and output channels of a module, in place.

    Args:
        module: A convolution, linear layer, batch normalisation or PReLU. A depthwise convolution
            and a channel-wise module have one set of channels: name it as ``outputs``.
        inputs: Indices of the input channels to keep; ``None`` keeps all.
        outputs: Indices of the output channels to keep; ``None`` keeps all.

    Raises:
        PlanError: The module is of a type that cannot be cut.
    """
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        _keep_weight(module, inputs, outputs)
    elif isinstance(module, _BatchNorm):
        assert inputs is None and outputs is not None
        _keep_first_axis(module, ("weight", "bias", "running_mean", "running_var"), outputs)
        module.num_features = len(outputs)
    elif isinstance(module, nn.PReLU):
        assert inputs is None and outputs is not None
        if module.num_parameters > 1:
            _keep_first_axis(module, ("weight",), outputs)
            module.num_parameters = len(outputs)
    else:
        raise PlanError(f"Channels of a {type(module).__name__} cannot be cut.")


def can_keep_channels(module: nn.Module) -> bool:
    """Whether :func:`keep_channels` knows how to cut this module."""
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 or is_depthwise(module)
    return isinstance(module, nn.Linear | _BatchNorm | nn.PReLU)


def channel_count(module: nn.Module, side: str) -> int:
    """Number of channels of one side of a module that :func:`keep_channels` can cut.

    Args:
        module: The module.
        side: ``"inputs"`` or ``"outputs"``.
    """
    if isinstance(module, nn.Linear):
        return module.in_features if side == "inputs" else module.out_features
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels if side == "inputs" else module.out_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    assert isinstance(module, _BatchNorm)
    return module.num_features


def is_depthwise(module: nn.Module) -> bool:
    """Whether the module is a convolution with one filter for each channel."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def _keep_weight(module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> None:
    if outputs is not None:
        _keep_first_axis(module, ("weight", "bias"), outputs)
    if is_depthwise(module):
        assert inputs is None and outputs is not None
        module.groups = module.in_channels = len(outputs)  # type: ignore[assignment]
    elif inputs is not None:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        index = torch.as_tensor(list(inputs), device=weight.device)
        module.weight = nn.Parameter(weight.detach().index_select(1, index), weight.requires_grad)
    out_name, in_name = (
        ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
    )
    if outputs is not None:
        setattr(module, out_name, len(outputs))
    if inputs is not None:
        setattr(module, in_name, len(inputs))


def _keep_first_axis(module: nn.Module, names: Sequence[str], kept: Sequence[int]) -> None:
    for name in names:
        tensor = getattr(module, name)
        if tensor is None:
            continue
        cut = tensor.detach().index_select(0, torch.as_tensor(list(kept), device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, tensor.requires_grad)
        setattr(module, name, cut)
