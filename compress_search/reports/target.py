"""The target of a study for people: one ratio, or a range of them."""

from __future__ import annotations

Interval = tuple[float, float]
"""Lowest and highest value."""


def target_ends(target: float | Interval) -> Interval:
    """Return the lowest and the highest ``mac_ratio`` that is wanted; a single one is both."""
    return target if isinstance(target, tuple) else (target, target)


def target_text(target: float | Interval) -> str:
    """Write a target for people: ``"0.5"``, or ``"0.3 to 0.8"``."""
    low, high = target_ends(target)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
