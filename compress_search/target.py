"""What a study aims at: one ``mac_ratio``, or a range of them; and the band of what is near enough."""

from __future__ import annotations

Target = float | tuple[float, float]
"""The wanted ``mac_ratio``, or the lowest and the highest of a range."""

Interval = tuple[float, float]
"""Lowest and highest value."""

TARGET, SPLIT = "target", "split"
"""The two variables of a search whose target is a range, see :mod:`compress_search.search.space`."""


def target_ends(target: Target) -> Interval:
    """Return the lowest and the highest wanted ``mac_ratio``; a single one is both."""
    return target if isinstance(target, tuple) else (target, target)


def band_of(target: Target, tolerance: float) -> Interval:
    """Return the lowest and the highest feasible ``mac_ratio``.

    Args:
        target: What is wanted.
        tolerance: How far a candidate may be from it, relative to it; beyond a range's ends, to these.
    """
    low, high = target_ends(target)
    return low * (1 - tolerance), high * (1 + tolerance)


def excess(mac_ratio: float, target: Target, tolerance: float) -> float:
    """Return how far a ratio lies outside the band, relative to the nearer end; not above 0 within it."""
    low, high = target_ends(target)
    return max(low - mac_ratio, 0.0) / low + max(mac_ratio - high, 0.0) / high - tolerance


def target_text(target: Target) -> str:
    """Write a target for people: ``"0.5"``, or ``"0.3 to 0.8"``."""
    return " to ".join(f"{end:.4g}" for end in dict.fromkeys(target_ends(target)))
