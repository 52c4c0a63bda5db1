"""How numbers are written in reports, so that a figure and a table say the same thing in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class AccuracyScale:
    """How accuracies are shown.

    ``Task.evaluate`` may return any number. Shares in [0, 1] are shown in per cent, anything else as it is.

    Attributes:
        factor: What an accuracy is multiplied by.
        unit: What then stands behind it.
    """

    factor: float
    unit: str

    @classmethod
    def of(cls, accuracies: Iterable[float]) -> AccuracyScale:
        """Choose the scale that suits all of ``accuracies``."""
        if all(0 <= value <= 1 for value in accuracies):
            return cls(100.0, " %")
        return cls(1.0, "")

    @property
    def axis_title(self) -> str:
        """What an axis of accuracies is called."""
        return f"validation accuracy{' (%)' if self.unit else ' (as evaluate returns it)'}"

    def accuracy(self, value: float | None) -> str:
        """Write an accuracy, for example ``"98.31 %"``."""
        return "" if value is None else f"{self.factor * value:.2f}{self.unit}"

    def drop(self, value: float | None) -> str:
        """Write a difference of two accuracies, for example ``"+0.28 points"``."""
        return "" if value is None else f"{self.factor * value:+.2f}{' points' if self.unit else ''}"


def ratio(value: float | None) -> str:
    """Write a MAC ratio with four decimals."""
    return "" if value is None else f"{value:.4f}"


def count(value: int | None) -> str:
    """Write a whole number with its thousands apart, for example ``"1,234,567"``."""
    return "" if value is None else f"{value:,}"


def short_count(value: int) -> str:
    """Write a count with three digits and a prefix, for example ``"1.23 M"``."""
    for size, prefix in _PREFIXES:
        # 999,500 is a million when it is rounded to three digits.
        if value >= 0.9995 * size:
            return f"{_three_digits(value / size)} {prefix}"
    return str(value)


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours, for example ``"4 min 05 s"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def technique(method: str) -> str:
    """Write a method's name for people, for example ``"spatial SVD"``."""
    return method.replace("_", " ").replace("svd", "SVD")


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
