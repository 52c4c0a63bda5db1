"""Which channels of a network must be removed together, found with torch-pruning's dependency graph.

The graph (Fang et al. 2023, *DepGraph: towards any structural pruning*) maps each output channel of a layer
to the channels that an addition, concatenation, depthwise convolution or normalisation ties to it. Here
those maps become *blocks*: the smallest sets of channels that can be removed without breaking a shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, nn

from compress_search.divergence import leaves_of, without_tf32
from compress_search.fingerprint import seeded
from compress_search.methods.channel_tracing import (
    Channel,
    TracedGroup,
    layers_of_training_alone,
    merged,
    reason_of_lost_trace,
    trace_channels,
)
from compress_search.methods.fixed_statistics import FixedStatistics
from compress_search.plan import CompressionPlan, KeepChannels, PlanStep, apply_plan
from compress_search.profile import (
    CONVOLUTIONS,
    COUNTED_LAYERS,
    TRANSPOSED_CONVOLUTIONS,
    inference_mode_of,
    training_paths_of,
)
from compress_search.surgery import SIDES, carries_channels, channel_count, chunks, has_channel
from compress_search.weight_sharing import copy_sharing_weights

Blocks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Member:
    """One side of one module in a group.

    Attributes:
        layer: The module's name.
        side: ``"inputs"`` (it consumes the channels) or ``"outputs"`` (it makes or carries them).
        blocks: For each block of the group, the module's channels that belong to it; all of one width.
        idle: Whether the module runs in training alone, as an auxiliary head does. It is cut along.
    """

    layer: str
    side: str
    blocks: Blocks
    idle: bool = False

    @property
    def width(self) -> int:
        """Number of the module's channels in each block."""
        return len(self.blocks[0])


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that are removed together, block by block.

    Attributes:
        name: The first layer that makes the channels.
        members: All modules that have them, in forward order.
    """

    name: str
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Number of blocks."""
        return len(self.members[0].blocks)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that mix the channels into new ones, those that run in training alone aside."""
        return tuple(member for member in self.members if member.side == "inputs" and not member.idle)


@dataclass(frozen=True)
class Coupling:
    """What of a network can be pruned.

    Attributes:
        groups: The groups, in forward order.
        reasons: For each counted layer whose output channels must stay, why.
    """

    groups: tuple[CoupledGroup, ...]
    reasons: Mapping[str, str]


def find_coupling(model: nn.Module, example_input: Tensor, *, ignore: Collection[str] = ()) -> Coupling:
    """Find every group of channels that can be pruned.

    The groups are tried: without their first blocks, and without their last ones, the network must run, and
    give exactly what it gives when nothing listens to those channels. A group for which that does not hold is
    left alone. Where layers run in training alone, it must run on the paths of training too; what only they
    make is left as it is.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``.
        ignore: Names of layers whose output channels stay.

    Raises:
        ModelError: torch-pruning cannot trace the model.
    """
    groups: list[CoupledGroup] = []
    reasons: dict[str, str] = {}
    idle = layers_of_training_alone(model, example_input)
    for traced in merged(model, trace_channels(model, example_input, in_training=bool(idle))):
        makers = [name for name in traced.makers if name not in idle]
        asked = [name for name in makers if name in ignore]
        found = f"you asked to leave {asked[0]} alone" if asked else _as_group(model, traced, idle)
        if isinstance(found, str):
            reasons |= dict.fromkeys(makers, found)
        elif makers:
            groups.append(found)
    working = []
    for group, fault in _tried(model, _probe(model, example_input), groups, in_training=bool(idle)):
        if fault:
            made = [member.layer for member in group.members if member.side == "outputs" and not member.idle]
            reasons |= {n: fault for n in made if isinstance(model.get_submodule(n), COUNTED_LAYERS)}
        else:
            working.append(group)
    reached = {member.layer for group in working for member in group.members if member.side == "outputs"}
    lost = [
        name
        for name, module in model.named_modules()
        if isinstance(module, COUNTED_LAYERS) and name not in reached | reasons.keys() | idle
    ]
    if lost:
        reasons |= dict.fromkeys(lost, reason_of_lost_trace(model, example_input))
    position = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return Coupling(tuple(sorted(working, key=lambda g: position[g.name])), reasons)


def keep_blocks(
    model: nn.Module, groups: Sequence[CoupledGroup], kept: Mapping[str, Collection[int]]
) -> tuple[KeepChannels, ...]:
    """Say which channels each module keeps when groups keep some of their blocks.

    Args:
        model: The model.
        groups: The groups of the model.
        kept: Indices of the blocks that stay, by group name; a group that is not named stays whole.

    Returns:
        One edit for each module that loses channels.
    """
    removed: dict[str, dict[str, set[int]]] = {}
    for group in groups:
        gone = set(range(group.size)) - set(kept.get(group.name, range(group.size)))
        for member in group.members if gone else ():
            channels = removed.setdefault(member.layer, {}).setdefault(member.side, set())
            channels.update(channel for block in gone for channel in member.blocks[block])
    edits = []
    for layer, sides in removed.items():
        module = model.get_submodule(layer)
        remaining = {
            side: tuple(c for c in range(channel_count(module, side)) if c not in gone)
            for side, gone in sides.items()
        }
        edits.append(KeepChannels(layer, remaining.get("inputs"), remaining.get("outputs")))
    return tuple(edits)


def _as_group(model: nn.Module, traced: TracedGroup, idle: Collection[str]) -> CoupledGroup | str:
    """Turn tied channels into blocks, or say why they cannot be pruned.

    Channels belong to one block if a chain of ties joins them. Chunks that must stay equally wide are tied
    position by position; a convolution that carries groups is tied group by group.
    """
    if traced.fault:
        return traced.fault
    if not any(side == "inputs" and not carries_channels(model.get_submodule(n)) for n, side in traced.sides):
        return "it makes the network's output"
    ties = DisjointSet(traced.channels)
    for channel, root in traced.ties:
        ties.merge(channel, root)
    for layer, side in traced.sides:
        for one, other in _ties_within(model.get_submodule(layer), layer, side):
            if one in ties and other in ties:
                ties.merge(one, other)
    blocks = [[channel for channel in subset if isinstance(channel, Channel)] for subset in ties.subsets()]
    for channel in itertools.chain.from_iterable(blocks):
        if not has_channel(model.get_submodule(channel.layer), channel.side, channel.number):
            # Seen with x[:, -4:], whose end is Python's largest number to torch-pruning 1.6.
            return f"torch-pruning counts its channels wrongly at {channel.layer}"
    members = []
    for layer, side in sorted(traced.sides, key=_position_in(model)):
        if side == "inputs" and carries_channels(model.get_submodule(layer)):
            continue
        own = [sorted(c.number for c in block if (c.layer, c.side) == (layer, side)) for block in blocks]
        if not all(own):
            return f"its channels reach {layer} only in part"
        if len({len(block) for block in own}) > 1:
            return f"its blocks of channels differ in width at {layer}"
        members.append((layer, side, own))
    if len(blocks) < 2:
        return "all its channels hang together"
    order = sorted(range(len(blocks)), key=lambda block: members[0][2][block])
    return CoupledGroup(
        # Idle makers aside, unless there is none but such.
        name=min((m for m in members if m[1] == "outputs"), key=lambda member: member[0] in idle)[0],
        members=tuple(
            Member(layer, side, tuple(tuple(own[block]) for block in order), layer in idle)
            for layer, side, own in members
        ),
    )


def _position_in(model: nn.Module) -> Callable[[tuple[str, str]], tuple[int, str]]:
    position = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return lambda layer_and_side: (position[layer_and_side[0]], layer_and_side[1])


def _ties_within(module: nn.Module, layer: str, side: str) -> Iterator[tuple[Channel, Channel]]:
    """Channels of one module that can only go together."""
    if carries_channels(module) and isinstance(module, CONVOLUTIONS):
        width = {name: channel_count(module, name) // module.groups for name in SIDES}
        for index in range(channel_count(module, side)):
            yield (
                Channel(layer, side, index),
                Channel(layer, "outputs", index // width[side] * width["outputs"]),
            )
        return
    channels, number = channel_count(module, side), chunks(module, side)
    for index in range(channels if number > 1 else 0):
        yield Channel(layer, side, index), Channel(layer, side, index % (channels // number))


def _probe(model: nn.Module, example_input: Tensor) -> Tensor:
    """One example on which the network gives numbers, a random one where that can be.

    Zeros, which people like to give, would hide what goes wrong. So would noise where the network takes no
    negative values: roots and logarithms make NaN of them.
    """
    one = example_input[:1]
    if not one.is_floating_point():
        return one
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(one.shape, generator=generator).to(one.device, one.dtype)
    positive = torch.rand(one.shape, generator=generator).to(one.device, one.dtype)
    is_constant = bool((one == one.flatten()[0]).all())
    shares: list[float] = []
    probes = [noise, positive, one] if is_constant else [noise, one, positive]
    for probe in probes:
        shares.append(_share_of_numbers(model, probe))
        if shares[-1] == 1.0:
            return probe
    return probes[shares.index(max(shares))]


def _share_of_numbers(model: nn.Module, example: Tensor) -> float:
    """Share of a network's outputs that are finite; 0 where it fails."""
    try:
        with inference_mode_of(model):
            outputs = model(example)
    except Exception:
        return 0.0
    found = [leaf.isfinite() for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)]
    number = sum(leaf.numel() for leaf in found)
    return sum(int(leaf.sum()) for leaf in found) / number if number else 1.0


def _tried(
    model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup], *, in_training: bool
) -> list[tuple[CoupledGroup, str]]:
    """Try all groups at once, and one by one only if that fails."""
    with without_tf32():
        if not groups or not _fault_at_an_end(model, example, groups, in_training):
            return [(group, "") for group in groups]
        return [(group, _fault_at_an_end(model, example, [group], in_training)) for group in groups]


def _fault_at_an_end(
    model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup], in_training: bool
) -> str:
    """What goes wrong when the first block of each group is removed, or else the last.

    A network that takes some channels by their numbers may count them from either end: ``x[:, -4:]`` is the
    same as before without the first of them.
    """
    first = {group.name: 0 for group in groups}
    last = {group.name: group.size - 1 for group in groups}
    return _fault_without(model, example, groups, first, in_training) or _fault_without(
        model, example, groups, last, in_training
    )


def _fault_without(
    model: nn.Module,
    example: Tensor,
    groups: Sequence[CoupledGroup],
    blocks: Mapping[str, int],
    in_training: bool,
) -> str:
    """What goes wrong when one block of each group is removed; ``in_training``, in training too."""
    statistics = FixedStatistics()
    # Done with before there is a second copy: each can be as large as the model.
    wanted, wanted_in_training = _without_listeners(model, example, groups, blocks, in_training, statistics)
    kept = {g.name: [block for block in range(g.size) if block != blocks[g.name]] for g in groups}
    edits = keep_blocks(model, groups, kept)
    step = PlanStep(method="channel_pruning", mac_ratio=1.0, edits=edits)
    try:
        pruned = apply_plan(model, CompressionPlan((step,)))
        with inference_mode_of(pruned):
            after = pruned(example)
            if statistics.are_noted:
                # Normalisation across channels changes with what it normalises over, and rightly so.
                with statistics.used(pruned):
                    after = pruned(example)
    except Exception as error:
        return f"without one of its channels the network fails ({type(error).__name__}: {error})"
    if _shapes_of(after) != _shapes_of(wanted):
        return "it makes the network's output"
    if in_training:
        try:
            changed = _shapes_of(_outputs_in_training(pruned, example))
        except Exception as error:
            return (
                f"without one of its channels the network fails in training ({type(error).__name__}: {error})"
            )
        if changed != _shapes_of(wanted_in_training):
            return "it makes the network's output in training"
    if all(map(_alike, leaves_of(after), leaves_of(wanted))):
        return ""
    if any(isinstance(leaf, Tensor) and leaf.isnan().any() for leaf in leaves_of(wanted)):
        return "the network's outputs hold NaN, so that it cannot be tried without one of its channels"
    return "its channels are tied in a way that torch-pruning's graph does not show"


def _without_listeners(
    model: nn.Module,
    example: Tensor,
    groups: Sequence[CoupledGroup],
    blocks: Mapping[str, int],
    in_training: bool,
    statistics: FixedStatistics,
) -> tuple[Any, Any]:
    """What the network gives when nothing listens to one block of each group.

    The statistics of normalisation across channels are noted down.

    Returns:
        Its outputs, and those on the paths of training if these are wanted.
    """
    silenced, _ = copy_sharing_weights(model)
    for group in groups:
        for member in group.consumers:
            _silence(silenced.get_submodule(member.layer), member.blocks[blocks[group.name]])
    with inference_mode_of(silenced), statistics.noted(silenced):
        outputs = silenced(example)
    return outputs, _outputs_in_training(silenced, example) if in_training else None


def _shapes_of(outputs: Any) -> list[Any]:
    return [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves_of(outputs)]


def _outputs_in_training(model: nn.Module, example: Tensor) -> Any:
    with torch.no_grad(), seeded(0), training_paths_of(model):
        return model(example)


def _silence(consumer: nn.Module, channels: Collection[int]) -> None:
    """Make a layer deaf to some of its input channels, and no other that shares its weight.

    Nor does pruning its inputs cut another layer's.
    """
    before = consumer.weight
    assert isinstance(before, nn.Parameter)
    weight = before.detach().clone()
    if isinstance(consumer, TRANSPOSED_CONVOLUTIONS):
        weight[list(channels)] = 0.0
    else:
        # The same positions in every group, which is how a block of a grouped convolution is made.
        weight[:, sorted({channel % weight.shape[1] for channel in channels})] = 0.0
    consumer.weight = nn.Parameter(weight, before.requires_grad)


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    finite = other[other.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * max(scale, 1e-6))
