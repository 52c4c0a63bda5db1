from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_search.results import Candidate, ParetoFront, Reference, StageResult

REFERENCE = Reference(accuracy=0.98, macs=1_000_000, params=50_000)


def _candidate(
    number: int,
    mac_ratio: float,
    accuracy: float,
    *,
    state: str = "complete",
    reason: str | None = None,
    reused: int = 0,
    **changes: Any,
) -> Candidate:
    """A trial of four stages, of which the first ``reused`` were found in the workspace."""
    stages = tuple(
        StageResult(
            key=f"key-{number}-{position}",
            name=name,
            accuracy=accuracy - 0.01 * (3 - position),
            macs=round(mac_ratio * REFERENCE.macs),
            params=round(mac_ratio * REFERENCE.params),
            mac_ratio=mac_ratio,
            seconds=10.0 + position,
            reused=position < reused,
        )
        for position, name in enumerate(("spatial_svd", "fine_tune", "channel_pruning", "fine_tune"))
    )
    complete = state == "complete"
    values: dict[str, Any] = {
        "number": number,
        "state": state,
        "params": {"c_ssvd": 0.75, "c_cp": mac_ratio / 0.75},
        "stages": stages if complete else stages[:1],
        "accuracy": accuracy if complete else None,
        "mac_ratio": mac_ratio if complete else None,
        "drop": REFERENCE.accuracy - accuracy if complete else None,
        "feasible": complete and 0.49 <= mac_ratio <= 0.51,
        "seconds": 42.5,
        "reason": reason,
        "folder": Path("runs/stages") / stages[-1].key if complete else None,
    }
    return Candidate(**values | changes)


@pytest.fixture
def make_candidate() -> Callable[..., Candidate]:
    return _candidate


@pytest.fixture
def make_front() -> Callable[..., ParetoFront]:
    def make(*candidates: Candidate, reference: Reference = REFERENCE) -> ParetoFront:
        return ParetoFront(candidates, reference, target=0.5, tolerance=0.02)

    return make


@pytest.fixture
def many_trials() -> Callable[[int], ParetoFront]:
    """Make a study of so many trials of all kinds, from values alone."""

    def make(number: int) -> ParetoFront:
        draw = random.Random(0)
        candidates = []
        for n in range(number):
            state = ("complete",) * 8 + ("pruned", "failed")
            ratio, accuracy = draw.uniform(0.48, 0.52), draw.uniform(0.9, 0.98)
            kind = state[n % len(state)]
            reason = None if kind == "complete" else f"trial {n} went wrong, as a sentence says here"
            candidates.append(_candidate(n, ratio, accuracy, state=kind, reason=reason, reused=n % 3))
        return ParetoFront(tuple(candidates), REFERENCE, target=0.5, tolerance=0.02)

    return make
