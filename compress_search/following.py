"""What follows a layer, up to the first thing that is not linear: normalisation, a sum, a rectifier.

Whoever refits a layer can look at what comes of its output in place of the output itself. At the end of a
residual branch, what was lost on the other side of the sum can be made good (He, Zhang and Sun 2017, *Channel
pruning for accelerating very deep neural networks*, section 3.3, "multi-branch enhancement"). And before a
rectifier, an output that is rightly below zero may be anything below zero (Zhang et al. 2016, *Accelerating
very deep convolutional networks for classification and detection*, section 3.2, "the nonlinear case").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_search.pausing import Notes, notes_of_pass
from compress_search.profile import CONVOLUTIONS, first_given, inference_mode_of, is_plain

_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_RECTIFIERS = (_aten.relu.default, _aten.relu_.default)
_BOUNDED_RECTIFIERS = (_aten.hardtanh.default, _aten.hardtanh_.default)

RECTIFIED = (0.0, math.inf)
"""The bounds of a rectifier."""

_LEAST_SLOPE = 1e-3
"""A channel of the layer that counts less than this in what follows, relative to the one that counts most,
cannot make anything good."""


@dataclass(frozen=True)
class Place:
    """Where a tensor can be had during a forward pass.

    Attributes:
        module: Name of a module that is called once.
        is_input: Whether the tensor is what the module is given first, or what it gives.
    """

    module: str
    is_input: bool


@dataclass(frozen=True)
class Following:
    """What follows a layer.

    Attributes:
        normalisations: Names of the batch normalisations that its output goes through first.
        other: Where that can be had, before the layer runs, to which the result is added; ``None`` for
            nothing.
        bounds: Between which values the result is clamped in the end, and then is heard by nobody but
            clamped; ``None`` if it is not.
        leading: Names of the layers that lead to this one, one after the other: what comes of each, clamped
            or not, is what the next is given, and nobody else hears it. ``other`` can be had when the first
            is given its input.
    """

    normalisations: tuple[str, ...] = ()
    other: Place | None = None
    bounds: tuple[float, float] | None = None
    leading: tuple[str, ...] = ()

    def after(self, model: nn.Module, outputs: Tensor, other: Tensor | None) -> Tensor:
        """What becomes of a layer's outputs before they are clamped.

        Args:
            model: The model, in evaluation mode.
            outputs: ``(batch, channels, *spatial)``, or ``(*, features)``.
            other: What is added.
        """
        for name in self.normalisations:
            outputs = model.get_submodule(name)(outputs)
        return outputs if other is None else outputs + other

    def clamped(self, values: Tensor) -> Tensor:
        """What a clamp that follows, if any, lets through of values before it."""
        if self.bounds is None:
            return values
        low, high = self.bounds
        return values.relu() if self.bounds == RECTIFIED else values.clamp(low, high)

    def before(self, model: nn.Module, change: Tensor) -> Tensor:
        """How a layer's outputs would have to change so that what becomes of them changes by so much.

        Args:
            model: The model, in evaluation mode.
            change: As the outputs.
        """
        for name in reversed(self.normalisations):
            layer = model.get_submodule(name)
            assert isinstance(layer, _BatchNorm) and layer.running_var is not None
            slope = (layer.running_var.detach().double() + layer.eps).rsqrt()
            if layer.weight is not None:
                slope = slope * layer.weight.detach()
            counts = slope.abs() > _LEAST_SLOPE * slope.abs().max()
            inverse = torch.where(counts, 1 / slope, torch.zeros_like(slope)).to(change.dtype)
            change = change * inverse.view(-1, *[1] * (change.ndim - 2))
        return change


NOTHING_KNOWN = Following()


def find_following(model: nn.Module, example_input: Tensor) -> dict[str, Following]:
    """Find what follows each convolution and linear layer.

    Of two branches that meet, the sum belongs to the last layer of the one that ends last. Layers that are
    called more than once are left out, as are sums whose other side no module is given or gives.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``, on the model's device; its first example is run.

    Returns:
        By the layers' names; layers that nothing is known of are missing.
    """
    watcher = _Watcher({module: name for name, module in model.named_modules()})
    with watcher.hooked(), inference_mode_of(model), watcher:
        watcher.hand_out(model(example_input[:1]))
    return watcher.found()


@contextmanager
def noting(model: nn.Module, places: Collection[Place], outside: Notes) -> Iterator[None]:
    """Let the model's passes within the block note down the tensors at some places, named by their places.

    Args:
        model: The model.
        places: The places.
        outside: For passes that are no :class:`compress_search.pausing.PausablePass`.
    """

    def note(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, kwargs: Any, *output: Any) -> None:
            notes_of_pass(outside)[place] = first_given(inputs, kwargs) if place.is_input else output[0]

        return hook

    with ExitStack() as stack:
        for place in places:
            module = model.get_submodule(place.module)
            register = module.register_forward_pre_hook if place.is_input else module.register_forward_hook
            stack.callback(register(note(place), with_kwargs=True).remove)
        yield


@dataclass(eq=False)
class _Known:
    """What is known of a tensor.

    Attributes:
        tensor: The tensor; held so that no other one takes its identity.
        version: Of its contents.
        layer: The layer that it comes from, or ``None``.
        normalisations: What that layer's output went through.
        beside: If it is a sum, where the other side can be had in time, and since when.
        before: What it was made from, likewise; ``None`` for the layer's output itself.
        unclamped: What it is the clamp of, or ``None``.
        uses: How many operations have taken it.
        places: Where it can be had, each with the time.
    """

    tensor: Tensor
    version: int
    layer: str | None = None
    normalisations: tuple[str, ...] = ()
    beside: tuple[tuple[int, Place], ...] = ()
    before: _Known | None = None
    unclamped: _Known | None = None
    uses: int = 0
    places: list[tuple[int, Place]] = field(default_factory=list)

    @property
    def is_used_once(self) -> bool:
        """Whether nobody else hears it, or what it was made from."""
        return self.uses <= 1 and (self.before is None or self.before.is_used_once)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors from module to module and through sums, and sees which of them are clamped."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._known: dict[int, _Known] = {}
        self._begun: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._time = 0
        self._last: dict[str, _Known] = {}
        """By layer, the last thing that is known of what follows it."""
        self._bounds: dict[_Known, tuple[float, float]] = {}
        self._given: dict[str, _Known] = {}
        """By layer, what it is given."""

    def hooked(self) -> ExitStack:
        """Hooks in all modules until the stack is closed."""
        stack = ExitStack()
        for module in self._names:
            stack.callback(module.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._ends, with_kwargs=True).remove)
        return stack

    def hand_out(self, outputs: Any) -> None:
        """Take note that these tensors are what the model gives, so that somebody hears them."""
        for leaf in tree_leaves(outputs):
            known = self._find(leaf) if isinstance(leaf, Tensor) else None
            if known is not None:
                known.uses += 1

    def found(self) -> dict[str, Following]:
        """What was found."""
        return {
            layer: self._following(known) for layer, known in self._last.items() if self._calls[layer] == 1
        }

    def _following(self, known: _Known) -> Following:
        bounds = self._bounds.get(known) if known.is_used_once else None
        assert known.layer is not None
        if not known.beside:
            leading = self._leading(known, since=0)
            return Following(known.normalisations, bounds=bounds, leading=leading)
        places = ((time, place) for time, place in known.beside if self._calls[place.module] == 1)
        time, place = next(places, (0, None))
        if place is not None:
            leading = self._leading(known, since=time)
            return Following(known.normalisations, place, bounds, leading)
        assert known.before is not None
        return self._following(known.before)

    def _leading(self, end: _Known, *, since: int) -> tuple[str, ...]:
        """The layers that lead to one.

        Args:
            end: The last that is known of what follows that one.
            since: The time before which none may begin.
        """
        names: list[str] = []
        while self._is_called_once(end) and end.layer is not None:
            source = self._only_source(end.layer)
            if source is None or source.layer is None or self._begun[source.layer] < since:
                break
            if not self._is_called_once(source):
                break
            names.insert(0, source.layer)
            end = source
        return tuple(names)

    def _is_called_once(self, end: _Known) -> bool:
        """Whether nobody else uses the layer, and what normalises its output."""
        return all(self._calls[name] == 1 for name in (end.layer, *end.normalisations) if name is not None)

    def _only_source(self, layer: str) -> _Known | None:
        """What a layer hears, clamped or not, if it comes from one layer and nobody else hears it."""
        given = self._given.get(layer)
        if given is None or given.uses > 1:
            return None
        end = given.unclamped or given
        return end if end.layer is not None and not end.beside and end.is_used_once else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = [self._find(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for known in taken:
            if known is not None:
                known.uses += 1
        clamped = taken[0] if func in (*_RECTIFIERS, *_BOUNDED_RECTIFIERS) else None
        if func in _RECTIFIERS and clamped is not None:
            self._bounds[clamped] = RECTIFIED
        if func in _BOUNDED_RECTIFIERS and clamped is not None:
            low, high = args[1] if len(args) > 1 else -1.0, args[2] if len(args) > 2 else 1.0
            self._bounds[clamped] = (float(low), float(high))
        result = func(*args, **(kwargs or {}))
        if clamped is not None:
            self._remember(_Known(result, _version(result, clamped.tensor), unclamped=clamped))
        if func in _SUMS and not kwargs and len(taken) == 2 == len(args) and args[0].shape == args[1].shape:
            self._add(taken[0], taken[1], result)
        return result

    def _add(self, one: _Known | None, other: _Known | None, result: Tensor) -> None:
        if one is None or other is None or one is other:
            return
        for end, beside in ((one, other), (other, one)):
            if end.layer is None or end.beside:
                continue
            begun = self._begun[end.layer]
            places = tuple((time, place) for time, place in beside.places if time < begun)
            if places:
                version = _version(result, one.tensor)
                self._remember(_Known(result, version, end.layer, end.normalisations, places, end))
                return

    def _begins(self, module: nn.Module, inputs: Any, kwargs: Any) -> None:
        name = self._names[module]
        self._time += 1
        self._calls[name] = self._calls.get(name, 0) + 1
        self._begun[name] = self._time
        given = first_given(inputs, kwargs)
        if isinstance(given, Tensor):
            self._given[name] = self._note(given, Place(name, is_input=True))

    def _ends(self, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        name = self._names[module]
        self._time += 1
        if not isinstance(output, Tensor):
            return
        if self._find(output) is None:
            known = _Known(output, output._version)
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and is_plain(module):
                known.layer = name
            elif isinstance(module, _BatchNorm) and module.running_var is not None:
                before = self._find(first_given(inputs, kwargs))
                if before is not None and before.layer is not None and not before.beside:
                    known.layer, known.before = before.layer, before
                    known.normalisations = (*before.normalisations, name)
            self._remember(known)
        self._note(output, Place(name, is_input=False))

    def _remember(self, known: _Known) -> None:
        self._known[id(known.tensor)] = known
        if known.layer is not None:
            self._last[known.layer] = known

    def _note(self, tensor: Tensor, place: Place) -> _Known:
        known = self._find(tensor)
        if known is None:
            known = _Known(tensor, tensor._version)
            self._remember(known)
        known.places.append((self._time, place))
        return known

    def _find(self, tensor: Tensor) -> _Known | None:
        """What is known of a tensor, unless it was changed in place since."""
        known = self._known.get(id(tensor))
        return known if known is not None and known.version == tensor._version else None


def _version(result: Tensor, changed: Tensor) -> int:
    """The version that the result of an operation will have when the operation has returned.

    Args:
        result: The result.
        changed: What the operation changed, if it was one in place.
    """
    # PyTorch counts a change in place when the operation has returned, which is after this.
    return result._version + (result is changed)
