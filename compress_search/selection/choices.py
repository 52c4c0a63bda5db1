"""The sizes that each unit may take, and the ratios that they can reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compress_search.exceptions import RatioError
from compress_search.methods.cost import Cost
from compress_search.methods.method import Analysis, Unit
from compress_search.profile import LayerProfile
from compress_search.selection.request import SelectionRequest

_MOST_NAMED = 8
_NOTHING = 0.0005
"""A share that is written as 0.0 %: it holds nothing up."""


def size_choices(analysis: Analysis, request: SelectionRequest) -> dict[str, range]:
    """The sizes that each unit may take, ascending; beside them it may stay as it is.

    Units that have no such size (they are too small for ``round_to``, or ``least_share`` leaves nothing to
    remove) are missing.
    """
    cost = analysis.cost(request.cost)
    found = {unit.name: _sizes_of(unit, cost, request) for unit in analysis.units}
    return {name: sizes for name, sizes in found.items() if sizes}


def budget_within_reach(
    analysis: Analysis,
    request: SelectionRequest,
    choices: Mapping[str, range],
    *,
    fixed: Mapping[str, int] | None = None,
) -> int:
    """The highest cost that the request allows.

    Args:
        analysis: A method's view of the model.
        request: What is asked.
        choices: The sizes of the units that are to be sized.
        fixed: Sizes of other units.

    Raises:
        RatioError: Even the smallest sizes cost more. The least reachable ratio is named, and what holds it
            up: ignored layers to lift, settings, and layers that the method cannot compress.
    """
    cost = analysis.cost(request.cost)
    total = cost.of({})
    budget = int(request.ratio * total)
    least = _least(cost, choices, fixed or {})
    if least <= budget:
        return budget
    held_up = _holding_up(analysis, request.cost, total)
    remedy = f"Ask for more{_settings_to_lift(analysis, request, least)}" + (
        f", or lift what holds it up: {held_up}" if held_up else ""
    )
    raise RatioError(
        f"A ratio of {request.ratio:.4f} of the {_NAMES[request.cost]} cannot be reached: the smallest "
        f"reachable is {in_words(least / total)}. {remedy}."
    )


def in_words(ratio: float) -> str:
    """A ratio for an error message, rounded up: who asks for it gets it."""
    return f"{math.ceil(ratio * 1e4) / 1e4:.4f}"


_NAMES = {"macs": "MACs", "params": "parameters"}


def _sizes_of(unit: Unit, cost: Cost, request: SelectionRequest) -> range:
    step = unit.step(request.round_to)
    least = max(_least_size(unit, cost, request.least_share), unit.least)
    most = cost.size_at(unit.name, 1.0) or 0
    return range(-(-least // step) * step, most + 1, step)


def _least_size(unit: Unit, cost: Cost, share: float) -> int:
    """The smallest size at which a unit keeps at least ``share`` of what it costs, and at least 1."""
    most = cost.size_at(unit.name, 1.0) or 0
    size = cost.size_at(unit.name, share) or 0
    kept = size * cost.rates[unit.name] / cost.dense[unit.name] if unit.name in cost.dense else size / most
    return min(size + (kept < share), unit.full_size) if size else 1


def size_of_share(cost: Cost, unit: str, share: float, sizes: range) -> int:
    """The largest allowed size at which a unit keeps at most a share of what it costs; else the smallest."""
    size = cost.size_at(unit, share) or 0
    return min(max(size - size % sizes.step, sizes[0]), sizes[-1])


def _least(cost: Cost, choices: Mapping[str, range], fixed: Mapping[str, int]) -> int:
    return cost.of({name: sizes[0] for name, sizes in choices.items()} | dict(fixed))


def _settings_to_lift(analysis: Analysis, request: SelectionRequest, least: int) -> str:
    """Say how low the ratio gets without the settings that keep sizes large."""
    cost = analysis.cost(request.cost)
    settings = [
        text
        for text, is_set in (
            (f"round_to={request.round_to}", request.round_to > 1),
            (f"least_share={request.least_share:g}", request.least_share > 0),
        )
        if is_set
    ]
    unbound = size_choices(analysis, SelectionRequest(ratio=request.ratio, cost=request.cost))
    freely = _least(cost, unbound, {})
    if not settings or freely >= least:
        return ""
    return f", go without {' and '.join(settings)} (the smallest is {in_words(freely / cost.of({}))} then)"


def _holding_up(analysis: Analysis, kind: str, total: int) -> str:
    """Name the layers that were left alone, those asked for first, the dearest first, with their shares.

    Empty if none of them has a share to speak of.
    """

    def share(layer: LayerProfile) -> float:
        return (layer.macs if kind == "macs" else layer.params) / total

    def described(layers: Sequence[LayerProfile]) -> str:
        named = [
            f"{layer.name} ({share(layer):.1%} of the {_NAMES[kind]}; {analysis.left_alone[layer.name]})"
            for layer in sorted(layers, key=share, reverse=True)[:_MOST_NAMED]
        ]
        more = f" and {len(layers) - len(named)} more" if len(layers) > len(named) else ""
        return ", ".join(named) + more

    left_alone = [layer for layer in analysis.profile.layers if layer.name in analysis.left_alone]
    layers = [layer for layer in left_alone if share(layer) > _NOTHING]
    asked = [layer for layer in layers if analysis.left_alone[layer.name].startswith("you asked")]
    others = [layer for layer in layers if layer not in asked]
    outside = analysis.profile.params - sum(layer.params for layer in analysis.profile.layers)
    elsewhere = (
        f"{outside / total:.1%} of the parameters, which no convolution or linear layer that runs has"
        if kind == "params" and outside > _NOTHING * total
        else ""
    )
    kept = ", ".join(
        f"{unit.name} (you asked to keep channels in {unit.least} of its {unit.full_size} blocks)"
        for unit in analysis.units
        if unit.least > 1
    )
    parts = filter(None, (described(asked), kept, described(others), elsewhere))
    return "; and ".join(parts)
