"""What a network would put out with one group of channels pruned, without pruning it.

Removing channels that nothing listens to any more changes nothing. So the dense network imitates the pruned
one if the consumers have the weights that are re-solved for the channels that stay, and zeros for the others.
Deviation: where a normalisation across channels (layer or group norm) sees the group, its statistics would
change too; that is not imitated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress_search.calibration import InputMoments
from compress_search.methods.brain_surgeon import bias_that_follows, remove_blocks
from compress_search.methods.channel_choice import (
    NO_SENSITIVITIES,
    consumers_of_group,
    largest_blocks,
    mean_inputs,
)
from compress_search.methods.coupling import CoupledGroup, Member
from compress_search.methods.method import Imitation
from compress_search.methods.on_demand import OnDemand
from compress_search.profile import TRANSPOSED_CONVOLUTIONS
from compress_search.surgery import chunks


def imitate_group(
    model: nn.Module,
    group: CoupledGroup,
    sizes: Sequence[int],
    moments: Mapping[str, InputMoments],
    *,
    sensitivities: Mapping[str, Tensor] = NO_SENSITIVITIES,
    protected: Collection[int] = (),
) -> tuple[Imitation, tuple[int, ...]]:
    """Imitate a group pruned to several sizes, all on the way of one removal.

    Args:
        model: The model.
        group: The group.
        sizes: Numbers of blocks to keep.
        moments: What :func:`compress_search.methods.channel_choice.input_moments` says of its consumers;
            consumers that are not in it are not refitted.
        sensitivities: See :func:`compress_search.methods.channel_choice.choose_blocks`.
        protected: Indices of blocks that stay in any case.

    Returns:
        The imitation, and the blocks in the order in which the brain surgeon removed them, as far as it had
        to go; empty where it had no say.
    """
    known = [member for member in group.consumers if member.layer in moments]
    if not known:
        deaf = OnDemand(
            sizes,
            lambda size: _of_deaf_layers(
                model, group.consumers, _gone(group, largest_blocks(model, group, size, protected))
            ),
        )
        return Imitation(group.name, deaf, {size: 1 - size / group.size for size in sizes}), ()
    consumers = consumers_of_group(model, group, moments, sensitivities)
    removal = remove_blocks(consumers, keep=min(sizes), protected=protected, snapshots=sizes)
    means = {member.layer: mean_inputs(moments[member.layer]) for member in known}
    others = [member for member in group.consumers if member not in known]
    parameters = OnDemand(
        sizes,
        lambda size: {
            **_of_deaf_layers(model, others, _gone(group, removal.kept_at(size))),
            **_of_resolved_layers(model, removal.weights[size], means),
        },
    )
    errors = {size: sum(removal.errors[: group.size - size]) for size in sizes}
    return Imitation(group.name, parameters, errors), removal.order


def _gone(group: CoupledGroup, kept: Collection[int]) -> list[int]:
    return [block for block in range(group.size) if block not in kept]


def _of_resolved_layers(
    model: nn.Module, resolved: Sequence[Callable[[], Tensor]], means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameters of refitted layers by name.

    Args:
        model: The model.
        resolved: For each of a layer's chunks of inputs, layer by layer, what gives the weights
            ``(features, channels)``.
        means: For each of the layers the mean of its input rows, ``(chunks, features)``.
    """
    changed = {}
    solved = iter(resolved)
    for name, mean in means.items():
        layer = model.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        after = [compute() for compute in itertools.islice(solved, len(mean))]
        # A single chunk can be hundreds of megabytes, so it is not copied.
        rows = torch.cat([own.T for own in after]) if len(after) > 1 else after[0].T
        changed[f"{name}.weight"] = rows.reshape(weight.shape).to(weight)
        if isinstance(bias, nn.Parameter):
            before = weight.detach().flatten(1).reshape(len(mean), -1, mean.shape[1]).mT
            pieces = bias.detach().double().reshape(len(mean), -1)
            moved = [bias_that_follows(*parts) for parts in zip(pieces, mean, before, after, strict=True)]
            changed[f"{name}.bias"] = torch.cat(moved).to(bias)
    return changed


def _of_deaf_layers(model: nn.Module, members: Sequence[Member], gone: Sequence[int]) -> dict[str, Tensor]:
    """Weights by name of layers that are not refitted, with zeros for the inputs that are gone."""
    return {f"{m.layer}.weight": _deaf_weight(model.get_submodule(m.layer), m, gone) for m in members}


def _deaf_weight(layer: nn.Module, member: Member, gone: Sequence[int]) -> Tensor:
    """A layer's weight with zeros for the inputs of the blocks that are gone."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    changed = weight.detach().clone()
    channels = sorted({channel for block in gone for channel in member.blocks[block]})
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        changed[channels] = 0.0
        return changed
    width = weight.shape[1]
    by_chunk = changed.reshape(chunks(layer, "inputs"), -1, *weight.shape[1:])
    for channel in channels:
        by_chunk[channel // width, :, channel % width] = 0.0
    return changed
