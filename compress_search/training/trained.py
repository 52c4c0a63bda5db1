"""What came of a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trained:
    """What a training left beside the weights.

    Attributes:
        accuracy: What ``Task.score`` says of the weights that were kept.
        learning_curve: What it said before the first epoch and after each one; empty where a training
            function of the user's own does not tell.
        teacher_seconds_saved: Time that asking the teacher would have taken where its outputs were known.
    """

    accuracy: float
    learning_curve: tuple[float, ...] = ()
    teacher_seconds_saved: float = 0.0
