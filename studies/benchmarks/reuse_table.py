"""The tables of a study against separate pipelines: the whole, stage kind by stage kind, trial by trial."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress_search.results import StageResult

WANTED = 0.45
"""Issue 5's wish: most that a study of twelve trials may take of the time of twelve pipelines."""

REST = "the rest"


@dataclass(frozen=True)
class Time:
    """How long something took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Processor time; it hardly minds what else the machine does.
    """

    seconds: float
    cpu_seconds: float

    def __add__(self, other: Time) -> Time:
        """One after the other."""
        return Time(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


@dataclass(frozen=True)
class Pipeline:
    """A trial, in its study and alone.

    Attributes:
        name: Of the trial.
        params: Its ratios.
        shared: Its stages in the study.
        shared_time: What it took in the study, with what proposing it took.
        alone: Its stages in a workspace of its own.
        alone_time: What these took.
    """

    name: str
    params: Mapping[str, float]
    shared: tuple[StageResult, ...]
    shared_time: Time
    alone: tuple[StageResult, ...]
    alone_time: Time


@dataclass(frozen=True)
class Comparison:
    """A plan, both ways.

    Attributes:
        creation: What creating its studies took.
        pipelines: One a trial.
    """

    creation: Time
    pipelines: tuple[Pipeline, ...]

    @property
    def shared(self) -> Time:
        """What the studies took."""
        return sum((pipeline.shared_time for pipeline in self.pipelines), start=self.creation)

    @property
    def alone(self) -> Time:
        """What the separate pipelines took together."""
        return sum((pipeline.alone_time for pipeline in self.pipelines), start=Time(0.0, 0.0))

    @property
    def ratio(self) -> float:
        """Wall time of the studies / wall time of the pipelines."""
        return self.shared.seconds / self.alone.seconds

    @property
    def cpu_ratio(self) -> float:
        """The same of processor time."""
        return self.shared.cpu_seconds / self.alone.cpu_seconds

    def by_stage(self) -> dict[str, StageTimes]:
        """The times by kind of stage, and last what was no stage."""
        kinds = dict.fromkeys(stage.name for pipeline in self.pipelines for stage in pipeline.alone)
        times = {
            kind: StageTimes.of(
                [stage for pipeline in self.pipelines for stage in pipeline.shared if stage.name == kind],
                [stage for pipeline in self.pipelines for stage in pipeline.alone if stage.name == kind],
            )
            for kind in kinds
        }
        rest = StageTimes(
            stages=0,
            reused=0,
            shared=self.shared.seconds - sum(t.shared for t in times.values()),
            alone=self.alone.seconds - sum(t.alone for t in times.values()),
        )
        return {**times, REST: rest}


@dataclass(frozen=True)
class StageTimes:
    """All stages of one kind.

    Attributes:
        stages: Their number, all trials together.
        reused: How many of them the study did not compute.
        shared: Seconds in the study.
        alone: Seconds in the pipelines.
    """

    stages: int
    reused: int
    shared: float
    alone: float

    @classmethod
    def of(cls, shared: Sequence[StageResult], alone: Sequence[StageResult]) -> StageTimes:
        """Add up stages of one kind."""
        return cls(
            stages=len(shared),
            reused=sum(stage.reused for stage in shared),
            shared=sum(stage.seconds for stage in shared if not stage.reused),
            alone=sum(stage.seconds for stage in alone),
        )


def as_markdown(comparisons: Mapping[str, Comparison], head: str) -> str:
    """All tables.

    Args:
        comparisons: By name of the plan.
        head: A line above.
    """
    lines = [
        head,
        "",
        "| plan | trials | study, seconds | separate, seconds | ratio | CPU ratio | wanted |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {name} | {len(c.pipelines)} | {c.shared.seconds:.1f} | {c.alone.seconds:.1f} | {c.ratio:.3f} "
        f"| {c.cpu_ratio:.3f} | {WANTED} |"
        for name, c in comparisons.items()
    ]
    for name, comparison in comparisons.items():
        lines += ["", f"**{name}**", "", *_stage_lines(comparison), "", *_trial_lines(comparison)]
    return "\n".join([*lines, ""])


def as_csv(comparisons: Mapping[str, Comparison]) -> str:
    """One row a stage."""
    text = io.StringIO()
    columns = ("plan", "trial", "stage", "reused", "accuracy", "mac_ratio", "seconds_shared", "seconds_alone")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for name, comparison in comparisons.items():
        for pipeline in comparison.pipelines:
            for one, other in zip(pipeline.shared, pipeline.alone, strict=True):
                # A stage that was found says what computing it took; the study did not pay that again.
                paid = 0.0 if one.reused else one.seconds
                writer.writerow(
                    (
                        name,
                        pipeline.name,
                        one.name,
                        one.reused,
                        one.accuracy,
                        one.mac_ratio,
                        paid,
                        other.seconds,
                    )
                )
    return text.getvalue()


def _stage_lines(comparison: Comparison) -> list[str]:
    lines = ["| stage | of all | reused | study, seconds | separate, seconds |", "|---|--:|--:|--:|--:|"]
    return lines + [
        f"| {kind} | {times.stages} | {times.reused} | {times.shared:.1f} | {times.alone:.1f} |"
        for kind, times in comparison.by_stage().items()
    ]


def _trial_lines(comparison: Comparison) -> list[str]:
    names = sorted({name for p in comparison.pipelines for name in p.params}, reverse=True)
    columns = ["trial", *names, "stages", "reused", "accuracy", "seconds in the study", "seconds alone"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "--:|" * len(columns)]
    for pipeline in comparison.pipelines:
        texts = [
            pipeline.name,
            *(f"{pipeline.params[name]:.4f}" if name in pipeline.params else "" for name in names),
            str(len(pipeline.shared)),
            str(sum(stage.reused for stage in pipeline.shared)),
            f"{pipeline.shared[-1].accuracy:.4f}" if pipeline.shared else "",
            f"{pipeline.shared_time.seconds:.1f}",
            f"{pipeline.alone_time.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return lines
