"""Uniform selection: every unit keeps the same share, so that the whole meets the target ratio."""

from __future__ import annotations

from compress_search.exceptions import RatioError
from compress_search.methods.method import Analysis, Unit

_BISECTIONS = 40
_MOST_NAMED = 8


def select_uniform(analysis: Analysis, mac_ratio: float, *, round_to: int = 1) -> dict[str, int]:
    """Choose sizes so that the model keeps ``mac_ratio`` of its MACs, at most and as nearly as sizes permit.

    The common share is found by bisection. What rounding left over is then given back one step at a time,
    to the unit that lost most of its full size first.

    Args:
        analysis: A method's view of the model.
        mac_ratio: MACs to keep / MACs of the model, in (0, 1].
        round_to: Ranks and channels are multiples of this. Units that are too small for it stay as they are.

    Returns:
        Size by unit name; a unit that is not named stays as it is.

    Raises:
        RatioError: Even the smallest sizes keep more; the smallest reachable ratio is named.
    """
    budget = mac_ratio * analysis.profile.macs
    if budget >= analysis.profile.macs:
        return {}
    low, high = 0.0, 1.0
    sizes = _sizes_at(analysis, low, round_to)
    least = analysis.predict_macs(sizes)
    if least > budget:
        raise RatioError(
            f"A mac_ratio of {mac_ratio:.4f} cannot be reached: the smallest reachable is "
            f"{least / analysis.profile.macs:.4f}. Ask for more, or lift what holds it up: "
            f"{_holding_up(analysis)}."
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        candidate = _sizes_at(analysis, middle, round_to)
        if analysis.predict_macs(candidate) <= budget:
            low, sizes = middle, candidate
        else:
            high = middle
    return _spend_the_rest(analysis, sizes, budget, round_to)


def _sizes_at(analysis: Analysis, share: float, round_to: int) -> dict[str, int]:
    sizes = {}
    for unit in analysis.units:
        step = unit.step(round_to)
        size = analysis.size_at(unit, max(share, 1e-9))
        if size is not None and step <= _largest(analysis, unit):
            sizes[unit.name] = max(size // step * step, step)
    return sizes


def _spend_the_rest(
    analysis: Analysis, sizes: dict[str, int], budget: float, round_to: int
) -> dict[str, int]:
    open_units: list[Unit] = [unit for unit in analysis.units if unit.name in sizes]
    while open_units:
        unit = min(open_units, key=lambda u: sizes[u.name] / u.full_size)
        larger = sizes | {unit.name: sizes[unit.name] + unit.step(round_to)}
        useful = larger[unit.name] <= _largest(analysis, unit)
        if useful and analysis.predict_macs(larger) <= budget:
            sizes = larger
        else:
            open_units.remove(unit)
    return sizes


def _largest(analysis: Analysis, unit: Unit) -> int:
    """The largest size that is not dearer than leaving the unit as it is."""
    return analysis.size_at(unit, 1.0) or 0


def _holding_up(analysis: Analysis) -> str:
    """Name the layers that were left alone, the dearest first, each with its share and reason."""
    layers = [analysis.profile.layer(name) for name in analysis.left_alone]
    layers.sort(key=lambda layer: -layer.macs)
    total = analysis.profile.macs
    named = [
        f"{layer.name} ({layer.macs / total:.1%} of the MACs; {analysis.left_alone[layer.name]})"
        for layer in layers[:_MOST_NAMED]
    ]
    more = len(layers) - len(named)
    return (", ".join(named) or "nothing was left alone") + (f" and {more} more" if more > 0 else "")
