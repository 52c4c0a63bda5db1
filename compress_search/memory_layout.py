"""How images lie in memory while they go through a model: the layout in which convolutions are quickest.

On a CPU, a convolution has to rearrange images whose channels lie apart from each other before it can
multiply, and rearrange what comes of it. Where a pixel's channels lie side by side (*channels last*), it need
not, and each layer hands its inputs' layout on to the next. The numbers stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress_search.divergence import are_same_but_for_rounding, without_tf32
from compress_search.profile import inference_mode_of

_CHANNELS_AT_A_TIME = 8
"""Of oneDNN's kernels for AVX2."""


def in_quickest_layout(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Lay out batches of images as a model on a CPU gets through them most quickly.

    Batches are laid out anew once, where they enter: what is remembered of them goes by their identity.

    Args:
        model: The model. It is not changed.
        batches: Each ``(batch, ...)``.

    Returns:
        The batches ``(batch, channels, height, width)`` with their channels last, if the model convolves
        images on a CPU and gives the same outputs; a ``forward`` that views images as vectors does not even
        run on them. Otherwise, and all batches of other shapes, the very same tensors.
    """
    unchanged = list(batches)
    images = [batch for batch in unchanged if batch.ndim == 4]
    if not images or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return unchanged
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return unchanged
    # Of a single example, some layouts could not be told from each other.
    if not _is_indifferent(model, images[0][:2].cpu()):
        return unchanged
    return [_channels_last(batch) if batch.ndim == 4 else batch for batch in unchanged]


def can_train_channels_last(model: nn.Module, example: Tensor) -> bool:
    """Whether a model convolves images, gives the same outputs where their channels are last, and can learn.

    Args:
        model: The model. It is not changed.
        example: ``(batch, ...)``, on the model's device.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if example.ndim != 4 or not convolutions:
        return False
    if example.device.type == "cpu" and not all(map(has_safe_gradient, convolutions)):
        return False
    return _is_indifferent(model, torch.cat([example[:1], example[:1]]))


def has_safe_gradient(layer: nn.Module) -> bool:
    """Whether the gradient of a layer's weights can be asked for on a CPU where channels are last.

    For 1x1 kernels that stride over images of fewer channels than it handles at a time, oneDNN's kernel for
    AVX2 writes the gradient past its memory (its issue 6035); seen with PyTorch 2.15. Pruned residual
    networks have such shortcuts.
    """
    if not isinstance(layer, nn.Conv2d) or max(layer.stride) == 1 or max(layer.kernel_size) > 1:
        return True
    return layer.in_channels // layer.groups >= _CHANNELS_AT_A_TIME


def _is_indifferent(model: nn.Module, example: Tensor) -> bool:
    """Whether the model gives the same whichever layout its input has."""
    with inference_mode_of(model), without_tf32():
        wanted = model(example)
        try:
            given = model(_channels_last(example))
        except Exception:
            # Whatever a forward raises when it is given what it is not made for.
            return False
    return are_same_but_for_rounding(given, wanted)


def _channels_last(images: Tensor) -> Tensor:
    return images.to(memory_format=torch.channels_last)
