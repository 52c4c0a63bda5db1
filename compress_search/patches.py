"""The regression view of a convolution: its input patches as rows, so that output = patches @ weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_search.exceptions import ModelError
from compress_search.profile import CONVOLUTIONS, is_plain


def input_patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Unfold a layer's inputs into the rows that its weights multiply.

    Works for linear layers and for convolutions of any dimension, stride, dilation and padding.

    Args:
        layer: A convolution or a linear layer.
        inputs: ``(batch, channels, *spatial)``, or ``(*, features)`` for a linear layer.

    Returns:
        ``(groups, rows, features)`` with ``features = channels / groups * kernel positions``, ordered as
        in ``layer.weight.flatten(1)``, and ``rows = batch * output positions``.

    Raises:
        ModelError: The layer is neither.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    if not isinstance(layer, CONVOLUTIONS):
        raise ModelError(f"Input patches of a {type(layer).__name__} are not defined.")
    padded = padded_inputs(layer, inputs)
    dimensions = len(layer.kernel_size)
    for axis in range(dimensions):
        size, step, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        padded = padded.unfold(axis + 2, (size - 1) * dilation + 1, step)[..., ::dilation]
    # (batch, channels, *positions, *kernel) -> (groups, batch * positions, channels / groups * kernel)
    batch, channels = padded.shape[:2]
    grouped = padded.reshape(batch, layer.groups, channels // layer.groups, *padded.shape[2:])
    positions = tuple(range(3, 3 + dimensions))
    kernel = tuple(range(3 + dimensions, 3 + 2 * dimensions))
    rows = grouped.permute(1, 0, *positions, 2, *kernel)
    features = channels // layer.groups * math.prod(layer.kernel_size)
    return rows.reshape(layer.groups, -1, features)


def has_patches(model: nn.Module, layer: str) -> bool:
    """Whether :func:`input_patches` is defined for the layer of that name, and its outputs come of them."""
    module = model.get_submodule(layer)
    return isinstance(module, (*CONVOLUTIONS, nn.Linear)) and is_plain(module)


def output_rows(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Arrange a layer's outputs as the rows that belong to :func:`input_patches`.

    Args:
        layer: A convolution or a linear layer.
        outputs: ``(batch, channels, *spatial)``, or ``(*, features)`` for a linear layer.

    Returns:
        ``(groups, rows, channels / groups)``.
    """
    if isinstance(layer, nn.Linear):
        return outputs.reshape(1, -1, outputs.shape[-1])
    groups = int(layer.groups)  # type: ignore[arg-type]
    grouped = outputs.reshape(outputs.shape[0], groups, outputs.shape[1] // groups, -1)
    return grouped.permute(1, 0, 3, 2).reshape(groups, -1, outputs.shape[1] // groups)


def padded_inputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Pad a convolution's inputs as the convolution itself does.

    Args:
        layer: A convolution.
        inputs: ``(batch, channels, *spatial)``.
    """
    assert isinstance(layer, CONVOLUTIONS)
    if layer.padding == "valid":
        return inputs
    # PyTorch keeps what functional.pad wants (last axis first) for every padding that is not plain zeros.
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        amounts = list(layer._reversed_padding_repeated_twice)
    else:
        amounts = [amount for amount in reversed(layer.padding) for _ in range(2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(inputs, amounts, mode=mode) if any(amounts) else inputs


def add_to_weights(layer: nn.Module, features: slice, change: Tensor) -> None:
    """Add to the weights of some features, in the layout of :func:`input_patches`, in place.

    Args:
        layer: A convolution or a linear layer.
        features: Which features. The one after the last, in a layer with a bias, is the bias.
        change: ``(groups, features, channels / groups)``, added in its own precision.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    groups, _, width = change.shape
    inputs = weight[0].numel()
    with torch.no_grad():
        if features.stop > inputs:
            assert isinstance(layer.bias, nn.Parameter)
            layer.bias.copy_(layer.bias.to(change.dtype) + change[:, -1].reshape(-1))
            features, change = slice(features.start, inputs), change[:, :-1]
        rows = weight.reshape(groups, width, inputs)
        rows[:, :, features] = (rows[:, :, features].to(change.dtype) + change.mT).to(rows.dtype)
        if rows.data_ptr() != weight.data_ptr():
            # The weight is laid out otherwise in memory, so that the rows are a copy.
            weight.copy_(rows.reshape(weight.shape))
