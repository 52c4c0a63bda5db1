"""What became of each layer: its rank or channels, its MACs before and after, or why it was left alone.

A factorised layer goes on under the names of its parts (``conv1`` as ``conv1.vertical`` and
``conv1.horizontal``), and a later method may cut the channels of those. Here they are one layer again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compress_search.exceptions import PlanError
from compress_search.plan import CompressionPlan, Edit, FactoriseLayer, KeepChannels, Part
from compress_search.profile import LayerProfile, ModelProfile
from compress_search.reports.formatting import technique


@dataclass(frozen=True)
class LayerRow:
    """One layer of the original model.

    Attributes:
        layer: Its name in the original model.
        kind: Its class name.
        done: What was done to it, for example ``"spatial SVD, rank 9; channels 32 -> 21 in"``; empty if
            nothing was.
        macs_before: MACs for one example in the original model.
        macs_after: MACs of what stands in its place.
        left_alone: Why a method did not touch it, or not all of it; empty if each did.
    """

    layer: str
    kind: str
    done: str
    macs_before: int
    macs_after: int
    left_alone: str

    @property
    def ratio(self) -> float:
        """MACs after / MACs before; 1 for a layer that does not run."""
        return self.macs_after / self.macs_before if self.macs_before else 1.0


@dataclass
class _Channels:
    """Channels of one module: what it began with, and what it has."""

    inputs: int
    outputs: int
    full_inputs: int = field(init=False)
    full_outputs: int = field(init=False)
    depthwise: bool = False

    def __post_init__(self) -> None:
        self.full_inputs, self.full_outputs = self.inputs, self.outputs

    def keep(self, edit: KeepChannels) -> None:
        if edit.outputs is not None:
            self.outputs = len(edit.outputs)
            # A depthwise convolution has one set of channels, which the edit names as outputs.
            self.inputs = len(edit.outputs) if self.depthwise else self.inputs
        if edit.inputs is not None:
            self.inputs = len(edit.inputs)


@dataclass
class _History:
    """One original layer on its way through the plan: the modules in its place, first to last."""

    modules: dict[str, _Channels]
    methods: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def replace(self, edit: FactoriseLayer, method: str) -> None:
        parts = {f"{edit.layer}.{part.name}": _channels_of_part(part) for part in edit.parts}
        modules: dict[str, _Channels] = {}
        for name, channels in self.modules.items():
            modules |= parts if name == edit.layer else {name: channels}
        first, last = next(iter(parts.values())), list(parts.values())[-1]
        # What an earlier step had cut off stays visible after the layer has been replaced.
        first.full_inputs = self.modules[edit.layer].full_inputs
        last.full_outputs = self.modules[edit.layer].full_outputs
        self.modules = modules
        # A pointwise kernel has no axes to separate: whatever the method's name, this is the weight SVD.
        name = "weight SVD of a 1x1 kernel" if all(map(_is_pointwise, edit.parts)) else technique(method)
        if name not in self.methods:
            self.methods.append(name)

    def describe(self) -> str:
        *inner, last = self.modules.values()
        first = next(iter(self.modules.values()))
        done = []
        if inner:
            ranks = ", ".join(_change(part.full_outputs, part.outputs) for part in inner)
            done.append(f"{' and '.join(self.methods)}, rank{'s' if len(inner) > 1 else ''} {ranks}")
        if last.depthwise and last.outputs != last.full_outputs:
            done.append(f"channels {_change(last.full_outputs, last.outputs)}")
        else:
            sides = [
                f"{_change(full, now)} {side}"
                for full, now, side in (
                    (first.full_inputs, first.inputs, "in"),
                    (last.full_outputs, last.outputs, "out"),
                )
                if full != now
            ]
            if sides:
                done.append("channels " + ", ".join(sides))
        return "; ".join(done)


def _is_pointwise(part: Part) -> bool:
    kernel = part.arguments.get("kernel_size", ())
    return kernel == 1 or (isinstance(kernel, tuple) and set(kernel) == {1})


def layer_table(plan: CompressionPlan, before: ModelProfile, after: ModelProfile) -> tuple[LayerRow, ...]:
    """Say for each layer of the original model what the plan did to it and what that saved.

    Args:
        plan: The plan that leads from the original to the compressed model.
        before: Profile of the original model.
        after: Profile of the compressed model.

    Returns:
        One row a counted layer of the original, in the order of their first call; then those that do not
        run, such as an auxiliary head's.

    Raises:
        PlanError: The plan and the profiles are not of the same model.
    """
    histories = {layer.name: _History({layer.name: _channels_of_layer(layer)}) for layer in before.layers}
    idle: dict[str, list[str]] = {layer.name: [] for layer in before.idle}
    for step in plan.steps:
        for edit in step.edits:
            _follow(edit, step.method, histories)
        _note_reasons(step.left_alone, step.method, histories)
        for name in idle.keys() & step.left_alone.keys():
            idle[name].append(f"{technique(step.method)}: {step.left_alone[name]}")
    cut = {edit.layer for step in plan.steps for edit in step.edits}
    macs = {layer.name: layer.macs for layer in after.layers}
    rows = []
    for layer in before.layers:
        history = histories[layer.name]
        missing = [name for name in history.modules if name not in macs]
        if missing:
            raise PlanError(
                f"After the plan there should be a layer {missing[0]!r}, which the profile of the compressed "
                "model does not have. Give the profile of the model that this plan built."
            )
        rows.append(
            LayerRow(
                layer=layer.name,
                kind=layer.kind,
                done=history.describe(),
                macs_before=layer.macs,
                macs_after=sum(macs[name] for name in history.modules),
                left_alone="; ".join(history.reasons),
            )
        )
    for layer in before.idle:
        done = "channels cut along" if layer.name in cut else ""
        reasons = "; ".join(idle[layer.name])
        rows.append(LayerRow(layer.name, layer.kind, done, macs_before=0, macs_after=0, left_alone=reasons))
    return tuple(rows)


def _follow(edit: Edit, method: str, histories: Mapping[str, _History]) -> None:
    history = _history_of(edit.layer, histories)
    if history is None:
        if isinstance(edit, FactoriseLayer):
            raise PlanError(
                f"The plan factorises {edit.layer!r}, which the profile of the original model does not have. "
                "Give the profile of the model that this plan was made for."
            )
        # Batch normalisation and its like lose channels too, but have no MACs and no row.
        return
    if isinstance(edit, FactoriseLayer):
        history.replace(edit, method)
    else:
        history.modules[edit.layer].keep(edit)


def _note_reasons(left_alone: Mapping[str, str], method: str, histories: Mapping[str, _History]) -> None:
    for name, reason in left_alone.items():
        history = _history_of(name, histories)
        note = f"{technique(method)}: {reason}"
        # Both parts of a factorised layer often have the same reason.
        if history is not None and note not in history.reasons:
            history.reasons.append(note)


def _history_of(module: str, histories: Mapping[str, _History]) -> _History | None:
    return next((history for history in histories.values() if module in history.modules), None)


def _channels_of_layer(layer: LayerProfile) -> _Channels:
    (before, after), weight = layer.calls[0], layer.weight_shape
    axis = -1 if len(weight) == 2 else 1
    inputs, outputs = before[axis], after[axis]
    return _Channels(inputs, outputs, depthwise=axis == 1 and weight[1] == 1 and 1 < inputs == outputs)


def _channels_of_part(part: Part) -> _Channels:
    unit = "features" if part.type == "Linear" else "channels"
    return _Channels(part.arguments[f"in_{unit}"], part.arguments[f"out_{unit}"])


def _change(full: int, now: int) -> str:
    return str(now) if full == now else f"{full} -> {now}"


def total_row(rows: Sequence[LayerRow]) -> LayerRow:
    """Add up the MACs of all rows."""
    return LayerRow(
        layer="all layers",
        kind="",
        done="",
        macs_before=sum(row.macs_before for row in rows),
        macs_after=sum(row.macs_after for row in rows),
        left_alone="",
    )
