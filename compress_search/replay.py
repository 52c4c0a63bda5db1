"""Run a model again from some layer on, without computing what comes before it a second time.

Works on modules, not on a traced graph, so that any ``forward`` will do. While a batch runs for the first
time, the outputs of all modules that have finished before the layer begins are kept. When it runs again,
those modules hand out what was kept; whatever a ``forward`` does between modules is done again. The first
run can itself go on later, to the next layer of interest, in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compress_search.divergence import are_same_but_for_rounding
from compress_search.profile import inference_mode_of

_KEPT_BYTES = 2**29
"""What all prefixes that wait for their next layers may take together, as much as the passes of a refit.

Batches that do not fit start again from the input: time in place of memory.
"""


@dataclass(eq=False)
class _Call:
    """One call of a module in the first run.

    Attributes:
        module: The module.
        output: What it gave; ``None`` until it has finished, or where nobody will ask for it.
        changed: Arguments that it changed in place, by position, as they were afterwards.
        returned: Position of the argument that it gave back as its output, if it did.
        after: Position in the list of calls right after this one and all calls within it; ``None`` while
            it has not finished.
        is_tangled: Whether its output is a view of an argument, or it changed what is no argument of its
            own but within one. Handing out a copy then is not quite what the call does: good enough for
            what is computed at once, but not for what is kept.
    """

    module: nn.Module
    output: Any = None
    changed: Mapping[int, Tensor] = field(default_factory=dict)
    returned: int | None = None
    after: int | None = None
    is_tangled: bool = False


class _LayerReachedError(Exception):
    """The first run is over: the layer's first call is about to begin."""


class _NotRepeatedError(Exception):
    """A run does not do what the run did that it goes on from."""


@dataclass(eq=False)
class _Level:
    """What runs right now: a module, and its last finished child."""

    module: nn.Module
    last: _Call | None = field(default=None)


class Prefix:
    """A batch on its way through a model, stopped before some layers' first call.

    Args:
        model: The model. It is run in evaluation mode and not changed.
        batch: ``(batch, ...)``.
        layers: Names of the layers; the run stops before the first of them that is called. Where none of
            them is called, nothing is kept, and :meth:`rerun` computes everything.
    """

    def __init__(self, model: nn.Module, batch: Tensor, layers: Collection[str]) -> None:
        self._model = model
        self._batch = batch
        self._calls: list[_Call] = []
        self.move_to(layers)

    @property
    def held_bytes(self) -> int:
        """Memory that is kept of the run, in bytes."""
        return sum(
            leaf.numel() * leaf.element_size()
            for call in self._calls
            for leaf in tree_leaves((call.output, dict(call.changed)))
            if isinstance(leaf, Tensor)
        )

    def move_to(self, layers: Collection[str]) -> None:
        """Go on, and stop before the first call of other layers.

        Only what comes after the last stop is computed, unless one of the layers was called before it, or
        the model's ``forward`` does not repeat itself: then the run starts anew.

        Args:
            layers: Names of the layers.
        """
        stops = {self._model.get_submodule(name) for name in layers}
        calls, self._calls = self._calls, []
        if any(call.module in stops or call.is_tangled for call in calls):
            calls = []
        try:
            self._calls = self._stopped(_Recording(stops, calls))
        except _NotRepeatedError:
            self._calls = self._stopped(_Recording(stops, []))

    def _stopped(self, recording: _Recording) -> list[_Call]:
        try:
            with _patched(self._model, recording.call), inference_mode_of(self._model):
                self._model(self._batch)
        except _LayerReachedError:
            return recording.calls
        return []

    def rerun(self, parameters: Mapping[str, Tensor]) -> Any:
        """Finish the run with other parameters.

        Args:
            parameters: By their names in ``model.named_parameters()``; only parameters of the layers that
                the run stopped at, or of layers that run after them.

        Returns:
            The model's output.
        """
        position = 0

        def replay(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            nonlocal position
            if position >= len(self._calls):
                return forward(*args, **kwargs)
            call = self._calls[position]
            if call.module is not module:
                # It does not repeat itself, so nothing more can be taken from the first run.
                position = len(self._calls)
                return forward(*args, **kwargs)
            if call.after is not None:
                position = call.after
                return _repeated(call, args)
            position += 1
            return forward(*args, **kwargs)

        with (
            _patched(self._model, replay),
            exchanged(self._model, parameters),
            inference_mode_of(self._model),
        ):
            return self._model(self._batch)


class Prefixes:
    """The prefixes of several batches, which all move on from layer to layer together.

    Prefixes that do not fit into a bounded memory start anew for the next layers, and so do all where
    batches do not keep apart, as when a ``forward`` leaves activations in its module for others to find.

    Args:
        model: The model. It is run in evaluation mode and not changed.
        batches: Each ``(batch, ...)``, on the model's device.
        order: Names of the model's layers in the order of their first call: all at which a prefix might
            stop.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], order: Sequence[str]) -> None:
        self._model = model
        self._batches = batches
        self._order = order
        self._kept: dict[int, Prefix] = {}

    def before(self, layers: Collection[str]) -> Iterator[Prefix]:
        """Yield the prefix of each batch that stops before some layers' first call.

        A prefix may only be used until the next one is asked for.

        Args:
            layers: Names of the layers. Forward order from call to call saves the most.
        """
        for number, batch in enumerate(self._batches):
            prefix = self._kept.pop(number, None)
            if prefix is None:
                prefix = Prefix(self._model, batch, layers)
            else:
                prefix.move_to(layers)
            yield prefix
            held = sum(kept.held_bytes for kept in self._kept.values())
            if self._keep_apart and held + prefix.held_bytes <= _KEPT_BYTES:
                self._kept[number] = prefix

    @cached_property
    def _keep_apart(self) -> bool:
        """Whether batches that take turns from layer to layer give what each gives alone."""
        examples = [self._batches[0][:1], self._batches[-1][-1:]]
        if sum(map(len, self._batches)) < 2:
            return False
        prefixes = [Prefix(self._model, example, self._order[:1]) for example in examples]
        for name in self._order[1:]:
            for prefix in prefixes:
                prefix.move_to([name])
        with inference_mode_of(self._model):
            wanted = [self._model(example) for example in examples]
        given = [prefix.rerun({}) for prefix in prefixes]
        return are_same_but_for_rounding(given, wanted)


class _Recording:
    """A run that notes down all calls of modules until one of some modules is about to be called.

    Args:
        stops: These modules.
        calls: What an earlier run noted down, of calls that none of these modules is among. Calls that had
            finished are not computed again.
    """

    def __init__(self, stops: Collection[nn.Module], calls: list[_Call]) -> None:
        self.calls = calls
        self._stops = stops
        self._position = 0
        self._levels: list[_Level] = []

    def call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Stand in for a module's ``forward``."""
        if self._position == len(self.calls):
            if module in self._stops:
                raise _LayerReachedError
            self.calls.append(_Call(module))
        call = self.calls[self._position]
        if call.module is not module:
            raise _NotRepeatedError
        if call.after is None:
            output = self._run(call, forward, args, kwargs)
        else:
            self._position = call.after
            output = _repeated(call, args)
        if self._levels:
            self._levels[-1].last = call
        return output

    def _run(self, call: _Call, forward: Any, args: Any, kwargs: Any) -> Any:
        self._position += 1
        position = self._position
        self._levels.append(_Level(call.module))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = {id(leaf): _version(leaf) for leaf in leaves}
        output = forward(*args, **kwargs)
        self._levels.pop()
        if self._position != len(self.calls):
            raise _NotRepeatedError
        changed = [leaf for leaf in leaves if _version(leaf) != versions[id(leaf)]]
        call.changed = {
            place: argument.clone()
            for place, argument in enumerate(args)
            if any(argument is leaf for leaf in changed)
        }
        call.returned = next((place for place, argument in enumerate(args) if argument is output), None)
        call.is_tangled = len(call.changed) < len(changed) or (
            call.returned is None and _share_memory(leaves, tree_leaves(output))
        )
        for within in self.calls[position:]:
            # Nobody asks for what ran within a call that is skipped as a whole.
            within.output, within.changed, within.is_tangled = None, {}, False
        call.output, call.after = _copied(output), len(self.calls)
        if self._levels:
            above = self._levels[-1]
            if above.last is not None and _is_chain(above.module):
                # In a chain only the last finished part is heard.
                above.last.output = None
        return output


def _share_memory(tensors: Sequence[Tensor], others: Sequence[Any]) -> bool:
    storages = {_storage(tensor) for tensor in tensors if tensor.layout == torch.strided}
    return any(
        _storage(other) in storages
        for other in others
        if isinstance(other, Tensor) and other.layout == torch.strided
    )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _repeated(call: _Call, args: Sequence[Any]) -> Any:
    """Do what a call did: change its arguments, and give its output, which what follows may change."""
    for place, value in call.changed.items():
        # Within a chain of calls that are all skipped there is nothing to change.
        if isinstance(args[place], Tensor):
            args[place].copy_(value)
    if call.returned is not None and isinstance(args[call.returned], Tensor):
        return args[call.returned]
    return _copied(call.output)


def _copied(output: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, output)


def _version(argument: Any) -> int:
    """A number that rises when a tensor is changed in place."""
    tracked = isinstance(argument, Tensor) and not argument.is_inference()
    return argument._version if tracked else 0


@contextmanager
def exchanged(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Give layers of a model other parameters within the block.

    Other modules that share a parameter keep it: what compresses a layer parts it from those.

    Not :func:`torch.func.functional_call`, which leaves a module that has two names with the other parameters
    for good.

    Args:
        model: The model.
        parameters: By their names in ``model.named_parameters()``.
    """
    holders = []
    for full_name, value in parameters.items():
        owner, _, name = full_name.rpartition(".")
        holders.append((model.get_submodule(owner)._parameters, name, nn.Parameter(value, False)))
    before = [held[name] for held, name, _ in holders]
    try:
        for held, name, value in holders:
            held[name] = value
        yield
    finally:
        for (held, name, _), parameter in zip(holders, before, strict=True):
            held[name] = parameter


@contextmanager
def _patched(model: nn.Module, wrapper: Any) -> Iterator[None]:
    """Let every module call ``wrapper(module, forward, args, kwargs)`` in place of its ``forward``."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        forward = module.forward
        module.__dict__["forward"] = lambda *args, module=module, forward=forward, **kwargs: wrapper(
            module, forward, args, kwargs
        )
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
