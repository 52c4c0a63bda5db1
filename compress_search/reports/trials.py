"""The stages of all trials: their names and order, the time each kind took and saved, what was achieved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from compress_search.methods import METHODS
from compress_search.results import StageResult


@dataclass(frozen=True)
class StageTime:
    """What one kind of stage cost in all trials.

    Attributes:
        name: For example ``"fine_tune after spatial_svd"``.
        computed: How often it was computed.
        seconds: Wall time of those, in all.
        reused: How often a trial found it in the workspace.
        saved: Wall time that computing it again would have taken, in seconds.
        teacher_saved: Further seconds that those computed would have taken if what the original says of the
            training batches had not been known.
    """

    name: str
    computed: int
    seconds: float
    reused: int
    saved: float
    teacher_saved: float = 0.0


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
            teacher_saved=sum(stage.teacher_seconds_saved for stage in results if not stage.reused),
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


def achieved_ratios(stages: Iterable[StageResult]) -> dict[str, float]:
    """MACs after / MACs before each method's stage, by the name of its ratio, in the order of the stages."""
    achieved: dict[str, float] = {}
    before = 1.0
    for stage in stages:
        if stage.name in METHODS:
            achieved[METHODS[stage.name].ratio_name] = stage.mac_ratio / before
            before = stage.mac_ratio
    return achieved
