"""CompressionPlan: the outcome of compression, per layer, as versioned JSON.

A plan says what became of each layer: the integer rank of a factorised one, the indices of the kept
channels of a pruned one. It holds no weights. Replayed on the original architecture by
:func:`apply_plan` it rebuilds the compressed architecture, into which the saved weights load.

An edit describes modules rather than methods, so a new method needs no change here.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress_search.exceptions import PlanError
from compress_search.html_table import html_table
from compress_search.profile import COUNTED_LAYERS
from compress_search.surgery import can_keep_channels, channel_count, keep_channels
from compress_search.weight_sharing import copy_sharing_weights
from compress_search.workspace import write_json_atomically

FORMAT = "compress_search.plan"
VERSION = 1
_PART_TYPES = tuple(layer.__name__ for layer in COUNTED_LAYERS)


@dataclass(frozen=True)
class Part:
    """One module of a factorised layer.

    Attributes:
        name: Its name inside the sequence, for example ``"vertical"``.
        type: Its class in :mod:`torch.nn`.
        arguments: What its constructor takes.
    """

    name: str
    type: str
    arguments: Mapping[str, Any]

    def build(self, like: Tensor) -> nn.Module:
        """Construct the module on the device and in the precision of ``like``."""
        if self.type not in _PART_TYPES:
            raise PlanError(f"A plan cannot build a {self.type!r}; it can build: {', '.join(_PART_TYPES)}.")
        try:
            module: nn.Module = getattr(nn, self.type)(**self.arguments, device=like.device, dtype=like.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PlanError(f"The plan builds a {self.type} of {dict(self.arguments)}: {error}.") from error
        return module


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""What PyTorch calls with a module, forwards and backwards; there is no public way to ask for it."""


@dataclass(frozen=True)
class FactoriseLayer:
    """Replace a layer by a sequence of smaller ones.

    Attributes:
        layer: Name of the layer in the model.
        rank: Number of channels between the parts.
        parts: The modules of the sequence, first to last.
    """

    layer: str
    rank: int
    parts: tuple[Part, ...]

    def apply(self, model: nn.Module) -> None:
        """Make the change in ``model``, in place.

        The new weights are PyTorch's initial ones, and are trained or frozen as the layer's own were. Hooks
        of the layer are called with the sequence.
        """
        old = _submodule(model, self.layer)
        weight = getattr(old, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise _misfit(f"factorises {self.layer!r}, a {type(old).__name__} without a weight")
        new = nn.Sequential(OrderedDict((part.name, part.build(weight)) for part in self.parts))
        new.train(old.training)
        _freeze_alike(new, old, weight)
        for name in _HOOKS:
            # The same dictionaries: the handles that registering gave remove from these.
            setattr(new, name, getattr(old, name))
        # A module that the network uses under several names is replaced under each of them.
        for parent in list(model.modules()):
            for child, module in list(parent._modules.items()):
                if module is old:
                    setattr(parent, child, new)

    def describe(self) -> str:
        """Say what becomes of the layer."""
        return f"rank {self.rank}: {', '.join(f'{part.name} {part.type}' for part in self.parts)}"


@dataclass(frozen=True)
class KeepChannels:
    """Keep only some input and output channels of a module.

    Attributes:
        layer: Name of the module in the model.
        inputs: Indices of the kept input channels, ``None`` for all.
        outputs: Indices of the kept output channels, ``None`` for all.
    """

    layer: str
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None

    def apply(self, model: nn.Module) -> None:
        """Make the change in ``model``, in place. The kept weights keep their values."""
        module = _submodule(model, self.layer)
        if not can_keep_channels(module):
            raise _misfit(f"cuts channels of {self.layer!r}, a {type(module).__name__} that cannot be cut")
        for side, kept in (("inputs", self.inputs), ("outputs", self.outputs)):
            channels = channel_count(module, side)
            # A GPU would answer a wrong index by giving up every later operation of the process.
            if kept is not None and not all(0 <= index < channels for index in kept):
                raise _misfit(f"keeps channels that {self.layer!r} does not have: it has {channels} {side}")
        keep_channels(module, inputs=self.inputs, outputs=self.outputs)

    def describe(self) -> str:
        """Say how many channels are kept."""
        sides = (("input", self.inputs), ("output", self.outputs))
        return "keeps " + " and ".join(
            f"{len(kept)} {side} channels" for side, kept in sides if kept is not None
        )


Edit = FactoriseLayer | KeepChannels


@dataclass(frozen=True)
class PlanStep:
    """What one compression method did.

    Attributes:
        method: Name of the method.
        mac_ratio: MACs after / MACs before this step.
        edits: The changes, in the order in which they are applied.
        left_alone: Layers the method did not touch, each with its reason.
    """

    method: str
    mac_ratio: float
    edits: tuple[Edit, ...]
    left_alone: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CompressionPlan:
    """The steps that lead from the original architecture to the compressed one."""

    steps: tuple[PlanStep, ...] = ()

    def then(self, step: PlanStep) -> CompressionPlan:
        """Return this plan with one more step at its end."""
        return CompressionPlan((*self.steps, step))

    def outputs_after(self, layer: str, channels: Iterable[int]) -> tuple[str, tuple[int, ...]]:
        """Say where output channels of a layer of the original model are found after this plan.

        Args:
            layer: Name of the layer in the original model.
            channels: Indices of some of its output channels there.

        Returns:
            The name of the module that makes them now, which of a factorised layer is the last part; and
            their indices there.

        Raises:
            PlanError: The plan removed some of them.
        """
        name, places = layer, {channel: channel for channel in channels}
        for edit in (edit for step in self.steps for edit in step.edits):
            if edit.layer != name:
                continue
            if isinstance(edit, FactoriseLayer):
                name = f"{name}.{edit.parts[-1].name}"
            elif edit.outputs is not None:
                gone = [str(channel) for channel, place in places.items() if place not in edit.outputs]
                if gone:
                    raise PlanError(
                        f"Channel {', '.join(gone)} of {layer!r} is to be kept, but an earlier step of the "
                        "plan has removed it. Give keep_channels to that step too."
                    )
                places = {channel: edit.outputs.index(place) for channel, place in places.items()}
        return name, tuple(places.values())

    def _repr_html_(self) -> str:
        """Show the plan in a notebook, a row for each change and for each layer that was left alone."""
        rows = [("step", "layer", "what became of it")]
        for step in self.steps:
            name = f"{step.method} to {step.mac_ratio:.4f} of the MACs"
            rows += [(name, edit.layer, edit.describe()) for edit in step.edits]
            rows += [(name, layer, f"left alone: {reason}") for layer, reason in step.left_alone.items()]
        return html_table(rows, caption="" if self.steps else "Nothing is changed.")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able values."""
        return {"format": FORMAT, "version": VERSION, "steps": [_step_to_dict(s) for s in self.steps]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CompressionPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PlanError: The value is not a plan, or one of another version.
        """
        if not isinstance(value, Mapping):
            raise PlanError(f"Not a compression plan: it is a {type(value).__name__}, not a mapping.")
        if value.get("format") != FORMAT:
            raise PlanError(f"Not a compression plan: its format is {value.get('format')!r}, not {FORMAT!r}.")
        if value.get("version") != VERSION:
            raise PlanError(
                f"The plan has version {value.get('version')!r}; this compress_search reads version "
                f"{VERSION}. Use the version of compress_search that wrote it."
            )
        try:
            return cls(tuple(_step_from_dict(step) for step in value["steps"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"The plan is damaged: {type(error).__name__}: {error}.") from error

    def save(self, path: Path | str) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        write_json_atomically(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> CompressionPlan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: The file is not a plan.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"Cannot read a plan from {str(path)!r}: {error}.") from error
        return cls.from_dict(value)


def apply_plan(model: nn.Module, plan: CompressionPlan) -> nn.Module:
    """Rebuild the compressed architecture from the original one.

    Args:
        model: The original architecture. It is not changed.
        plan: The plan.

    Returns:
        A new model. Pruned layers hold the kept part of ``model``'s weights; factorised layers hold
        PyTorch's initial weights until the saved ones are loaded.

    Raises:
        PlanError: The plan does not fit the model.
    """
    # What is replaced is never copied.
    compressed, part = copy_sharing_weights(model)
    for step in plan.steps:
        for edit in step.edits:
            edit.apply(compressed)
    part()
    return compressed


def _freeze_alike(new: nn.Module, old: nn.Module, weight: nn.Parameter) -> None:
    """Let what somebody froze in the layer stay frozen: its weight, and by itself its bias."""
    bias = getattr(old, "bias", None)
    like_bias = bias if isinstance(bias, nn.Parameter) else weight
    for name, parameter in new.named_parameters():
        like = like_bias if name.endswith(".bias") else weight
        parameter.requires_grad_(like.requires_grad)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise _misfit(f"changes {name!r}, which {type(model).__name__} does not have") from error


def _misfit(what: str) -> PlanError:
    return PlanError(f"The plan {what}. Apply the plan to the architecture it was made for.")


def _step_to_dict(step: PlanStep) -> dict[str, Any]:
    return {
        "method": step.method,
        "mac_ratio": step.mac_ratio,
        "edits": [_edit_to_dict(edit) for edit in step.edits],
        "left_alone": dict(step.left_alone),
    }


def _edit_to_dict(edit: Edit) -> dict[str, Any]:
    if isinstance(edit, FactoriseLayer):
        parts = [{"name": p.name, "type": p.type, "arguments": dict(p.arguments)} for p in edit.parts]
        return {"edit": "factorise", "layer": edit.layer, "rank": edit.rank, "parts": parts}
    return {
        "edit": "keep_channels",
        "layer": edit.layer,
        "inputs": None if edit.inputs is None else list(edit.inputs),
        "outputs": None if edit.outputs is None else list(edit.outputs),
    }


def _step_from_dict(value: Mapping[str, Any]) -> PlanStep:
    return PlanStep(
        method=value["method"],
        mac_ratio=value["mac_ratio"],
        edits=tuple(_edit_from_dict(edit) for edit in value["edits"]),
        left_alone=dict(value["left_alone"]),
    )


def _edit_from_dict(value: Mapping[str, Any]) -> Edit:
    if value["edit"] == "factorise":
        # JSON has no tuples: what was a tuple comes back as a list.
        parts = tuple(
            Part(
                part["name"],
                part["type"],
                {k: tuple(v) if isinstance(v, list) else v for k, v in part["arguments"].items()},
            )
            for part in value["parts"]
        )
        return FactoriseLayer(value["layer"], value["rank"], parts)
    if value["edit"] == "keep_channels":
        inputs, outputs = value["inputs"], value["outputs"]
        return KeepChannels(
            value["layer"],
            inputs=None if inputs is None else tuple(inputs),
            outputs=None if outputs is None else tuple(outputs),
        )
    raise PlanError(f"The plan has an unknown edit {value['edit']!r}.")
