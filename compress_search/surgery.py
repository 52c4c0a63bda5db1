"""Cutting channels out of single modules. Knows shapes and parameters, nothing of networks or methods.

A module either *mixes* its input channels into output channels, and each side is cut by itself, or it
*carries* channels through one by one (or chunk by chunk), and has only ``outputs``. A grouped convolution of
many small groups carries its groups; one of few large groups mixes, and keeps the same positions in each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from compress_search.exceptions import PlanError
from compress_search.profile import CONVOLUTIONS, COUNTED_LAYERS, TRANSPOSED_CONVOLUTIONS, is_plain

SIDES = ("inputs", "outputs")


def keep_channels(
    module: nn.Module,
    *,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
) -> None:
    """Keep only the named input and output channels of a module, in place.

    Args:
        module: A module for which :func:`can_keep_channels` holds.
        inputs: Indices of the input channels to keep; ``None`` keeps all. A module that carries channels
            has none.
        outputs: Indices of the output channels to keep; ``None`` keeps all.

    Raises:
        PlanError: The module is of a type that cannot be cut, or its groups would become unequal.
    """
    cut = _cutter_of(module)
    if cut is None:
        raise PlanError(f"Channels of a {type(module).__name__} cannot be cut.")
    if cut is _cut_carrying_convolution and _is_cut_as_mixing(module, inputs, outputs):
        cut = _cut_mixing
    cut(module, inputs, outputs)


def can_keep_channels(module: nn.Module) -> bool:
    """Whether :func:`keep_channels` knows how to cut this module."""
    return _cutter_of(module) is not None


def carries_channels(module: nn.Module) -> bool:
    """Whether the module has one set of channels that pass through it, named as its ``outputs``."""
    return _cutter_of(module) in (_cut_carrying_convolution, _cut_channelwise, _cut_prelu, _cut_group_norm)


def channel_count(module: nn.Module, side: str) -> int:
    """Number of channels of one side of a module that can be cut.

    Args:
        module: The module.
        side: ``"inputs"`` or ``"outputs"``.
    """
    if isinstance(module, nn.Linear):
        return module.in_features if side == "inputs" else module.out_features
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)):
        return module.in_channels if side == "inputs" else module.out_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    assert isinstance(module, _BatchNorm | _InstanceNorm)
    return module.num_features


def has_channel(module: nn.Module, side: str, number: int) -> bool:
    """Whether a module has a channel of that number; a PReLU of one parameter has whatever it is given.

    Args:
        module: The module.
        side: ``"inputs"`` or ``"outputs"``.
        number: The channel.
    """
    is_indifferent = isinstance(module, nn.PReLU) and module.num_parameters == 1
    return number >= 0 and (is_indifferent or number < channel_count(module, side))


def chunks(module: nn.Module, side: str) -> int:
    """In how many chunks the channels of one side lie that must stay equally wide; 1 where there are none.

    Args:
        module: The module.
        side: ``"inputs"`` or ``"outputs"``.
    """
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def sides_of_parameter(module: nn.Module, name: str) -> tuple[str, ...]:
    """The sides of a module whose channels a parameter shrinks with, when :func:`keep_channels` cuts them.

    Args:
        module: Any module.
        name: Name of one of its own parameters.
    """
    cut = _cutter_of(module)
    if cut is None or name not in ("weight", "bias"):
        return ()
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return ()
    return SIDES if cut is _cut_mixing and name == "weight" else ("outputs",)


Cutter = Callable[[nn.Module, Sequence[int] | None, Sequence[int] | None], None]


def _cutter_of(module: nn.Module) -> Cutter | None:
    if isinstance(module, COUNTED_LAYERS) and not is_plain(module):
        return None
    if isinstance(module, CONVOLUTIONS):
        # Groups of one or few channels come and go as wholes; of large groups each loses the same positions.
        many_groups = 1 < module.groups >= module.in_channels // module.groups
        return _cut_carrying_convolution if many_groups else _cut_mixing
    if isinstance(module, nn.Linear) or (isinstance(module, TRANSPOSED_CONVOLUTIONS) and module.groups == 1):
        return _cut_mixing
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return _cut_channelwise
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return _cut_channelwise
    if isinstance(module, nn.GroupNorm):
        return _cut_group_norm
    return _cut_prelu if isinstance(module, nn.PReLU) else None


def _is_cut_as_mixing(module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> bool:
    """Whether a cut can only be meant for a convolution of few large groups.

    An earlier cut of its inputs may have made the groups so small that it now looks like one of many.
    """
    if inputs is not None:
        return True
    number = chunks(module, "outputs")
    width = channel_count(module, "outputs") // number
    kept = Counter(channel // width for channel in outputs or ())
    return len(kept) == number and len(set(kept.values())) == 1


def _cut_mixing(module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> None:
    transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)
    is_linear = isinstance(module, nn.Linear)
    if outputs is not None:
        _check_chunks(module, "outputs", outputs)
        _keep_on_axis(module, "weight", 1 if transposed else 0, outputs)
        _keep_on_axis(module, "bias", 0, outputs)
    if inputs is not None:
        positions = _check_chunks(module, "inputs", inputs)
        _keep_on_axis(module, "weight", 0 if transposed else 1, positions)
        setattr(module, "in_features" if is_linear else "in_channels", len(inputs))
    if outputs is not None:
        setattr(module, "out_features" if is_linear else "out_channels", len(outputs))


def _cut_carrying_convolution(
    module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None
) -> None:
    assert isinstance(module, CONVOLUTIONS) and inputs is None and outputs is not None
    width = module.out_channels // module.groups
    kept_groups = sorted({channel // width for channel in outputs})
    if len(outputs) != width * len(kept_groups):
        raise PlanError(f"A convolution of {module.groups} groups keeps whole groups of {width} channels.")
    _keep_on_axis(module, "weight", 0, outputs)
    _keep_on_axis(module, "bias", 0, outputs)
    module.in_channels = module.in_channels // module.groups * len(kept_groups)
    module.groups, module.out_channels = len(kept_groups), len(outputs)


def _cut_channelwise(module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> None:
    assert inputs is None and outputs is not None
    for name in ("weight", "bias", "running_mean", "running_var"):
        _keep_on_axis(module, name, 0, outputs)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (len(outputs),)
    else:
        module.num_features = len(outputs)  # type: ignore[assignment]


def _cut_group_norm(module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> None:
    assert isinstance(module, nn.GroupNorm) and inputs is None and outputs is not None
    _check_chunks(module, "outputs", outputs)
    for name in ("weight", "bias"):
        _keep_on_axis(module, name, 0, outputs)
    module.num_channels = len(outputs)


def _cut_prelu(module: nn.Module, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> None:
    assert isinstance(module, nn.PReLU) and inputs is None and outputs is not None
    if module.num_parameters > 1:
        _keep_on_axis(module, "weight", 0, outputs)
        module.num_parameters = len(outputs)


def _check_chunks(module: nn.Module, side: str, kept: Sequence[int]) -> list[int]:
    """Return the positions that every chunk keeps.

    Raises:
        PlanError: The chunks keep different positions, where the inputs need the same ones, or become
            unequally wide.
    """
    number = chunks(module, side)
    width = channel_count(module, side) // number
    positions = [[c - chunk * width for c in kept if c // width == chunk] for chunk in range(number)]
    unequal = len({len(p) for p in positions}) > 1
    if unequal or (side == "inputs" and any(p != positions[0] for p in positions)):
        raise PlanError(f"The {number} groups of a {type(module).__name__} must keep the same channels each.")
    return positions[0]


def _keep_on_axis(module: nn.Module, name: str, axis: int, kept: Sequence[int]) -> None:
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    cut = tensor.detach().index_select(axis, torch.as_tensor(list(kept), device=tensor.device))
    if isinstance(tensor, nn.Parameter):
        cut = nn.Parameter(cut, tensor.requires_grad)
    setattr(module, name, cut)
