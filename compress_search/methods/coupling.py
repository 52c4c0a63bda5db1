"""Which channels of a network must be removed together, found with torch-pruning's dependency graph.

The graph (Fang et al. 2023, *DepGraph: towards any structural pruning*) maps each output channel of a layer
to the channels that an addition, concatenation, depthwise convolution or normalisation ties to it. Here
those maps become *blocks*: the smallest sets of channels that can be removed without breaking a shape.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import DependencyGraph
from torch_pruning.ops import OPTYPE, _OutputOp

from compress_search.exceptions import ModelError
from compress_search.plan import CompressionPlan, KeepChannels, PlanStep, apply_plan
from compress_search.profile import COUNTED_LAYERS, inference_mode_of
from compress_search.surgery import can_keep_channels, channel_count, is_depthwise

_WITHOUT_CHANNELS_OF_THEIR_OWN = (
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.EXPAND,
    OPTYPE.UNBIND,
    OPTYPE.SLICE,
)

Blocks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Member:
    """One side of one module in a group.

    Attributes:
        layer: The module's name.
        side: ``"inputs"`` (it consumes the channels) or ``"outputs"`` (it makes or carries them).
        blocks: For each block of the group, the module's channels that belong to it; all of one width.
    """

    layer: str
    side: str
    blocks: Blocks

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
        """The members that mix the channels into new ones."""
        return tuple(member for member in self.members if member.side == "inputs")


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

    Each group is tried: its first block is removed and the network is run. A group without which the
    network fails, or gives an output of another shape, is left alone.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``.
        ignore: Names of layers whose output channels stay.

    Raises:
        ModelError: torch-pruning cannot trace the model.
    """
    graph, traced = _trace(model, example_input)
    names = {module: name for name, module in traced.named_modules()}
    groups: list[CoupledGroup] = []
    reasons: dict[str, str] = {}
    for items in graph.get_all_groups(root_module_types=COUNTED_LAYERS):
        makers = [
            names[item.dep.target.module]
            for item in items
            if isinstance(item.dep.target.module, COUNTED_LAYERS)
            and graph.is_out_channel_pruning_fn(item.dep.handler)
        ]
        asked = [name for name in makers if name in ignore]
        found = f"you asked to leave {asked[0]} alone" if asked else _as_group(items, graph, names)
        if isinstance(found, str):
            reasons |= dict.fromkeys(makers, found)
        else:
            groups.append(found)
    working = []
    for group in groups:
        fault = _fault_without_first_block(model, example_input[:1], group)
        if fault:
            reasons |= dict.fromkeys((m.layer for m in group.members if m.side == "outputs"), fault)
        else:
            working.append(group)
    position = {name: number for number, name in enumerate(names.values())}
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


def _trace(model: nn.Module, example_input: Tensor) -> tuple[DependencyGraph, nn.Module]:
    traced = copy.deepcopy(model).eval()
    # The graph is read off autograd's, so frozen parameters must take part too.
    for parameter in traced.parameters():
        parameter.requires_grad_(True)
    graph = DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(traced, example_inputs=example_input[:1], verbose=False)
    except Exception as error:
        raise ModelError(
            f"torch-pruning cannot trace {type(model).__name__} ({type(error).__name__}: {error}), so its "
            "channels cannot be pruned. Leave channel_pruning out of methods; the SVD methods need no trace."
        ) from error
    return graph, traced


def _as_group(items: Any, graph: DependencyGraph, names: Mapping[nn.Module, str]) -> CoupledGroup | str:
    """Turn torch-pruning's group into blocks, or say why it cannot be pruned.

    Each item lists pairs (channel of a module, channel of the group's root). Two root channels that meet in
    one channel of any module belong to the same block.
    """
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for item in items:
        target = item.dep.target
        if target.type in _WITHOUT_CHANNELS_OF_THEIR_OWN:
            continue
        module = target.module
        if isinstance(module, _OutputOp):
            return "it makes the network's output"
        if not isinstance(module, nn.Module) or module not in names or not can_keep_channels(module):
            kind = type(module).__name__ if isinstance(module, nn.Module) else "bare parameter"
            return f"its channels meet a {kind} that cannot be cut ({names.get(module, target.name)})"
        carries = graph.is_out_channel_pruning_fn(item.dep.handler) or _has_one_side(module)
        pairs.setdefault((names[module], "outputs" if carries else "inputs"), []).extend(
            zip(item.idxs, item.root_idxs, strict=True)
        )
    if not any(side == "inputs" for _, side in pairs):
        return "it makes the network's output"
    block_of = _merged_blocks(list(pairs.values()))
    members = []
    for (layer, side), list_of_pairs in pairs.items():
        blocks: dict[int, set[int]] = {block: set() for block in sorted(set(block_of.values()))}
        for channel, root in list_of_pairs:
            blocks[block_of[root]].add(channel)
        if not all(blocks.values()):
            return f"its channels reach {layer} only in part"
        if len({len(block) for block in blocks.values()}) > 1:
            return f"its blocks of channels differ in width at {layer}"
        members.append(Member(layer, side, tuple(tuple(sorted(block)) for block in blocks.values())))
    if len(members[0].blocks) < 2:
        return "all its channels hang together"
    position = {name: number for number, name in enumerate(names.values())}
    members.sort(key=lambda member: position[member.layer])
    name = next(m.layer for m in members if m.side == "outputs")
    return CoupledGroup(name, tuple(members))


def _has_one_side(module: nn.Module) -> bool:
    return is_depthwise(module) or not isinstance(module, COUNTED_LAYERS)


def _merged_blocks(lists_of_pairs: list[list[tuple[int, int]]]) -> dict[int, int]:
    """Union the root channels that share a channel of some module.

    Returns:
        For each root channel, the lowest root channel of its block.
    """
    parent: dict[int, int] = {}

    def find(root: int) -> int:
        while parent.setdefault(root, root) != root:
            parent[root] = parent[parent[root]]
            root = parent[root]
        return root

    for pairs in lists_of_pairs:
        first_root: dict[int, int] = {}
        for channel, root in pairs:
            one, other = find(first_root.setdefault(channel, root)), find(root)
            parent[max(one, other)] = min(one, other)
    return {root: find(root) for root in list(parent)}


def _fault_without_first_block(model: nn.Module, example: Tensor, group: CoupledGroup) -> str:
    edits = keep_blocks(model, [group], {group.name: range(1, group.size)})
    step = PlanStep(method="channel_pruning", mac_ratio=1.0, edits=edits)
    try:
        pruned = apply_plan(model, CompressionPlan((step,)))
        with inference_mode_of(model), inference_mode_of(pruned):
            before, after = model(example), pruned(example)
    except Exception as error:
        return f"without one of its channels the network fails ({type(error).__name__}: {error})"
    if _shapes(before) != _shapes(after):
        return "it makes the network's output"
    return ""


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, Mapping):
        return {key: _shapes(value) for key, value in output.items()}
    return [_shapes(value) for value in output] if isinstance(output, list | tuple) else None
