"""Which blocks of a group of coupled channels to keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from compress_search.calibration import InputMoments, gram_matrices, moment_elements
from compress_search.free_memory import give_back_free_memory
from compress_search.methods.brain_surgeon import Consumer, remove_blocks
from compress_search.methods.brain_surgeon_on_rows import ConsumerOnRows
from compress_search.methods.coupling import CoupledGroup, Member
from compress_search.methods.low_rank import root_of_sensitivity
from compress_search.patches import has_patches
from compress_search.profile import TRANSPOSED_CONVOLUTIONS
from compress_search.sampled_rows import SampledRows
from compress_search.surgery import chunks

NO_SENSITIVITIES: Mapping[str, Tensor] = MappingProxyType({})

_GRAM_ELEMENTS = 2**26
"""How many elements of Gram matrices are held at a time (512 MB in float64); the surgeon needs as much."""

_OUTPUTS_AT_A_TIME = 2**8
"""Of how many outputs the weights are looked at together."""


def choose_blocks(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    sizes: Mapping[str, int],
    batches: Sequence[Tensor],
    *,
    protected: Mapping[str, Collection[int]],
    sensitivities: Mapping[str, Tensor] = NO_SENSITIVITIES,
    orders: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, tuple[int, ...]]:
    """Choose the blocks of each group that stay.

    With data, the structured optimal brain surgeon orders the blocks by what their consumers lose, all
    consumers together. Without data, or where no consumer's inputs can be unfolded, the blocks of the
    largest weights stay.

    Args:
        model: The model.
        groups: The groups to prune.
        sizes: How many blocks each keeps, by name.
        batches: Calibration inputs, each ``(batch, ...)``; empty for the data-free choice.
        protected: Indices of the blocks that stay in any case, at most as many as the size, by group name.
        sensitivities: How much the network's output cares for errors in each consumer's outputs, by its name;
            see :func:`compress_search.methods.output_sensitivity.output_sensitivities`.
        orders: For groups that the brain surgeon has ordered on these batches before, the blocks that it
            removed, in that order.

    Returns:
        Indices of the blocks that stay, in ascending order, by group name.
    """
    kept = {}
    unordered = []
    for group in groups:
        gone = group.size - sizes[group.name]
        if len(orders.get(group.name, ())) >= gone:
            removed = set(orders[group.name][:gone])
            kept[group.name] = tuple(block for block in range(group.size) if block not in removed)
        else:
            unordered.append(group)
    for together in groups_within_memory(model, unordered):
        moments = input_moments(model, together, batches)
        for place, group in enumerate(together):
            consumers = consumers_of_group(model, group, moments, sensitivities)
            forget_moments(moments, together[place + 1 :])
            give_back_free_memory()
            kept[group.name] = _choose(
                model, group, consumers, size=sizes[group.name], protected=protected[group.name]
            )
            # Before others are made, or the next moments accumulated.
            del consumers
    return kept


def _choose(
    model: nn.Module,
    group: CoupledGroup,
    consumers: Sequence[Consumer | ConsumerOnRows],
    *,
    size: int,
    protected: Collection[int],
) -> tuple[int, ...]:
    if consumers:
        return remove_blocks(consumers, keep=size, protected=protected).kept
    return largest_blocks(model, group, size, protected)


def groups_within_memory(model: nn.Module, groups: Sequence[CoupledGroup]) -> list[list[CoupledGroup]]:
    """Divide groups into lists whose consumers' Gram matrices fit into memory together, or single groups."""
    lists: list[list[CoupledGroup]] = []
    filled = 0
    for group in groups:
        names = {member.layer for member in group.consumers if has_patches(model, member.layer)}
        elements = sum(moment_elements(model.get_submodule(name)) for name in names)
        if not lists or filled + elements > _GRAM_ELEMENTS:
            lists.append([])
            filled = 0
        lists[-1].append(group)
        filled += elements
    return lists


def input_moments(
    model: nn.Module, groups: Sequence[CoupledGroup], batches: Sequence[Tensor]
) -> dict[str, InputMoments]:
    """Second moments of every consumer's input patches, see :func:`gram_matrices`."""
    names = {member.layer for group in groups for member in group.consumers}
    views = {}
    for name in sorted(names):
        if has_patches(model, name):
            views[name] = model.get_submodule(name)
    return gram_matrices(model, views, batches) if batches and views else {}


def forget_moments(moments: dict[str, InputMoments], to_come: Sequence[CoupledGroup]) -> None:
    """Drop what the groups to come need not: each layer's can be hundreds of megabytes."""
    needed = {member.layer for group in to_come for member in group.consumers}
    for name in moments.keys() - needed:
        del moments[name]


def consumers_of_group(
    model: nn.Module,
    group: CoupledGroup,
    moments: Mapping[str, InputMoments],
    sensitivities: Mapping[str, Tensor],
) -> list[Consumer | ConsumerOnRows]:
    """All consumers of a group of whose inputs the moments are known.

    What their errors count can be added only if it is in the same unit for all of them: the sensitivities
    have a say if they are known of all, and none is so wide that its rows are sampled.
    """
    known = [member for member in group.consumers if member.layer in moments]
    names = {member.layer for member in known}
    weighed = names <= sensitivities.keys() and all(isinstance(moments[name], Tensor) for name in names)
    return [
        consumer
        for member in known
        for consumer in _consumers_of(
            model.get_submodule(member.layer),
            member,
            moments[member.layer],
            sensitivities[member.layer] if weighed else None,
        )
    ]


def _consumers_of(
    layer: nn.Module, member: Member, moments: InputMoments, sensitivity: Tensor | None
) -> list[Consumer | ConsumerOnRows]:
    """One consumer for each group of a layer: each sees its own part of every block."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    number = chunks(layer, "inputs")
    width, kernel = weight.shape[1], weight[0, 0].numel()
    rows = weight.detach().flatten(1).reshape(number, -1, width * kernel)
    found: list[Consumer | ConsumerOnRows] = []
    for chunk in range(number):
        own = [[c % width for c in block if c // width == chunk] for block in member.blocks]
        channels = torch.as_tensor(own, device=weight.device)
        taps = torch.arange(kernel, device=weight.device)
        features = (channels[:, :, None] * kernel + taps).flatten(1)
        # The bias can make good the mean of what is removed.
        mean = mean_inputs(moments)[chunk] if isinstance(layer.bias, nn.Parameter) else None
        if isinstance(moments, SampledRows):
            # One copy and no more: it can be hundreds of megabytes.
            seen = moments.values[chunk].to(torch.float64, copy=True)
            if mean is not None:
                seen -= mean
            seen /= math.sqrt(len(seen))
            found.append(ConsumerOnRows(seen, weights=rows[chunk].T, blocks=features))
        else:
            covariance = moments[chunk, :-1, :-1]
            covariance = covariance if mean is None else covariance - torch.outer(mean, mean)
            root = None
            if sensitivity is not None:
                relative, scale = root_of_sensitivity(sensitivity[chunk])
                root = relative * scale.sqrt()
            found.append(Consumer(covariance, rows[chunk].double().T, features, root))
    return found


def mean_inputs(moments: InputMoments) -> Tensor:
    """Mean of a layer's input rows, ``(chunks, features)`` in float64."""
    return moments.mean if isinstance(moments, SampledRows) else moments[:, :-1, -1]


def largest_blocks(
    model: nn.Module, group: CoupledGroup, size: int, protected: Collection[int]
) -> tuple[int, ...]:
    """The protected blocks, then those of the largest weights.

    Li et al. 2017, *Pruning filters for efficient ConvNets*; here the shares of all members are summed.
    """
    scores = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        weight = layer.weight
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            continue
        output_axis = 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else 0
        axis = output_axis if member.side == "outputs" else 1 - output_axis
        others = [a for a in range(weight.ndim) if a != axis]
        # In pieces, since each is copied in float64, and a weight can be the largest thing in memory.
        pieces = [
            torch.linalg.vector_norm(piece, dim=others, dtype=torch.float64).square().cpu()
            for piece in torch.split(weight.detach(), _OUTPUTS_AT_A_TIME)
        ]
        energy = torch.cat(pieces) if axis == 0 else torch.stack(pieces).sum(dim=0)
        # A grouped layer's weight holds the input channels of one group only.
        blocks = torch.as_tensor(member.blocks) % len(energy)
        scores += energy[blocks].sum(dim=1) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    scores[list(protected)] = torch.inf
    return tuple(sorted(scores.topk(size).indices.tolist()))
