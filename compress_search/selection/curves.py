"""The loss of a unit at every size, from the few sizes that the sensitivity table has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from compress_search.methods.cost import Cost, Integers
from compress_search.selection.table import SensitivityTable

Floats = npt.NDArray[np.float64]

_BELOW_THE_SMALLEST = 4.0
"""Below the smallest measured size the loss rises as this power of (that size / the size)."""
_TOWARDS_FULL = (1.0, 4.0)
"""Above the largest measured size the loss falls as (full - size) to a power within these limits."""

_RISE = 0.1
_RISE_OF_MUCH = 0.01


@dataclass(frozen=True)
class LossCurves:
    """The losses of all units at all sizes.

    Attributes:
        values: ``(units, largest size + 1)`` in the order of :attr:`compress_search.methods.cost.Cost.full`.
            Infinite at sizes that a unit may not take; 0 at the size 0, which leaves it as it is.
    """

    values: Floats

    def of_rows(self, rows: Integers) -> Floats:
        """The sum over the units ``(rows,)`` at the sizes ``(rows, units)``."""
        total: Floats = self.values[np.arange(len(self.values)), rows].sum(axis=1)
        return total

    def tolerable_rise(self, cost: Cost, sizes: Mapping[str, int], choices: Mapping[str, range]) -> float:
        """By how much the loss may rise so that sizes come within half a per cent of the budget.

        By a tenth of itself, or, where it is next to nothing, by a hundredth of what all units together lose
        in the middle of their sizes. It matters only where units are few, and none has a size that fits.
        """
        middle = {name: own[len(own) // 2] for name, own in choices.items()}
        loss, much = self.of_rows(np.stack([cost.row(sizes), cost.row(middle)]))
        return float(max(_RISE * loss, _RISE_OF_MUCH * much))


def loss_curves(table: SensitivityTable, full: Mapping[str, int], choices: Mapping[str, range]) -> LossCurves:
    """Make a curve for each unit; see :func:`curve`.

    Args:
        table: The measured losses. Values that are not finite count as not measured.
        full: The full size of each unit.
        choices: The sizes that each unit may take. Units that are missing, or of which the table has no
            loss, may only stay as they are.
    """
    measured = {unit: finite(table.losses(unit)) for unit in table.units}
    positive = [loss for losses in measured.values() for loss in losses.values() if loss > 0]
    # Losses of zero have no logarithm. A tenth of the smallest that was seen stands for them.
    floor = min(positive, default=1.0) / 10
    values = np.full((len(full), max(full.values(), default=0) + 1), np.inf)
    for place, (unit, full_size) in enumerate(full.items()):
        values[place, 0] = 0.0
        if measured.get(unit) and unit in choices:
            sizes = np.array(choices[unit])
            values[place, sizes] = curve(measured[unit], full_size, sizes, floor=floor)
    return LossCurves(values)


def curve(losses: Mapping[int, float], full: int, sizes: Integers, *, floor: float) -> Floats:
    """The loss at any sizes, ``(sizes,)``: it never rises with the size, and is 0 at the full one.

    Noise that makes the loss rise with the size is averaged out (isotonic regression on the loss itself, so
    that drops of a score that are zero or negative take part). Between measured sizes the loss follows a
    power of (full - size), as the error of both truncation and pruning nearly does; convex it need not be.
    Below the smallest measured size, where nothing is known, it rises with the fourth power, so that a unit
    goes there only when the ratio forces it to.

    Args:
        losses: Loss by size; at least one.
        full: The size at which nothing is lost.
        sizes: ``(sizes,)``, each in [1, full].
        floor: The smallest loss of a size that is not full; positive.
    """
    measured = {size: loss for size, loss in falling(losses).items() if size < full}
    values = np.zeros(len(sizes))
    below = sizes < full
    if not measured:
        return values
    known = np.array(list(measured))
    heights = np.log(np.maximum(list(measured.values()), floor))
    distances = np.log(full - known)
    position = np.log(full - sizes[below])
    # From the full size down, as np.interp wants its abscissae to rise.
    inside = np.interp(position, distances[::-1], heights[::-1])
    slope = (heights[-2] - heights[-1]) / (distances[-2] - distances[-1]) if len(known) > 1 else 2.0
    nearly_full = heights[-1] + np.clip(slope, *_TOWARDS_FULL) * (position - distances[-1])
    tiny = heights[0] + _BELOW_THE_SMALLEST * np.log(known[0] / sizes[below])
    above, under = sizes[below] > known[-1], sizes[below] < known[0]
    values[below] = np.exp(np.where(above, nearly_full, np.where(under, tiny, inside)))
    return values


def falling(losses: Mapping[int, float]) -> dict[int, float]:
    """The losses nearest to the measured ones, by least squares, that never rise with the size."""
    sizes = sorted(losses)
    fitted = isotonic_regression([losses[size] for size in sizes], increasing=False).x
    return dict(zip(sizes, fitted.tolist(), strict=True))


def finite(losses: Mapping[int, float]) -> dict[int, float]:
    """The losses that are numbers: a cell whose evaluation failed counts as not measured."""
    return {size: loss for size, loss in losses.items() if np.isfinite(loss)}
