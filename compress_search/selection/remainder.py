"""Spending what a choice of sizes leaves of the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from compress_search.methods.cost import Cost, Integers

CLOSE = 0.005
"""How far below the budget is near enough, relative to it."""

_STEPS = (1, 2, 3, 4, 6)
"""By how many steps one unit shrinks, and another grows, in an exchange."""
_MOST_EXCHANGES = 20

Regret = Callable[[Integers], npt.NDArray[np.float64]]
"""From rows of sizes (see :meth:`Cost.of_rows`) to how much each is unwanted, ``(rows,)``."""


def spend_the_rest(
    cost: Cost,
    sizes: Mapping[str, int],
    budget: int,
    choices: Mapping[str, range],
    *,
    regret: Regret,
    rise: float,
) -> dict[str, int]:
    """Let units grow by single steps, as long as one fits into the budget.

    The step is taken that leaves the least regret. After its largest size a unit is left as it is. If single
    steps end further from the budget than :data:`CLOSE`, which happens where sizes are few, one unit shrinks
    so that another can grow more, as often as that comes closer at little regret.

    Args:
        cost: What the budget counts.
        sizes: Sizes to start from, within the budget; a unit that is not named stays as it is.
        budget: The highest cost.
        choices: The sizes that each unit may take, ascending.
        regret: How much sizes are unwanted.
        rise: By how much the regret may rise to come closer to the budget.

    Returns:
        The sizes; as near to the budget as was found, and never above it.
    """
    places = {name: place for place, name in enumerate(cost.full)}
    row = _grown(cost, cost.row(sizes), budget, choices, regret)
    limit = regret(row[None])[0] + rise
    for _ in range(_MOST_EXCHANGES):
        spent = cost.of_rows(row[None])[0]
        if spent >= (1 - CLOSE) * budget:
            break
        rows = _exchanges(row, places, choices)
        costs, regrets = cost.of_rows(rows), regret(rows)
        closer = (spent < costs) & (costs <= budget) & (regrets <= limit)
        if not closer.any():
            break
        near = closer & (costs >= (1 - CLOSE) * budget)
        row = rows[np.where(near, regrets, np.inf).argmin() if near.any() else (costs * closer).argmax()]
        row = _grown(cost, row, budget, choices, regret)
    return {name: int(row[place]) for name, place in places.items() if row[place]}


def _grown(cost: Cost, row: Integers, budget: int, choices: Mapping[str, range], regret: Regret) -> Integers:
    places = {name: place for place, name in enumerate(cost.full)}
    open_units = [name for name in choices if row[places[name]]]
    while open_units:
        rows = np.tile(row, (len(open_units), 1))
        for number, name in enumerate(open_units):
            rows[number, places[name]] = _moved(int(row[places[name]]), choices[name], 1) or 0
        number = int(np.argmin(regret(rows)))
        larger = cost.of_rows(rows[number][None])[0]
        if larger <= budget:
            row = rows[number]
        # What does not fit now will not fit later: other units only make it dearer.
        if larger > budget or not row[places[open_units[number]]]:
            del open_units[number]
    return row


def _moved(size: int, choices: range, steps: int) -> int | None:
    """The size some steps up or down; 0, to be left as it is, lies one step above the largest."""
    number = len(choices) if size == 0 else choices.index(size)
    if not 0 <= number + steps <= len(choices):
        return None
    return 0 if number + steps == len(choices) else choices[number + steps]


def _exchanges(row: Integers, places: Mapping[str, int], choices: Mapping[str, range]) -> Integers:
    """The rows ``(exchanges, units)`` in which one unit is smaller and another larger."""
    moves: dict[int, list[tuple[int, int]]] = {-1: [], 1: []}
    for name, sizes in choices.items():
        place = places[name]
        for direction, found in moves.items():
            reached = (_moved(int(row[place]), sizes, direction * steps) for steps in _STEPS)
            found += [(place, size) for size in reached if size is not None]
    down, up = (np.array(found, dtype=np.int64).reshape(-1, 2) for found in moves.values())
    pairs = np.argwhere(down[:, None, 0] != up[None, :, 0])
    rows = np.tile(row, (len(pairs), 1))
    number = np.arange(len(pairs))
    for moved, picked in ((down, pairs[:, 0]), (up, pairs[:, 1])):
        rows[number, moved[picked, 0]] = moved[picked, 1]
    return rows
