"""Uniform selection: every unit keeps the same share, so that the whole meets the target ratio."""

from __future__ import annotations

from compress_search.exceptions import RatioError
from compress_search.methods.method import Analysis, Unit

_BISECTIONS = 40


def select_uniform(analysis: Analysis, mac_ratio: float) -> dict[str, int]:
    """Choose sizes so that the model keeps ``mac_ratio`` of its MACs, at most and as nearly as sizes permit.

    The common share is found by bisection. What rounding left over is then given back one size at a
    time, to the unit that lost most of its full size first.

    Args:
        analysis: A method's view of the model.
        mac_ratio: MACs to keep / MACs of the model, in (0, 1].

    Returns:
        Size by unit name; a unit that is not named stays as it is.

    Raises:
        RatioError: Even the smallest sizes keep more; the smallest reachable ratio is named.
    """
    budget = mac_ratio * analysis.profile.macs
    if budget >= analysis.profile.macs:
        return {}
    low, high = 0.0, 1.0
    sizes = _sizes_at(analysis, low)
    least = analysis.predict_macs(sizes)
    if least > budget:
        untouched = ", ".join(analysis.left_alone) or "none"
        raise RatioError(
            f"A mac_ratio of {mac_ratio:.4f} cannot be reached: the smallest reachable is "
            f"{least / analysis.profile.macs:.4f}. Ask for more; layers that were left alone: {untouched}."
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        candidate = _sizes_at(analysis, middle)
        if analysis.predict_macs(candidate) <= budget:
            low, sizes = middle, candidate
        else:
            high = middle
    return _spend_the_rest(analysis, sizes, budget)


def _sizes_at(analysis: Analysis, share: float) -> dict[str, int]:
    sizes = {unit.name: analysis.size_at(unit, max(share, 1e-9)) for unit in analysis.units}
    return {name: size for name, size in sizes.items() if size is not None}


def _spend_the_rest(analysis: Analysis, sizes: dict[str, int], budget: float) -> dict[str, int]:
    open_units: list[Unit] = [unit for unit in analysis.units if unit.name in sizes]
    while open_units:
        unit = min(open_units, key=lambda u: sizes[u.name] / u.full_size)
        larger = sizes | {unit.name: sizes[unit.name] + 1}
        useful = larger[unit.name] <= (analysis.size_at(unit, 1.0) or 0)
        if useful and analysis.predict_macs(larger) <= budget:
            sizes = larger
        else:
            open_units.remove(unit)
    return sizes
