"""Schedules: the learning rate of every step, as a part of the highest one.

Each is a function of the step alone, so that training can go on at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from compress_search.recipe import FineTune

Schedule = Callable[[int, int, FineTune], float]
"""The factor of a step, from 0, of so many steps; in (0, 1]."""

_FIRST, _LAST = 1 / 25, 1 / 25e4
"""Where a one-cycle schedule begins and ends, as a part of its peak; the usual ones, also PyTorch's."""


def cosine(step: int, steps: int, settings: FineTune) -> float:
    """A linear rise, then half a cosine down (Loshchilov & Hutter 2017, equation 5, without restarts).

    With ``w = round(warmup * steps)``, the factor is ``(step + 1) / (w + 1)`` in the first ``w`` steps, then
    ``(1 + cos(pi * (step - w) / (steps - w))) / 2``. It is 1 at step ``w`` and nowhere 0.
    """
    rising = _rising(steps, settings)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def one_cycle(step: int, steps: int, settings: FineTune) -> float:
    """Half a cosine up from a low rate, then half a cosine down to nearly nothing (Smith & Topin 2018)."""
    rising = _rising(steps, settings)
    if step < rising:
        return _between(_FIRST, 1.0, step / rising)
    return _between(1.0, _LAST, (step - rising) / max(steps - 1 - rising, 1))


def multi_step(step: int, steps: int, settings: FineTune) -> float:
    """A linear rise, then a constant rate that is multiplied by ``gamma`` at each milestone."""
    rising = _rising(steps, settings)
    if step < rising:
        return (step + 1) / (rising + 1)
    # 0.28 of 25 steps are 7.000000000000001 as floats.
    passed = sum(step >= share * steps - 1e-9 for share in settings.milestones)
    return float(settings.gamma**passed)


SCHEDULES: Mapping[str, Schedule] = {"cosine": cosine, "one_cycle": one_cycle, "multi_step": multi_step}


def learning_rate_factor(step: int, steps: int, settings: FineTune) -> float:
    """The learning rate of one step, as a part of the highest one.

    Args:
        step: Number of the step, from 0.
        steps: Number of all steps.
        settings: Names the schedule.

    Returns:
        A number in (0, 1].
    """
    return SCHEDULES[settings.schedule](step, steps, settings)


def _rising(steps: int, settings: FineTune) -> int:
    return min(round(settings.warmup * steps), steps - 1)


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
