"""How accuracies are written for people, everywhere in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
