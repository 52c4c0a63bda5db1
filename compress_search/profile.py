"""What a model costs: per-layer shapes, multiply-accumulates (MACs) and parameters.

This is the one definition of a MAC and of a MAC ratio in the package. Convolutions, transposed
convolutions and linear layers are counted, per example (batch of one). What is not counted is found by
watching the operations that PyTorch's own flop counter knows, and is named in a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from compress_search.exceptions import ModelError
from compress_search.html_table import html_table

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COUNTED_LAYERS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerProfile:
    """One counted layer.

    Attributes:
        name: Its name in ``model.named_modules()``.
        kind: Its class name, for example ``"Conv2d"``.
        weight_shape: The shape of its weight.
        calls: Input and output shape of every call in one forward pass, batch of one included.
        macs: MACs of all its calls for one example.
        params: Number of its parameters, bias included.
    """

    name: str
    kind: str
    weight_shape: Shape
    calls: tuple[tuple[Shape, Shape], ...]
    macs: int
    params: int

    @property
    def is_batched(self) -> bool:
        """Whether every call has a batch axis; a convolution also takes an example without one."""
        dimensions = len(self.weight_shape)
        return dimensions == 2 or all(len(before) == dimensions for before, _ in self.calls)


@dataclass(frozen=True)
class ModelProfile:
    """The cost of a model for one example.

    Attributes:
        layers: The counted layers in the order of their first call.
        macs: MACs of all counted layers.
        params: Number of parameters of the whole model, each shared tensor once.
        uncounted: Operations that multiply but are not counted, as ``module (operation)``.
        idle: The layers that would be counted but did not run, such as an auxiliary head's in evaluation
            mode. They have no calls and no MACs.
    """

    layers: tuple[LayerProfile, ...]
    macs: int
    params: int
    uncounted: tuple[str, ...] = field(default=())
    idle: tuple[LayerProfile, ...] = field(default=())

    def layer(self, name: str) -> LayerProfile:
        """Return the profile of one layer.

        Raises:
            KeyError: No counted layer of that name ran.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def mac_ratio(self, reference: ModelProfile) -> float:
        """MACs of this model / MACs of ``reference``: the meaning of every ``mac_ratio``."""
        return self.macs / reference.macs

    def _repr_html_(self) -> str:
        """Show the layers in a notebook."""
        head = ("layer", "kind", "weight", "MACs", "parameters")
        rows = [
            (row.name, row.kind, " × ".join(map(str, row.weight_shape)), f"{row.macs:,}", f"{row.params:,}")
            for row in self.layers
        ]
        caption = f"{self.macs:,} MACs for one example, {self.params:,} parameters"
        return html_table((head, *rows), right=head[2:], caption=caption)


def base_of(layer: nn.Module) -> type[nn.Module]:
    """Which of :data:`COUNTED_LAYERS` a layer is, or is derived from."""
    return next(kind for kind in COUNTED_LAYERS if isinstance(layer, kind))


def oddity_of(layer: nn.Module) -> str:
    """Say what a counted layer is that is not plainly PyTorch's; empty for one that is.

    Only of a plain layer is it known that its outputs are what its weight, bias and geometry make of its
    inputs. Any other is counted, and otherwise left alone.

    Args:
        layer: One of :data:`COUNTED_LAYERS`.

    Returns:
        Words such as ``"a Linear with a forward of its own"``.
    """
    kind, base = type(layer).__name__, base_of(layer)
    # The second one is what convolutions leave to subclasses to override.
    for name in ("forward", "_conv_forward"):
        if name in vars(layer) or getattr(type(layer), name, None) is not getattr(base, name, None):
            return f"a {kind} with a forward of its own"
    # Weight norm, spectral norm and pruning masks keep other parameters and compute these from them.
    own = layer._parameters
    if not isinstance(own.get("weight"), nn.Parameter) or "bias" not in own:
        return f"a {kind} whose weight or bias is computed from other parameters"
    return ""


def is_plain(layer: nn.Module) -> bool:
    """Whether a module is one of :data:`COUNTED_LAYERS` without an oddity, see :func:`oddity_of`."""
    return isinstance(layer, COUNTED_LAYERS) and not oddity_of(layer)


def layer_macs(layer: nn.Module, input_shape: Shape, output_shape: Shape) -> int:
    """MACs of one call of a convolution, transposed convolution or linear layer.

    Every kernel tap is counted at every position, those that fall on padding included; the bias is not
    counted. This is the convention of :mod:`torch.utils.flop_counter` (which counts 2 per MAC).

    Args:
        layer: One of :data:`COUNTED_LAYERS`.
        input_shape: ``(batch, channels, *spatial)``, or ``(*, features)`` for a linear layer.
        output_shape: Likewise.
    """
    weights = layer.weight.numel()  # type: ignore[operator]
    if isinstance(layer, nn.Linear):
        return int(weights * math.prod(output_shape[:-1]))
    channel_axis = -(len(layer.kernel_size) + 1)  # type: ignore[arg-type]
    shape = input_shape if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else output_shape
    positions = math.prod(shape[:channel_axis]) * math.prod(shape[channel_axis + 1 :])
    return int(weights * positions)


def profile_model(model: nn.Module, example_input: Tensor, *, warn: bool = False) -> ModelProfile:
    """Measure a model with one forward pass of one example.

    The model's mode, gradients and buffers are as before afterwards.

    Args:
        model: The model.
        example_input: ``(batch, ...)``; only its first example is used.
        warn: Warn of operations that multiply but are not counted (attention, functional convolutions).

    Raises:
        ModelError: The forward pass fails, or the model has no counted layer.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, list[tuple[Shape, Shape]]] = {}
    modules: dict[str, nn.Module] = {}
    watcher = _UncountedOperations(names)

    def record(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = names[module]
        modules[name] = module
        calls.setdefault(name, []).append((_shape(first_given(inputs, kwargs)), _shape(output)))

    counted = [module for module in names if isinstance(module, COUNTED_LAYERS)]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in counted]
    try:
        with inference_mode_of(model), watcher.watching(), watcher:
            model(example_input[:1])
    except Exception as error:
        raise ModelError(
            f"The model does not run on an example input of shape {tuple(example_input.shape)}: "
            f"{type(error).__name__}: {error}. Give an example_input that model(example_input) accepts."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise ModelError(
            f"{type(model).__name__} ran no convolution or linear layer, so there is nothing to compress. "
            "Give a model built from torch.nn layers."
        )
    layers = tuple(_layer_profile(name, modules[name], shapes) for name, shapes in calls.items())
    idle = tuple(
        _layer_profile(name, module, [])
        for module, name in names.items()
        if isinstance(module, COUNTED_LAYERS) and name not in calls
    )
    if warn and watcher.found:
        warnings.warn(
            "These operations multiply but are not counted in the MACs: " + ", ".join(watcher.found),
            stacklevel=2,
        )
    return ModelProfile(
        layers=layers,
        macs=sum(layer.macs for layer in layers),
        params=sum(p.numel() for p in model.parameters()),
        uncounted=tuple(watcher.found),
        idle=idle,
    )


def first_given(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module is given first in a call, by position or, as in ``self.conv(input=x)``, by name.

    Args:
        inputs: What a hook is told of it by position.
        kwargs: And by name; :mod:`torch.nn` calls the first one ``input``.

    Returns:
        ``None`` where it is given nothing.
    """
    return inputs[0] if inputs else kwargs.get("input", next(iter(kwargs.values()), None))


def _shape(value: Any) -> Shape:
    """The shape of a tensor, or of the first one where a layer that is not plain takes or gives several."""
    return next((tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), ())


def _layer_profile(name: str, layer: nn.Module, calls: Sequence[tuple[Shape, Shape]]) -> LayerProfile:
    return LayerProfile(
        name=name,
        kind=type(layer).__name__,
        weight_shape=tuple(layer.weight.shape),  # type: ignore[arg-type]
        calls=tuple(calls),
        macs=sum(layer_macs(layer, *shapes) for shapes in calls),
        params=sum(parameter.numel() for parameter in layer.parameters()),
    )


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Run the block with ``model`` in evaluation mode and without gradients; restore every module's mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def training_paths_of(model: nn.Module) -> Iterator[None]:
    """Let ``model`` take the paths of training in the block, auxiliary heads included, and change nothing.

    Modules that hold others are in training mode; those that hold none, normalisation and dropout among them,
    in evaluation mode. Every module's mode is restored.
    """
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.training = next(module.children(), None) is not None
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class _UncountedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation with a known flop formula that runs outside a counted layer."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, None] = {}
        self._names = names
        self._running: list[nn.Module] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep track of which module is running."""
        hooks = []
        for module in self._names:
            hooks.append(module.register_forward_pre_hook(lambda m, _: self._running.append(m)))
            hooks.append(module.register_forward_hook(lambda *_: self._leave()))
        # In evaluation mode attention would run as one fused operation that has no flop formula.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in flop_registry:
            module = self._running[-1] if self._running else None
            if not isinstance(module, COUNTED_LAYERS):
                name = (self._names[module] or "the model itself") if module else "the model itself"
                self.found[f"{name} ({func._overloadpacket})"] = None
        return func(*args, **(kwargs or {}))
