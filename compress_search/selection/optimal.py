"""Optimal selection: the sizes of least predicted loss within the budget.

The loss of the whole is predicted as the sum of the units' losses (:mod:`compress_search.selection.curves`).
Where each unit costs for itself, which factorised layers do, this is a multiple-choice knapsack over all
sizes, solved by :mod:`compress_search.selection.knapsack`. Coupled channels cost by products: what one
group costs depends on what its neighbours keep. There the cost is taken as a sum around some sizes, the
knapsack moves as far from them as that is nearly true, and so on from where it got to; in the end, single
units move and pairs of them exchange steps at their exact cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compress_search.methods.cost import Cost, Integers
from compress_search.methods.method import Analysis
from compress_search.selection.choices import budget_within_reach, size_choices
from compress_search.selection.curves import Floats, LossCurves, loss_curves
from compress_search.selection.knapsack import pack
from compress_search.selection.remainder import spend_the_rest
from compress_search.selection.request import SelectionRequest
from compress_search.selection.table import SensitivityTable
from compress_search.selection.uniform import uniform_sizes

_GAP = 1e-3
"""By how much, relative, the loss may be above the least possible where units cost each for itself."""
_RADIUS = 1.0
"""By how much the logarithm of a size may change at first before the cost is looked at anew."""
_SMALLEST_RADIUS = 0.02
_MOST_ROUNDS = 60
_CORRECTIONS = 4
"""How often a step that turns out too dear is tried again with less to spend."""
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
"""By how many steps a unit moves in an exchange."""
_MOST_EXCHANGES = 200
_LOOKED_AT = 512
"""Exchanges whose exact cost is computed, the most promising first."""


@dataclass(frozen=True)
class Optimal:
    """The selector; see :class:`compress_search.selection.Selector`."""

    needs_table: bool = True

    def select(
        self, analysis: Analysis, request: SelectionRequest, table: SensitivityTable | None
    ) -> dict[str, int]:
        """Choose the sizes of least predicted loss, and spend all of the budget that single steps can.

        Units of which the table has no loss stay as they are.

        Raises:
            RatioError: The ratio cannot be reached; the smallest that can is named.
        """
        assert table is not None
        cost = analysis.cost(request.cost)
        allowed = size_choices(analysis, request)
        choices = {name: sizes for name, sizes in allowed.items() if name in table.units}
        budget = budget_within_reach(analysis, request, choices)
        curves = loss_curves(table, cost.full, choices)
        sizes = least_loss(cost, curves, choices, budget)
        rise = curves.tolerable_rise(cost, sizes, choices)
        return spend_the_rest(cost, sizes, budget, choices, regret=curves.of_rows, rise=rise)


def least_loss(cost: Cost, curves: LossCurves, choices: Mapping[str, range], budget: int) -> dict[str, int]:
    """Choose the sizes of least total loss within a budget.

    Where units cost each for itself the loss is above the least possible by at most a thousandth of itself.
    Coupled ones have no such bound; they never lose more than uniform ones.

    Args:
        cost: What the budget counts.
        curves: The losses.
        choices: The sizes that each unit may take, ascending.
        budget: The highest cost; the smallest sizes keep within it.
    """
    if cost.of({}) <= budget:
        return {}
    options = _Options.of(cost, choices, curves)
    if cost.is_separable:
        packed = _packed(cost, options, np.zeros(len(cost.full), np.int64), budget)
        assert packed is not None
        rows = [packed]
    else:
        uniform = cost.row(uniform_sizes(cost, choices, budget))
        smallest = cost.row({name: sizes[0] for name, sizes in choices.items()})
        rows = [_descended(cost, options, curves, start, budget) for start in (uniform, smallest)]
        rows.append(uniform)
    row = min(rows, key=lambda r: float(curves.of_rows(r[None])[0]))
    return {name: int(size) for name, size in zip(cost.full, row, strict=True) if size}


@dataclass(frozen=True)
class _Options:
    """All sizes of all units, ``(units, options)``, ascending, 0 (left as it is) last.

    Attributes:
        sizes: The sizes; padded with zeros.
        losses: Their losses; infinite where padded.
        logarithms: Of the sizes; of the full size where a unit is left as it is.
    """

    sizes: Integers
    losses: Floats
    logarithms: Floats

    @classmethod
    def of(cls, cost: Cost, choices: Mapping[str, range], curves: LossCurves) -> _Options:
        width = max(len(sizes) for sizes in choices.values()) + 1
        sizes = np.zeros((len(cost.full), width), dtype=np.int64)
        losses = np.full(sizes.shape, np.inf)
        logarithms = np.zeros(sizes.shape)
        for place, (name, full) in enumerate(cost.full.items()):
            own = [*choices.get(name, ()), 0]
            sizes[place, : len(own)] = own
            losses[place, : len(own)] = curves.values[place, own]
            logarithms[place, : len(own)] = np.log([*own[:-1], full])
        return cls(sizes, losses, logarithms)

    def position(self, row: Integers) -> Integers:
        """The number ``(units,)`` of the option that each unit takes."""
        taken: Integers = ((self.sizes == row[:, None]) & np.isfinite(self.losses)).argmax(axis=1)
        return taken


def _packed(
    cost: Cost, options: _Options, row: Integers, budget: int, *, radius: float = np.inf
) -> Integers | None:
    """The sizes of least loss near some, as if each unit's cost around these did not depend on the others.

    ``None`` if even the smallest sizes near cost more.
    """
    changes = np.stack([cost.changes(row, place, own) for place, own in enumerate(options.sizes)])
    at = options.position(row)
    every = np.arange(len(row))
    far = np.abs(options.logarithms - options.logarithms[every, at][:, None]) > radius
    # A single step is always near enough.
    far &= np.abs(np.arange(options.sizes.shape[1]) - at[:, None]) > 1
    losses = np.where(far, np.inf, options.losses)
    cheapest = np.where(np.isfinite(losses), changes, 0).min(axis=1)
    left = budget - int(cost.of_rows(row[None])[0]) - int(cheapest.sum())
    if left < 0:
        return None
    packing = pack(
        np.where(np.isfinite(losses), changes - cheapest[:, None], 0),
        losses,
        left,
        gap=_GAP,
        prove=cost.is_separable,
    )
    packed: Integers = options.sizes[every, packing.picked]
    return packed


def _descended(cost: Cost, options: _Options, curves: LossCurves, row: Integers, budget: int) -> Integers:
    """Lower the loss from some sizes within the budget, in steps that shrink when one does not help."""
    loss, radius = float(curves.of_rows(row[None])[0]), _RADIUS
    for _ in range(_MOST_ROUNDS):
        found = _step(cost, options, row, budget, radius)
        found_loss = np.inf if found is None else float(curves.of_rows(found[None])[0])
        if found is not None and found_loss < (1 - 1e-5) * loss:
            row, loss = found, found_loss
        elif radius < _SMALLEST_RADIUS:
            break
        else:
            radius /= 2
    return _exchanged(cost, options, row, budget)


def _step(cost: Cost, options: _Options, row: Integers, budget: int, radius: float) -> Integers | None:
    """Sizes near some that keep within the budget, at their exact cost too; ``None`` if none were found."""
    allowed = budget
    for _ in range(_CORRECTIONS):
        packed = _packed(cost, options, row, allowed, radius=radius)
        if packed is None:
            return None
        excess = int(cost.of_rows(packed[None])[0]) - budget
        if excess <= 0:
            return packed
        allowed -= excess
    return None


def _exchanged(cost: Cost, options: _Options, row: Integers, budget: int) -> Integers:
    """Move one unit, or two at once, as long as that lowers the loss within the budget."""
    every, width = np.arange(len(row)), options.sizes.shape[1]
    for _ in range(_MOST_EXCHANGES):
        at = options.position(row)
        steps = np.array([0, *_STEPS, *(-step for step in _STEPS)])
        place, number = (axis.ravel() for axis in np.broadcast_arrays(every[:, None], at[:, None] + steps))
        inside = (number >= 0) & (number < width)
        place, number = place[inside], number[inside]
        changes = np.concatenate(
            [cost.changes(row, p, options.sizes[p, number[place == p]]) for p in range(len(row))]
        )
        losses = options.losses[place, number] - options.losses[every, at][place]
        slack = budget - int(cost.of_rows(row[None])[0])
        better = _most_promising(place, changes, losses, slack)
        rows = np.tile(row, (len(better), 1))
        for picked in better.T:
            rows[np.arange(len(better)), place[picked]] = options.sizes[place[picked], number[picked]]
        fits = np.flatnonzero(cost.of_rows(rows) <= budget)
        if not len(fits):
            return row
        row = rows[fits[0]]
    return row


def _most_promising(place: Integers, changes: Integers, losses: Floats, slack: int) -> Integers:
    """Pairs of moves of different units, ``(pairs, 2)``, that lower the loss; the best first.

    Half of them cost too much unless it helps that the two units are neighbours: shrinking one makes growing
    the other cheaper, which the sum of the two changes does not show.
    """
    together = losses[:, None] + losses
    total = changes[:, None] + changes
    lower = (together < -1e-9 * np.abs(losses[np.isfinite(losses)]).max()) & (place[:, None] < place)
    found = []
    for fitting in (lower & (total <= slack), lower & (total > slack) & (total <= slack + np.abs(changes))):
        pairs = np.argwhere(fitting)
        found.append(pairs[np.argsort(together[fitting])[: _LOOKED_AT // 2]])
    every = np.concatenate(found)
    ordered: Integers = every[np.argsort(together[every[:, 0], every[:, 1]])]
    return ordered
