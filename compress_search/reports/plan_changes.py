"""What a plan did to each module, read from the plan alone: no model is needed, and no MACs are known."""

from __future__ import annotations

from dataclasses import dataclass, field

from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, PlanStep
from compress_search.reports.formatting import technique


@dataclass
class ModuleChange:
    """One module of the original model that a plan names.

    Attributes:
        module: Its name there.
        done: What was done to it, in order: ``["spatial SVD, rank 9", "21 channels in"]``.
        left_alone: Why a method did not touch it, or not all of it.
    """

    module: str
    done: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)


def plan_changes(plan: CompressionPlan) -> tuple[ModuleChange, ...]:
    """Say what a plan did to each module, or why it left it alone, in the order in which it names them.

    The parts of a factorised layer are that layer still.
    """
    changes: dict[str, ModuleChange] = {}
    parts: dict[str, tuple[str, bool, bool]] = {}
    for step in plan.steps:
        for edit in step.edits:
            if isinstance(edit, FactoriseLayer):
                layer = parts.get(edit.layer, (edit.layer,))[0]
                _change(changes, layer).done.append(f"{technique(step.method)}, rank {edit.rank}")
                for place, part in enumerate(edit.parts):
                    ends = (place == 0, place == len(edit.parts) - 1)
                    parts[f"{edit.layer}.{part.name}"] = (layer, *ends)
            else:
                layer, first, last = parts.get(edit.layer, (edit.layer, True, True))
                _change(changes, layer).done.extend(_kept(edit, first=first, last=last))
        _note_reasons(step, parts, changes)
    return tuple(changes.values())


def _change(changes: dict[str, ModuleChange], module: str) -> ModuleChange:
    return changes.setdefault(module, ModuleChange(module))


def _kept(edit: KeepChannels, *, first: bool, last: bool) -> list[str]:
    kept = []
    if edit.inputs is not None and first:
        kept.append(f"{len(edit.inputs)} channels in")
    if edit.outputs is not None:
        kept.append(f"{len(edit.outputs)} channels out" if last else f"rank {len(edit.outputs)}")
    return kept


def _note_reasons(
    step: PlanStep, parts: dict[str, tuple[str, bool, bool]], changes: dict[str, ModuleChange]
) -> None:
    for name, reason in step.left_alone.items():
        notes = _change(changes, parts.get(name, (name,))[0]).left_alone
        note = f"{technique(step.method)}: {reason}"
        # Both parts of a factorised layer often have the same reason.
        if note not in notes:
            notes.append(note)
