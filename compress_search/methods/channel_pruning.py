"""Channel pruning: remove coupled channels, and refit what consumes them.

He, Zhang and Sun 2017, *Channel pruning for accelerating very deep neural networks*: choose channels, then
reconstruct each consumer by least squares. Deviations: the channels are chosen by the structured optimal
brain surgeon (in place of LASSO); any coupling that torch-pruning's graph finds is pruned, residual streams
included; and the layers that follow are refitted too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from compress_search.calibration import check_weights
from compress_search.exceptions import ModelError
from compress_search.methods.channel_choice import choose_blocks
from compress_search.methods.coupling import CoupledGroup, Coupling, find_coupling, keep_blocks
from compress_search.methods.ignored_layers import layers_matching
from compress_search.methods.method import Compressed, Sizes, Unit
from compress_search.patches import has_patches
from compress_search.plan import CompressionPlan, KeepChannels, PlanStep, apply_plan
from compress_search.profile import LayerProfile, ModelProfile, profile_model
from compress_search.reconstruction import Refit, refit_in_forward_order
from compress_search.surgery import SIDES, carries_channels, channel_count


@dataclass(frozen=True)
class ChannelPruning:
    """The method; see :class:`compress_search.methods.method.Method`."""

    name: str = "channel_pruning"
    ratio_name: str = "c_cp"

    def analyse(
        self, model: nn.Module, example_input: Tensor, *, ignore: Collection[str] = ()
    ) -> ChannelPruningAnalysis:
        """Find the groups of coupled channels that can be pruned."""
        check_weights(model)
        profile = profile_model(model, example_input)
        ignored = layers_matching(ignore, profile)
        coupling = find_coupling(model, example_input, ignore=ignored)
        return ChannelPruningAnalysis(model, profile, coupling, ignored)


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
            Unit(
                group.name,
                group.size,
                layers=tuple(m.layer for m in group.members if m.layer in counted),
                widths=tuple(m.width for m in group.members),
            )
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
        kept = choose_blocks(self.model, pruned, sizes, batches)
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
        sides = ("outputs",) if carries_channels(module) else SIDES
        before = [channel_count(module, side) for side in sides]
        after = [n - removed.get((layer.name, side), 0) for n, side in zip(before, sides, strict=True)]
        # Only the whole product is surely divisible: a grouped layer has fewer weights than channel pairs.
        return layer.macs * math.prod(after) // math.prod(before)

    def _refits(self, groups: Sequence[CoupledGroup], edits: Sequence[KeepChannels]) -> list[Refit]:
        """The first consumer and all layers after it: consumers lost inputs, the others get changed ones."""
        consumers = {member.layer for group in groups for member in group.consumers}
        outputs = {edit.layer: edit.outputs for edit in edits}
        layers = itertools.dropwhile(lambda layer: layer.name not in consumers, self.profile.layers)
        return [
            Refit(layer.name, source=layer.name, outputs=outputs.get(layer.name), calls=len(layer.calls))
            for layer in layers
            if has_patches(self.model, layer.name)
            and (layer.name in consumers or layer.name not in self.ignore)
        ]
