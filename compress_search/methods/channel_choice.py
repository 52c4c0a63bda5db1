"""Which blocks of a group of coupled channels to keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress_search.calibration import gram_matrices
from compress_search.methods.brain_surgeon import Consumer, remove_blocks
from compress_search.methods.coupling import CoupledGroup, Member
from compress_search.patches import has_patches
from compress_search.profile import TRANSPOSED_CONVOLUTIONS
from compress_search.surgery import chunks


def choose_blocks(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    sizes: Mapping[str, int],
    batches: Sequence[Tensor],
    *,
    protected: Mapping[str, Collection[int]],
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

    Returns:
        Indices of the blocks that stay, in ascending order, by group name.
    """
    moments = input_moments(model, groups, batches)
    kept = {}
    for group in groups:
        consumers = [
            consumer
            for member in group.consumers
            if member.layer in moments
            for consumer in consumers_of(model.get_submodule(member.layer), member, moments[member.layer])
        ]
        size, stay = sizes[group.name], protected[group.name]
        kept[group.name] = (
            remove_blocks(consumers, keep=size, protected=stay).kept
            if consumers
            else largest_blocks(model, group, size, stay)
        )
    return kept


def input_moments(
    model: nn.Module, groups: Sequence[CoupledGroup], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Second moments of every consumer's input patches, ``(chunks, features + 1, features + 1)``."""
    names = {member.layer for group in groups for member in group.consumers}
    views = {}
    for name in sorted(names):
        if has_patches(model, name):
            views[name] = model.get_submodule(name)
    return gram_matrices(model, views, batches) if batches and views else {}


def consumers_of(layer: nn.Module, member: Member, moments: Tensor) -> list[Consumer]:
    """One consumer for each group of a layer: each sees its own part of every block."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    number = chunks(layer, "inputs")
    width, kernel = weight.shape[1], weight[0, 0].numel()
    rows = weight.detach().double().flatten(1).reshape(number, -1, width * kernel)
    found = []
    for chunk in range(number):
        own = [[c % width for c in block if c // width == chunk] for block in member.blocks]
        channels = torch.as_tensor(own, device=weight.device)
        taps = torch.arange(kernel, device=weight.device)
        covariance = moments[chunk, :-1, :-1]
        if isinstance(layer.bias, nn.Parameter):
            # The bias can make good the mean of what is removed.
            mean = moments[chunk, :-1, -1]
            covariance = covariance - torch.outer(mean, mean)
        features = (channels[:, :, None] * kernel + taps).flatten(1)
        found.append(Consumer(covariance, weights=rows[chunk].T, blocks=features))
    return found


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
        energy = weight.detach().double().cpu().movedim(axis, 0).flatten(1).square().sum(dim=1)
        # A grouped layer's weight holds the input channels of one group only.
        blocks = torch.as_tensor(member.blocks) % len(energy)
        scores += energy[blocks].sum(dim=1) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    scores[list(protected)] = torch.inf
    return tuple(sorted(scores.topk(size).indices.tolist()))
