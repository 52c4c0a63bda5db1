"""Run a model again from some layer on, without computing what comes before it a second time.

Works on modules, not on a traced graph, so that any ``forward`` will do. While a batch runs for the first
time, the outputs of all modules that have finished before the layer begins are kept. When it runs again,
those modules hand out what was kept; whatever a ``forward`` does between modules is done again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress_search.profile import inference_mode_of


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
    """

    module: nn.Module
    output: Any = None
    changed: Mapping[int, Tensor] = field(default_factory=dict)
    returned: int | None = None
    after: int | None = None


class _LayerReachedError(Exception):
    """The first run is over: the layer's first call is about to begin."""


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
        self._stops = {model.get_submodule(name) for name in layers}
        self._levels: list[_Level] = []
        try:
            with _patched(model, self._record), inference_mode_of(model):
                model(batch)
            self._calls = []
        except _LayerReachedError:
            pass
        self._levels = []

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
            _exchanged(self._model, parameters),
            inference_mode_of(self._model),
        ):
            return self._model(self._batch)

    def _record(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if module in self._stops:
            raise _LayerReachedError
        call, position = _Call(module), len(self._calls)
        self._calls.append(call)
        self._levels.append(_Level(module))
        versions = [_version(argument) for argument in args]
        output = forward(*args, **kwargs)
        self._levels.pop()
        call.changed = {
            place: argument.clone()
            for place, (argument, version) in enumerate(zip(args, versions, strict=True))
            if _version(argument) != version
        }
        call.returned = next((place for place, argument in enumerate(args) if argument is output), None)
        for within in self._calls[position + 1 :]:
            # Nobody asks for what ran within a call that is skipped as a whole.
            within.output = None
        call.output, call.after = _copied(output), len(self._calls)
        if self._levels:
            above = self._levels[-1]
            if above.last is not None and _is_chain(above.module):
                # In a chain only the last finished part is heard.
                above.last.output = None
            above.last = call
        return output


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
def _exchanged(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model other parameters, wherever they are used and under whatever names.

    Not :func:`torch.func.functional_call`, which leaves a module that has two names with the other parameters
    for good.
    """
    others = {model.get_parameter(name): value for name, value in parameters.items()}
    holders = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter in others
    ]
    try:
        for module, name, parameter in holders:
            module._parameters[name] = others[parameter]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in holders:
            module._parameters[name] = parameter


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
