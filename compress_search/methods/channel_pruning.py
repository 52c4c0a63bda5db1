"""Channel pruning: remove coupled channels, and refit what consumes them.

He, Zhang and Sun 2017, *Channel pruning for accelerating very deep neural networks*: choose channels, then
reconstruct each consumer by least squares. Deviations: the channels are chosen by the structured optimal
brain surgeon (in place of LASSO); any coupling that torch-pruning's graph finds is pruned, residual streams
included; and the layers that follow are refitted too.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from compress_search.calibration import gram_matrices
from compress_search.exceptions import ModelError
from compress_search.methods.brain_surgeon import Consumer, removal_order
from compress_search.methods.coupling import CoupledGroup, Coupling, Member, find_coupling, keep_blocks
from compress_search.methods.method import Compressed, Sizes, Unit
from compress_search.patches import has_patches, input_patches
from compress_search.plan import CompressionPlan, KeepChannels, PlanStep, apply_plan
from compress_search.profile import LayerProfile, ModelProfile, profile_model
from compress_search.reconstruction import Refit, refit_in_forward_order
from compress_search.surgery import channel_count, is_depthwise


@dataclass(frozen=True)
class ChannelPruning:
    """The method; see :class:`compress_search.methods.method.Method`."""

    name: str = "channel_pruning"
    ratio_name: str = "c_cp"

    def analyse(
        self, model: nn.Module, example_input: Tensor, *, ignore: Collection[str] = ()
    ) -> ChannelPruningAnalysis:
        """Find the groups of coupled channels that can be pruned."""
        coupling = find_coupling(model, example_input, ignore=ignore)
        return ChannelPruningAnalysis(model, profile_model(model, example_input), coupling, frozenset(ignore))


@dataclass(frozen=True)
class ChannelPruningAnalysis:
    """Channel pruning's view of one model; see :class:`compress_search.methods.method.Analysis`."""

    model: nn.Module
    profile: ModelProfile
    coupling: Coupling
    ignore: frozenset[str]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One unit a group of coupled channels; its size is the number of blocks that stay."""
        counted = {layer.name for layer in self.profile.layers}
        return tuple(
            Unit(group.name, group.size, tuple(m.layer for m in group.members if m.layer in counted))
            for group in self.coupling.groups
        )

    @property
    def left_alone(self) -> Mapping[str, str]:
        """Counted layers whose output channels all stay, each with its reason."""
        return self.coupling.reasons

    def size_at(self, unit: Unit, share: float) -> int | None:
        """The largest number of blocks that is at most ``share`` of all, at least 1."""
        return max(1, int(share * unit.full_size))

    def predict_macs(self, sizes: Sizes) -> int:
        """MACs of the pruned model: each layer's scale with the input and output channels it keeps."""
        removed: dict[tuple[str, str], int] = {}
        for group in self.coupling.groups:
            gone = group.size - sizes.get(group.name, group.size)
            for member in group.members:
                key = (member.layer, member.side)
                removed[key] = removed.get(key, 0) + gone * member.width
        return sum(self._macs_without(layer, removed) for layer in self.profile.layers)

    def apply(self, sizes: Sizes, batches: Sequence[Tensor]) -> Compressed:
        """Prune the groups named in ``sizes`` to that many blocks, and refit their consumers."""
        groups = {group.name: group for group in self.coupling.groups}
        for name, size in sizes.items():
            if name not in groups or not 1 <= size <= groups[name].size:
                limit = f"[1, {groups[name].size}]" if name in groups else "a group of this model"
                raise ModelError(f"Group {name!r} cannot be pruned to {size} blocks; allowed: {limit}.")
        pruned = [group for group in self.coupling.groups if sizes.get(group.name, group.size) < group.size]
        moments = self._input_moments(pruned, batches)
        kept = {}
        for group in pruned:
            if batches:
                consumers = [self._consumer(member, moments[member.layer]) for member in group.consumers]
                kept[group.name] = removal_order(consumers).kept(sizes[group.name])
            else:
                kept[group.name] = self._largest_blocks(group, sizes[group.name])
        edits = keep_blocks(self.model, pruned, kept)
        step = PlanStep(
            method="channel_pruning",
            mac_ratio=self.predict_macs(sizes) / self.profile.macs,
            edits=edits,
            left_alone=self.left_alone,
        )
        model = apply_plan(self.model, CompressionPlan((step,))).eval()
        refit_in_forward_order(model, self.model, self._refits(pruned, edits), batches)
        return Compressed(model, step)

    def _macs_without(self, layer: LayerProfile, removed: Mapping[tuple[str, str], int]) -> int:
        module = self.model.get_submodule(layer.name)
        outputs = channel_count(module, "outputs")
        macs = layer.macs // outputs * (outputs - removed.get((layer.name, "outputs"), 0))
        if is_depthwise(module):
            return macs
        inputs = channel_count(module, "inputs")
        return macs // inputs * (inputs - removed.get((layer.name, "inputs"), 0))

    def _input_moments(self, groups: Sequence[CoupledGroup], batches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Second moments of the input patches of every consumer, ``(features + 1, features + 1)``."""
        names = {member.layer for group in groups for member in group.consumers}
        if not batches or not names:
            return {}
        views = {}
        for name in names:
            layer = self.model.get_submodule(name)
            views[name] = lambda inputs, layer=layer: input_patches(layer, inputs)
        return {name: moment[0] for name, moment in gram_matrices(self.model, views, batches).items()}

    def _consumer(self, member: Member, moments: Tensor) -> Consumer:
        layer = self.model.get_submodule(member.layer)
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        # The mean of what is removed can be made good by the bias, so the covariance is what counts.
        mean = (
            moments[:-1, -1] if isinstance(layer.bias, nn.Parameter) else torch.zeros_like(moments[:-1, -1])
        )
        positions = weight[0, 0].numel()
        kernel = torch.arange(positions, device=weight.device)
        channels = torch.as_tensor(member.blocks, device=weight.device)
        features = (channels[:, :, None] * positions + kernel).flatten(1)
        return Consumer(
            covariance=moments[:-1, :-1] - torch.outer(mean, mean),
            weights=weight.detach().double().flatten(1).T,
            blocks=features,
        )

    def _largest_blocks(self, group: CoupledGroup, size: int) -> tuple[int, ...]:
        """The data-free choice: blocks of the largest weights (Li et al. 2017, summed over the group)."""
        scores = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            layer = self.model.get_submodule(member.layer)
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            if weight.ndim < 2:
                continue
            axis = 0 if member.side == "outputs" else 1
            energy = weight.detach().double().cpu().movedim(axis, 0).flatten(1).square().sum(dim=1)
            blocks = torch.as_tensor(member.blocks)
            scores += energy[blocks].sum(dim=1) / energy.sum().clamp_min(1e-300)
        return tuple(sorted(scores.topk(size).indices.tolist()))

    def _refits(self, groups: Sequence[CoupledGroup], edits: Sequence[KeepChannels]) -> list[Refit]:
        """The first consumer and all layers after it: consumers lost inputs, the others get changed ones."""
        consumers = {member.layer for group in groups for member in group.consumers}
        outputs = {edit.layer: edit.outputs for edit in edits}
        layers = itertools.dropwhile(lambda layer: layer.name not in consumers, self.profile.layers)
        return [
            Refit(layer.name, source=layer.name, outputs=outputs.get(layer.name), calls=len(layer.calls))
            for layer in layers
            if layer.name in consumers
            or (layer.name not in self.ignore and has_patches(self.model, layer.name))
        ]
