"""What a network would put out with one group of channels pruned, without pruning it.

Removing channels that nothing listens to any more changes nothing. So the dense network imitates the pruned
one if the consumers have the weights that are re-solved for the channels that stay, and zeros for the others.
Deviation: where a normalisation across channels (layer or group norm) sees the group, its statistics would
change too; that is not imitated.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress_search.methods.brain_surgeon import Removal, bias_that_follows, remove_blocks
from compress_search.methods.channel_choice import consumers_of, largest_blocks
from compress_search.methods.coupling import CoupledGroup, Member
from compress_search.methods.method import Imitation
from compress_search.profile import TRANSPOSED_CONVOLUTIONS
from compress_search.surgery import chunks


def imitate_group(
    model: nn.Module,
    group: CoupledGroup,
    sizes: Sequence[int],
    moments: Mapping[str, Tensor],
    *,
    protected: Collection[int] = (),
) -> tuple[Imitation, tuple[int, ...]]:
    """Imitate a group pruned to several sizes, all on the way of one removal.

    Args:
        model: The model.
        group: The group.
        sizes: Numbers of blocks to keep.
        moments: What :func:`compress_search.methods.channel_choice.input_moments` says of its consumers;
            consumers that are not in it are not refitted.
        protected: Indices of blocks that stay in any case.

    Returns:
        The imitation, and the blocks in the order in which the brain surgeon removed them, as far as it had
        to go; empty where it had no say.
    """
    known = [member for member in group.consumers if member.layer in moments]
    by_member = [consumers_of(model.get_submodule(m.layer), m, moments[m.layer]) for m in known]
    removal: Removal | None = None
    if known:
        consumers = [consumer for own in by_member for consumer in own]
        removal = remove_blocks(consumers, keep=min(sizes), protected=protected, snapshots=sizes)
    parameters: dict[int, Mapping[str, Tensor]] = {}
    errors = {}
    for size in sizes:
        kept = removal.kept_at(size) if removal else largest_blocks(model, group, size, protected)
        gone = [block for block in range(group.size) if block not in kept]
        changed = {}
        for member in group.consumers:
            if member not in known:
                layer = model.get_submodule(member.layer)
                changed[f"{member.layer}.weight"] = _deaf_weight(layer, member, gone)
        if removal:
            solved: Iterator[Tensor] = iter(removal.weights[size])
            for member, own in zip(known, by_member, strict=True):
                layer, resolved = model.get_submodule(member.layer), list(itertools.islice(solved, len(own)))
                before = [consumer.weights for consumer in own]
                changed |= _resolved(layer, member.layer, before, resolved, moments[member.layer])
        parameters[size] = changed
        errors[size] = sum(removal.errors[: group.size - size]) if removal else len(gone) / group.size
    return Imitation(group.name, parameters, errors), removal.order if removal else ()


def _resolved(
    layer: nn.Module, name: str, before: Sequence[Tensor], after: Sequence[Tensor], moments: Tensor
) -> dict[str, Tensor]:
    """A refitted layer's parameters by name.

    Args:
        layer: A convolution or linear layer.
        name: Its name.
        before: For each of its chunks of inputs, the weights ``(features, channels)``.
        after: Likewise, re-solved.
        moments: ``(chunks, features + 1, features + 1)``.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    rows = torch.cat([resolved.T for resolved in after])
    changed = {f"{name}.weight": rows.reshape(weight.shape).to(weight)}
    if isinstance(bias, nn.Parameter):
        pieces = bias.detach().double().reshape(len(before), -1)
        means = moments[:, :-1, -1]
        moved = [bias_that_follows(*parts) for parts in zip(pieces, means, before, after, strict=True)]
        changed[f"{name}.bias"] = torch.cat(moved).to(bias)
    return changed


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
