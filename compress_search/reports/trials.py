"""The trials as tables: one row a trial, and the time that each kind of stage took and saved."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compress_search.results import Candidate, ParetoFront, StageResult, param_names


@dataclass(frozen=True)
class StageTime:
    """What one kind of stage cost in all trials.

    Attributes:
        name: For example ``"fine_tune after spatial_svd"``.
        computed: How often it was computed.
        seconds: Wall time of those, in all.
        reused: How often a trial found it in the workspace.
        saved: Wall time that computing it again would have taken, in seconds.
    """

    name: str
    computed: int
    seconds: float
    reused: int
    saved: float


def stage_times(trials: Iterable[Sequence[StageResult]]) -> tuple[StageTime, ...]:
    """Add up the time of all trials' finished stages.

    Args:
        trials: The finished stages of each trial, unfinished trials included.

    Returns:
        One row for each kind of stage, in the order in which trials have them.
    """
    kinds: dict[str, list[StageResult]] = {}
    sequences = set()
    for stages in trials:
        names = tuple(stage_names(stages))
        sequences.add(names)
        for name, stage in zip(names, stages, strict=True):
            kinds.setdefault(name, []).append(stage)
    return tuple(
        StageTime(
            name=name,
            computed=sum(not stage.reused for stage in results),
            seconds=sum(stage.seconds for stage in results if not stage.reused),
            reused=sum(stage.reused for stage in results),
            saved=sum(stage.seconds for stage in results if stage.reused),
        )
        for name in stage_order(sequences)
        for results in (kinds[name],)
    )


def stage_order(sequences: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Put the names of all trials' stages into one order, although some trials leave stages out.

    Args:
        sequences: The names of each trial's stages.
    """
    order: list[str] = []
    # The longest first: the place of a stage is known best from those that leave the least out.
    for names in sorted(sequences, key=lambda names: (-len(names), tuple(names))):
        place = 0
        for name in names:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    return tuple(order)


def stage_names(stages: Sequence[StageResult]) -> Iterator[str]:
    """Name stages so that the fine-tunings of a trial are told apart: by what came before."""
    before = ""
    for stage in stages:
        yield f"fine_tune after {before}" if stage.name == "fine_tune" and before else stage.name
        before = stage.name


def candidates_csv(front: ParetoFront) -> str:
    """Write every trial as one row of CSV, in full precision.

    Accuracies and drops are as ``Task.evaluate`` gives them, ratios in (0, 1], times in seconds. What a
    trial does not have is empty.
    """
    best = {candidate.number for candidate in front.best}
    rows = [_csv_row(candidate, on_front=candidate.number in best) for candidate in front.candidates]
    params = [f"param_{name}" for name in param_names(front.candidates)]
    stages = max((len(candidate.stages) for candidate in front.candidates), default=0)
    columns = [
        *("number", "finalist_of", "state", "feasible", "on_front"),
        *params,
        *("mac_ratio", "accuracy", "drop", "macs", "params", "seconds"),
        *(f"stage_{n}_{what}" for n in range(1, stages + 1) for what in _STAGE_COLUMNS),
        "reason",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_STAGE_COLUMNS = ("name", "accuracy", "mac_ratio", "seconds", "reused", "key")


def _csv_row(candidate: Candidate, *, on_front: bool) -> dict[str, Any]:
    finished = candidate.stages[-1] if candidate.stages and candidate.state == "complete" else None
    row = {
        "number": candidate.number,
        "finalist_of": candidate.finalist_of,
        "state": candidate.state,
        "feasible": candidate.feasible,
        "on_front": on_front,
        **{f"param_{name}": value for name, value in candidate.params.items()},
        "mac_ratio": candidate.mac_ratio,
        "accuracy": candidate.accuracy,
        "drop": candidate.drop,
        "macs": finished and finished.macs,
        "params": finished and finished.params,
        "seconds": candidate.seconds,
        "reason": candidate.reason,
    }
    for number, stage in enumerate(candidate.stages, start=1):
        row |= {f"stage_{number}_{what}": getattr(stage, what) for what in _STAGE_COLUMNS}
    return row
