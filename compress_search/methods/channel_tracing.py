"""Which channels are tied to each other, as torch-pruning's dependency graph says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch_pruning import DependencyGraph
from torch_pruning.dependency import index_mapping
from torch_pruning.ops import OPTYPE, _OutputOp

from compress_search.divergence import leaves_of
from compress_search.exceptions import ModelError
from compress_search.fingerprint import seeded
from compress_search.profile import (
    CONVOLUTIONS,
    COUNTED_LAYERS,
    inference_mode_of,
    oddity_of,
    training_paths_of,
)
from compress_search.surgery import can_keep_channels, carries_channels
from compress_search.weight_sharing import copy_sharing_weights

_WITHOUT_CHANNELS_OF_THEIR_OWN = (
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.EXPAND,
    OPTYPE.UNBIND,
    OPTYPE.SLICE,
)

Forward = Callable[[nn.Module, Tensor], Any]
"""Runs a model on inputs ``(batch, ...)``."""


class Channel(NamedTuple):
    """One channel of one side of a module."""

    layer: str
    side: str
    number: int


class Root(NamedTuple):
    """One channel of the layer that a traced group starts from; what maps to the same root is tied."""

    group: int
    number: int


@dataclass(frozen=True)
class TracedGroup:
    """Channels that the graph ties together.

    Attributes:
        makers: Counted layers whose output channels are among them.
        sides: The modules and sides that have such channels.
        ties: Pairs that go together.
        fault: Why they cannot be pruned; empty if they can.
    """

    makers: tuple[str, ...]
    sides: frozenset[tuple[str, str]]
    ties: tuple[tuple[Channel, Root], ...]
    fault: str

    @property
    def channels(self) -> set[Channel | Root]:
        """All channels and roots that appear in the ties."""
        return {end for tie in self.ties for end in tie}


def trace_channels(
    model: nn.Module, example_input: Tensor, *, in_training: bool = False
) -> list[TracedGroup]:
    """Trace a model and return its groups of tied channels.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``.
        in_training: Trace the paths of training too, where auxiliary heads run. A group is then found twice,
            with what belongs to it on either path.

    Raises:
        ModelError: torch-pruning cannot trace the model.
    """
    groups = _trace(model, example_input, _plain, first=0)
    if in_training:
        groups += _trace(model, example_input, _on_training_paths, first=len(groups))
    return groups


def reason_of_lost_trace(model: nn.Module, example_input: Tensor) -> str:
    """Say at which operation the way from some layers to the network's output is lost.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``.
    """
    stops = _GradientStops()
    with inference_mode_of(model), torch.enable_grad(), stops:
        model(example_input.detach().clone().requires_grad_(example_input.is_floating_point()))
    where = f"at {stops.operation}" if stops.operation else "somewhere"
    return f"the trace of the model is lost {where} between it and the output"


class _GradientStops(TorchFunctionMode):
    """Finds the first operation that takes a tensor with a gradient and gives its values without one."""

    def __init__(self) -> None:
        super().__init__()
        self.operation = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self.operation and any(tensor.requires_grad for tensor in tensors):
            cut = isinstance(result, Tensor) and result.is_floating_point() and not result.requires_grad
            if cut or func.__name__ in ("item", "numpy", "tolist"):
                # What is read off a tensor like an attribute: data.
                self.operation = "data" if func.__name__ == "__get__" else func.__name__
        return result


def layers_of_training_alone(model: nn.Module, example_input: Tensor) -> frozenset[str]:
    """Names of the modules with parameters of their own that run in training and not in evaluation.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``.
    """
    try:
        with inference_mode_of(model), seeded(0):
            evaluated = _modules_run(model, example_input, _plain)
            return _modules_run(model, example_input, _on_training_paths) - evaluated
    except Exception:
        # Detectors, for one, want their targets as a second argument in training.
        return frozenset()


def _modules_run(model: nn.Module, example_input: Tensor, forward: Forward) -> frozenset[str]:
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
        if any(parameter is not None for parameter in module._parameters.values())
    ]
    try:
        forward(model, example_input[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(ran)


def _plain(model: nn.Module, inputs: Tensor) -> Any:
    return model(inputs)


def _on_training_paths(model: nn.Module, inputs: Tensor) -> Any:
    with training_paths_of(model):
        return model(inputs)


def _trace(model: nn.Module, example_input: Tensor, forward: Forward, *, first: int) -> list[TracedGroup]:
    """Trace one kind of forward pass; the roots of the groups are numbered from ``first``."""
    # The graph and its model refer to each other, so they stay until the next garbage collection.
    traced, _ = copy_sharing_weights(model)
    traced.eval()
    # The graph is read off autograd's, so frozen parameters must take part too.
    for parameter in traced.parameters():
        parameter.requires_grad_(True)
    graph = DependencyGraph()
    names = {module: name for name, module in traced.named_modules()}
    try:
        with torch.enable_grad(), _reshapes_that_cannot_be_mapped_are_skipped():
            graph.build_dependency(
                traced,
                example_inputs=example_input[:1],
                forward_fn=forward,
                output_transform=_tensors_with_history,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"torch-pruning cannot trace {type(model).__name__} ({type(error).__name__}: {error}), so its "
            "channels cannot be pruned. Leave channel_pruning out of methods; the SVD methods need no trace."
        ) from error
    groups: list[TracedGroup] = []
    made: set[str] = set()
    for root in graph.module2node:
        if isinstance(root, COUNTED_LAYERS) and names[root] not in made:
            groups.append(_group_from(root, first + len(groups), graph, names))
            made.update(groups[-1].makers)
    return groups


def _tensors_with_history(outputs: Any) -> Any:
    found = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    return found or outputs


def merged(model: nn.Module, groups: Iterable[TracedGroup]) -> list[TracedGroup]:
    """Merge the groups that were found on several paths, and those around grouped convolutions.

    torch-pruning sees two sides in a grouped convolution that carries its channels, unless it is depthwise;
    here they are one.

    Args:
        model: The model that was traced.
        groups: Its groups.
    """
    found: list[TracedGroup] = []
    for group in groups:
        shared = _carriers(model, group) | {*group.makers}
        together = [other for other in found if shared & (_carriers(model, other) | {*other.makers})]
        found = [other for other in found if other not in together]
        parts = [*together, group]
        found.append(
            TracedGroup(
                makers=tuple(dict.fromkeys(name for part in parts for name in part.makers)),
                sides=frozenset().union(*(part.sides for part in parts)),
                ties=tuple(tie for part in parts for tie in part.ties),
                fault=next((part.fault for part in parts if part.fault), ""),
            )
        )
    return found


def _carriers(model: nn.Module, group: TracedGroup) -> set[str]:
    modules = {layer: model.get_submodule(layer) for layer, _ in group.sides}
    return {n for n, m in modules.items() if isinstance(m, CONVOLUTIONS) and carries_channels(m)}


def _group_from(
    root: nn.Module, number: int, graph: DependencyGraph, names: Mapping[nn.Module, str]
) -> TracedGroup:
    pruner = graph.get_pruner_of_module(root)
    channels = list(range(pruner.get_out_channels(root)))
    try:
        with _reshapes_that_cannot_be_mapped_are_skipped():
            items = graph.get_pruning_group(root, pruner.prune_out_channels, channels)
    except Exception as error:
        fault = f"torch-pruning cannot follow its channels ({type(error).__name__}: {error})"
        return TracedGroup((names[root],), frozenset(), (), fault)
    return _traced_group(number, items, graph, names)


def _traced_group(
    number: int, items: Any, graph: DependencyGraph, names: Mapping[nn.Module, str]
) -> TracedGroup:
    makers, sides, fault = [], set(), ""
    ties: list[tuple[Channel, Root]] = []
    for item in items:
        target = item.dep.target
        if target.type in _WITHOUT_CHANNELS_OF_THEIR_OWN:
            continue
        module, is_output = target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if is_output and isinstance(module, COUNTED_LAYERS):
            makers.append(names[module])
        if isinstance(module, _OutputOp):
            fault = fault or "it makes the network's output"
        elif not isinstance(module, nn.Module) or module not in names or not can_keep_channels(module):
            where = names.get(module, target.name)
            fault = fault or f"its channels meet {_why_it_cannot_be_cut(module)} ({where})"
        else:
            side = "outputs" if is_output or not isinstance(module, COUNTED_LAYERS) else "inputs"
            sides.add((names[module], side))
            ties += [
                (Channel(names[module], side, channel), Root(number, root))
                for channel, root in zip(item.idxs, item.root_idxs, strict=True)
            ]
    return TracedGroup(tuple(dict.fromkeys(makers)), frozenset(sides), tuple(ties), fault)


def _why_it_cannot_be_cut(module: Any) -> str:
    """What it is that channels meet, in words."""
    oddity = oddity_of(module) if isinstance(module, COUNTED_LAYERS) else ""
    kind = type(module).__name__ if isinstance(module, nn.Module) else "bare parameter"
    return oddity or f"a {kind} that cannot be cut"


@contextmanager
def _reshapes_that_cannot_be_mapped_are_skipped() -> Iterator[None]:
    """Let torch-pruning 1.6 go on at a reshape whose channels it cannot count.

    Channel shuffles (ShuffleNet) make it divide by zero. Whatever is then tied wrongly is found when the
    groups are tried.
    """
    original = index_mapping.update_reshape_index_mapping

    def tolerant(graph: Any, node: Any) -> None:
        try:
            original(graph, node)
        except ZeroDivisionError:
            return

    index_mapping.update_reshape_index_mapping = tolerant
    try:
        yield
    finally:
        index_mapping.update_reshape_index_mapping = original
