"""Channel pruning: remove coupled channels, and refit what consumes them.

He, Zhang and Sun 2017, *Channel pruning for accelerating very deep neural networks*: choose channels, then
reconstruct each consumer by least squares. Deviations: the channels are chosen by the structured optimal
brain surgeon (in place of LASSO); any coupling that torch-pruning's graph finds is pruned, residual streams
included; and the layers that follow are refitted too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from compress_search.calibration import check_weights, is_wide
from compress_search.exceptions import ModelError
from compress_search.methods.channel_choice import (
    choose_blocks,
    forget_moments,
    groups_within_memory,
    input_moments,
)
from compress_search.methods.channel_imitation import imitate_group
from compress_search.methods.cost import Cost, CostTerm, LinearForm, ties_of
from compress_search.methods.coupling import CoupledGroup, Coupling, find_coupling, keep_blocks
from compress_search.methods.ignored_layers import layers_matching
from compress_search.methods.kept_channels import (
    NO_CHANNELS,
    KeptChannels,
    channels_to_keep,
    protected_blocks,
)
from compress_search.methods.method import DID_NOT_RUN, UNBATCHED, Compressed, Imitation, Sizes, Unit
from compress_search.methods.output_sensitivity import output_sensitivities
from compress_search.methods.remembered import Remembered
from compress_search.methods.renumbering import renumbered
from compress_search.patches import has_patches
from compress_search.plan import CompressionPlan, KeepChannels, PlanStep, apply_plan
from compress_search.profile import ModelProfile, profile_model
from compress_search.reconstruction import Refit, refit_in_forward_order
from compress_search.surgery import channel_count, sides_of_parameter


@dataclass(frozen=True)
class ChannelPruning:
    """The method; see :class:`compress_search.methods.method.Method`."""

    name: str = "channel_pruning"
    ratio_name: str = "c_cp"

    def analyse(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        ignore: Collection[str] = (),
        keep_channels: KeptChannels = NO_CHANNELS,
    ) -> ChannelPruningAnalysis:
        """Find the groups of coupled channels that can be pruned."""
        check_weights(model)
        profile = profile_model(model, example_input)
        ignored = layers_matching(ignore, profile)
        kept = channels_to_keep(keep_channels, model)
        coupling = _with_known_inputs(find_coupling(model, example_input, ignore=ignored), profile)
        protected = {group.name: protected_blocks(group, kept) for group in coupling.groups}
        return ChannelPruningAnalysis(model, profile, coupling, ignored, protected)


@dataclass(frozen=True)
class ChannelPruningAnalysis:
    """Channel pruning's view of one model; see :class:`compress_search.methods.method.Analysis`.

    Attributes:
        model: The model.
        profile: Its cost.
        coupling: What of it can be pruned.
        ignore: Names of layers to leave alone.
        protected: Indices of the blocks that must stay, by group name.
        known_sensitivities: How much the network's output cares for errors in the consumers' outputs,
            measured on some batches before.
        known_orders: In which order the brain surgeon removed blocks on some batches before.
    """

    model: nn.Module
    profile: ModelProfile
    coupling: Coupling
    ignore: frozenset[str]
    protected: Mapping[str, Collection[int]]
    known_sensitivities: Remembered[Tensor] = field(default_factory=Remembered, compare=False, repr=False)
    known_orders: Remembered[tuple[int, ...]] = field(default_factory=Remembered, compare=False, repr=False)

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
                least=max(1, len(self.protected[group.name])),
            )
            for group in self.coupling.groups
        )

    @property
    def left_alone(self) -> Mapping[str, str]:
        """Layers whose output channels all stay, each with its reason."""
        return {**self.coupling.reasons, **{layer.name: DID_NOT_RUN for layer in self.profile.idle}}

    def size_at(self, unit: Unit, share: float) -> int | None:
        """The largest number of blocks that is at most ``share`` of all, at least the allowed least."""
        return max(unit.least, int(share * unit.full_size))

    def cost(self, kind: str) -> Cost:
        """MACs or parameters: each layer's scale with the input and output channels it keeps."""
        return {"macs": self._macs, "params": self._params}[kind]

    def predict_macs(self, sizes: Sizes) -> int:
        """MACs of the pruned model."""
        return self._macs.of(sizes)

    def predict_params(self, sizes: Sizes) -> int:
        """Parameters of the pruned model."""
        return self._params.of(sizes)

    def imitations(
        self, sizes: Mapping[str, Sequence[int]], batches: Sequence[Tensor]
    ) -> Iterator[Imitation]:
        """Imitate each group by its consumers: deaf to the removed channels, and re-solved for the rest."""
        groups = {group.name: group for group in self.coupling.groups}
        orders, sensitivities = self.known_orders.of(batches), self._sensitivities(batches)
        for together in groups_within_memory(self.model, [groups[name] for name in sizes]):
            moments = input_moments(self.model, together, batches)
            for place, group in enumerate(together):
                protected = self.protected[group.name]
                imitation, orders[group.name] = imitate_group(
                    self.model,
                    group,
                    sizes[group.name],
                    moments,
                    sensitivities=sensitivities,
                    protected=protected,
                )
                forget_moments(moments, together[place + 1 :])
                yield imitation

    def apply(self, sizes: Sizes, batches: Sequence[Tensor]) -> Compressed:
        """Prune the groups named in ``sizes`` to that many blocks, and refit their consumers."""
        units = {unit.name: unit for unit in self.units}
        for name, size in sizes.items():
            if name not in units or not units[name].least <= size <= units[name].full_size:
                raise ModelError(
                    f"Group {name!r} cannot be pruned to {size} blocks; allowed: {_allowed(units.get(name))}."
                )
        pruned = [group for group in self.coupling.groups if sizes.get(group.name, group.size) < group.size]
        kept = choose_blocks(
            self.model,
            pruned,
            sizes,
            batches,
            protected=self.protected,
            sensitivities=self._sensitivities(batches),
            orders=self.known_orders.of(batches),
        )
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

    def after(self, compressed: Compressed, example_input: Tensor) -> ChannelPruningAnalysis:
        """The same groups, with the numbers that their blocks and channels have now."""
        model, edits = compressed.model, compressed.step.edits
        check_weights(model)
        found = [renumbered(group, edits) for group in self.coupling.groups]
        return ChannelPruningAnalysis(
            model,
            profile_model(model, example_input),
            Coupling(tuple(one.group for one in found), self.coupling.reasons),
            self.ignore,
            {one.group.name: one.renumber(self.protected[one.group.name]) for one in found},
        )

    def _sensitivities(self, batches: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """How much the network's output cares for errors in each consumer's outputs."""
        known = self.known_sensitivities.of(batches)
        if not known:
            names = {member.layer for group in self.coupling.groups for member in group.consumers}
            # Those of a wide layer, whose rows are sampled, have no say, and can be hundreds of megabytes.
            layers = [
                name
                for name in sorted(names)
                if has_patches(self.model, name) and not is_wide(self.model.get_submodule(name))
            ]
            known |= output_sensitivities(self.model, layers, batches)
        return known

    @cached_property
    def _macs(self) -> Cost:
        return Cost(
            tuple(self._scaled(layer.name, "weight", layer.macs) for layer in self.profile.layers),
            self._block_count,
        )

    @cached_property
    def _params(self) -> Cost:
        terms = [
            self._scaled(name, parameter_name, parameter.numel())
            for name, module in self.model.named_modules()
            for parameter_name, parameter in module._parameters.items()
            if parameter is not None
        ]
        ties = ties_of(
            self.model,
            lambda name, parameter: frozenset(
                unit for form in self._kept_channels(name, parameter) for unit in form.slopes
            ),
        )
        return Cost(tuple(terms), self._block_count, ties=ties)

    def _scaled(self, layer: str, parameter: str, full: int) -> CostTerm:
        """A cost that is ``full`` before pruning and shrinks with a parameter of a layer."""
        sides = self._kept_channels(layer, parameter)
        before = [
            form.constant + sum(slope * self._block_count[unit] for unit, slope in form.slopes.items())
            for form in sides
        ]
        # Only the whole product is surely divisible: a grouped layer has fewer weights than channel pairs.
        return CostTerm(full, math.prod(before), sides)

    def _kept_channels(self, layer: str, parameter: str) -> tuple[LinearForm, ...]:
        """The channels that stay, on each side of a layer with which a parameter shrinks."""
        module = self.model.get_submodule(layer)
        forms = []
        for side in sides_of_parameter(module, parameter):
            widths = self._widths.get((layer, side), {})
            gone = sum(width * self._block_count[unit] for unit, width in widths.items())
            if widths:
                forms.append(LinearForm(channel_count(module, side) - gone, widths))
        return tuple(forms)

    @cached_property
    def _block_count(self) -> dict[str, int]:
        return {group.name: group.size for group in self.coupling.groups}

    @cached_property
    def _widths(self) -> dict[tuple[str, str], dict[str, int]]:
        """For each side of each module, how many channels a block of each group that reaches it has."""
        widths: dict[tuple[str, str], dict[str, int]] = {}
        for group in self.coupling.groups:
            for member in group.members:
                widths.setdefault((member.layer, member.side), {})[group.name] = member.width
        return widths

    def _refits(self, groups: Sequence[CoupledGroup], edits: Sequence[KeepChannels]) -> list[Refit]:
        """The first layer that lost outputs or inputs, and all after it, which get changed inputs.

        The first one's own inputs are the original's: it is among them because it may be refitted together
        with the layers that it leads to.
        """
        consumers = {member.layer for group in groups for member in group.consumers}
        outputs = {edit.layer: edit.outputs for edit in edits}
        layers = itertools.dropwhile(lambda layer: layer.name not in outputs, self.profile.layers)
        return [
            Refit(layer.name, source=layer.name, outputs=outputs.get(layer.name), calls=len(layer.calls))
            for layer in layers
            if layer.is_batched
            and has_patches(self.model, layer.name)
            and (layer.name in consumers or layer.name not in self.ignore)
        ]


def _with_known_inputs(coupling: Coupling, profile: ModelProfile) -> Coupling:
    """Leave groups alone whose consumers' inputs cannot be looked at."""
    unbatched = {layer.name for layer in profile.layers if not layer.is_batched}
    counted = {layer.name for layer in profile.layers}
    groups, reasons = [], dict(coupling.reasons)
    for group in coupling.groups:
        faulty = [member.layer for member in group.consumers if member.layer in unbatched]
        if faulty:
            made = [member.layer for member in group.members if member.side == "outputs"]
            reason = f"its channels go to {faulty[0]}, which is given {UNBATCHED}"
            reasons |= {name: reason for name in made if name in counted}
        else:
            groups.append(group)
    return Coupling(tuple(groups), reasons)


def _allowed(unit: Unit | None) -> str:
    """Which sizes a unit may have, in words."""
    if unit is None:
        return "a group of this model"
    why = "" if unit.least == 1 else f" ({unit.least} hold channels that you asked to keep)"
    return f"[{unit.least}, {unit.full_size}]{why}"
