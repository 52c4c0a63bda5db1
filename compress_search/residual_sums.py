"""Where a layer's output is added to something else, as at the end of a residual branch.

What is lost before a sum on one side of it can be made good on the other (He, Zhang and Sun 2017, *Channel
pruning for accelerating very deep neural networks*, section 3.3, "multi-branch enhancement").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from compress_search.pausing import Notes, notes_of_pass
from compress_search.profile import CONVOLUTIONS, inference_mode_of

_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)

_LEAST_SLOPE = 1e-3
"""A channel of the layer that counts less than this in the sum, relative to the one that counts most, cannot
make anything good."""


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
class ResidualSum:
    """A sum of a layer's output, at most normalised on the way, and of something that is known before it.

    Attributes:
        normalisations: Names of the batch normalisations between the layer and the sum.
        other: Where the other side can be had, before the layer runs.
    """

    normalisations: tuple[str, ...]
    other: Place

    def in_layer(self, model: nn.Module, change: Tensor) -> Tensor:
        """What to add to the layer's output so that the sum changes by so much.

        Args:
            model: The model, in evaluation mode.
            change: ``(batch, channels, *spatial)``, or ``(*, features)`` where nothing is normalised.
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


def find_residual_sums(model: nn.Module, example_input: Tensor) -> dict[str, ResidualSum]:
    """Find the layers whose output is added to something that is known before they run.

    Of two branches that meet, that is the last layer of the one that ends last. Layers that are called more
    than once are left out, as are sums whose other side no module is given or gives.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``, on the model's device; its first example is run.

    Returns:
        The sum that each such convolution or linear layer ends in, by the layer's name.
    """
    watcher = _Watcher({module: name for name, module in model.named_modules()})
    with watcher.hooked(), inference_mode_of(model), watcher:
        model(example_input[:1])
    return watcher.sums()


@contextmanager
def noting(model: nn.Module, places: Collection[Place], outside: Notes) -> Iterator[None]:
    """Let the model's passes within the block note down the tensors at some places, named by their places.

    Args:
        model: The model.
        places: The places.
        outside: For passes that are no :class:`compress_search.pausing.PausablePass`.
    """

    def note(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, *output: Any) -> None:
            notes_of_pass(outside)[place] = inputs[0] if place.is_input else output[0]

        return hook

    with ExitStack() as stack:
        for place in places:
            module = model.get_submodule(place.module)
            register = module.register_forward_pre_hook if place.is_input else module.register_forward_hook
            stack.callback(register(note(place)).remove)
        yield


@dataclass
class _Known:
    """What is known of a tensor.

    Attributes:
        tensor: The tensor; held so that no other one takes its identity.
        version: Of its contents.
        layer: The layer that it is the output of, normalised or not; or ``None``.
        normalisations: What it was normalised by.
        places: Where it can be had, each with the time.
    """

    tensor: Tensor
    version: int
    layer: str | None
    normalisations: tuple[str, ...]
    places: list[tuple[int, Place]] = field(default_factory=list)


class _Watcher(TorchDispatchMode):
    """Follows tensors from module to module, and sees which of them are added."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._names = names
        self._known: dict[int, _Known] = {}
        self._begun: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._time = 0
        self._added: list[tuple[_Known, _Known]] = []

    def hooked(self) -> ExitStack:
        """Hooks in all modules until the stack is closed."""
        stack = ExitStack()
        for module in self._names:
            stack.callback(module.register_forward_pre_hook(self._begins).remove)
            stack.callback(module.register_forward_hook(self._ends).remove)
        return stack

    def sums(self) -> dict[str, ResidualSum]:
        """What was found."""
        found = {}
        for one, other in self._added:
            for end, beside in ((one, other), (other, one)):
                if end.layer is None or self._calls[end.layer] > 1 or end is beside:
                    continue
                begun = self._begun[end.layer]
                places = [p for time, p in beside.places if time < begun and self._calls[p.module] == 1]
                if places:
                    found[end.layer] = ResidualSum(end.normalisations, places[0])
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SUMS and not kwargs and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            one, other = (self._find(side) for side in args)
            if one is not None and other is not None:
                self._added.append((one, other))
        return func(*args, **(kwargs or {}))

    def _begins(self, module: nn.Module, inputs: Any) -> None:
        name = self._names[module]
        self._time += 1
        self._calls[name] = self._calls.get(name, 0) + 1
        self._begun[name] = self._time
        if inputs and isinstance(inputs[0], Tensor):
            self._note(inputs[0], Place(name, is_input=True))

    def _ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._names[module]
        self._time += 1
        if not isinstance(output, Tensor):
            return
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            self._note(output, Place(name, is_input=False), layer=name)
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            before = self._find(inputs[0])
            layer, normalised = (before.layer, before.normalisations) if before else (None, ())
            self._note(output, Place(name, is_input=False), layer=layer, normalisations=(*normalised, name))
        else:
            self._note(output, Place(name, is_input=False))

    def _note(
        self, tensor: Tensor, place: Place, *, layer: str | None = None, normalisations: tuple[str, ...] = ()
    ) -> None:
        known = self._find(tensor)
        if known is None:
            known = _Known(tensor, tensor._version, layer, normalisations)
            self._known[id(tensor)] = known
        known.places.append((self._time, place))

    def _find(self, tensor: Tensor) -> _Known | None:
        """What is known of a tensor, unless it was changed in place since."""
        known = self._known.get(id(tensor))
        return known if known is not None and known.version == tensor._version else None
