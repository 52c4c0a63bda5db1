"""How far a study is, as a value and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from compress_search.accuracy_scale import AccuracyScale
from compress_search.leases import LeaseFile
from compress_search.plain_text import duration, format_table
from compress_search.reports.trials import StageTime, stage_names, stage_times
from compress_search.results import (
    Candidate,
    ParetoFront,
    Reference,
    StageResult,
    format_candidates,
)
from compress_search.search.candidates import STATES
from compress_search.search.changes import Change
from compress_search.search.history import INTERRUPTED, STAGES, WORKER, current_trials, is_finalist
from compress_search.search.stop_when import StopWhen
from compress_search.target import Target, target_text
from compress_search.worker_process import Worker


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """How far a study is.

    Attributes:
        name: Of the study.
        target: The wanted ``mac_ratio``, or the lowest and the highest of a range.
        reference: The original model.
        wanted: Total number of finished trials that was last asked for; ``None`` if it never ran.
        stop_when: What was asked for that ends it sooner, in words; ``None`` for nothing.
        is_enough: Whether that has come true.
        counts: Number of trials by state. Those that a retry stands in for are not counted, nor finalists.
        finalists: Number of finalists by state.
        running: Per running trial, its number and its finished stages.
        abandoned: The numbers of those whose process ran on this machine and is gone.
        best: The most accurate feasible candidate so far, if there is one.
        front: The candidates on the front so far, from the fewest MACs to the most.
        stages: What each kind of stage cost, and what reuse saved. Trials that were interrupted count too.
        computing: The stages that processes of this study compute now, or wait for, a sentence each.
        n_interrupted: Number of trials that were stopped from outside.
        changes: What of the study was accepted to change, in order.
    """

    name: str
    target: Target
    reference: Reference
    wanted: int | None
    stop_when: str | None
    is_enough: bool
    counts: Mapping[str, int]
    finalists: Mapping[str, int]
    running: Mapping[int, tuple[str, ...]]
    abandoned: tuple[int, ...]
    best: Candidate | None
    front: tuple[Candidate, ...]
    stages: tuple[StageTime, ...]
    computing: tuple[str, ...]
    n_interrupted: int
    changes: tuple[Change, ...]

    @property
    def seconds_by_stage(self) -> Mapping[str, float]:
        """Seconds of computing, by stage."""
        return {stage.name: stage.seconds for stage in self.stages if stage.computed}

    @property
    def computed_stages(self) -> int:
        """Number of stages that trials computed."""
        return sum(stage.computed for stage in self.stages)

    @property
    def reused_stages(self) -> int:
        """Number of stages that trials found finished."""
        return sum(stage.reused for stage in self.stages)

    @property
    def seconds_saved(self) -> float:
        """Seconds that computing those had taken."""
        return sum(stage.saved for stage in self.stages)

    @property
    def teacher_seconds_saved(self) -> float:
        """Seconds that fine-tunings saved since what the original says of their batches was known."""
        return sum(stage.teacher_saved for stage in self.stages)

    @property
    def share_saved(self) -> float:
        """The part of the time of all stages that reuse saved, in [0, 1]."""
        spent = sum(stage.seconds for stage in self.stages)
        return self.seconds_saved / (spent + self.seconds_saved) if self.seconds_saved else 0.0

    @property
    def finished(self) -> int:
        """Number of trials that count towards the total."""
        return sum(self.counts[state] for state in ("complete", "pruned", "failed"))

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, and nothing more was asked for."""
        waits = self.running or self.finalists.get("waiting")
        enough = self.is_enough or (self.wanted is not None and self.finished >= self.wanted)
        return enough and not waits

    def __str__(self) -> str:
        wanted = f" of {self.wanted}" if self.wanted is not None else ""
        states = ", ".join(f"{count} {state}" for state, count in self.counts.items() if count)
        lines = [
            f"Study {self.name!r}: {self.finished}{wanted} trials finished ({states or 'none yet'}).",
            f"Interrupted and run again: {self.n_interrupted}.",
        ]
        lines += [f"Changed: {change}." for change in self.changes]
        if self.finalists:
            lines.append(f"Finalists: {', '.join(f'{n} {state}' for state, n in self.finalists.items())}.")
        for number, stages in self.running.items():
            how = (
                "Abandoned (its process is gone; resume runs it again)"
                if number in self.abandoned
                else "Running"
            )
            lines.append(f"{how}: trial {number}, finished so far: {', '.join(stages) or 'nothing'}.")
        lines += self.computing
        original = self._scale.accuracy(self.reference.accuracy)
        lines.append(f"Original: accuracy {original}, {self.reference.macs:,} MACs.")
        if self.stop_when is not None:
            lines.append(self.stop_when)
        lines.append(self._best_line())
        if isinstance(self.target, tuple) and self.front:
            lines.append(f"Front so far:\n{format_candidates(self.front)}")
        lines += self._stage_lines()
        return "\n".join(lines)

    def _stage_lines(self) -> list[str]:
        if not self.stages:
            return ["No stage is finished yet."]
        rows = [("stage", "computed", "time", "reused", "saved")]
        rows += [
            (s.name, str(s.computed), duration(s.seconds), str(s.reused), duration(s.saved))
            for s in self.stages
        ]
        total = self.reused_stages + self.computed_stages
        lines = [
            format_table(rows, right=rows[0][1:]),
            f"Reused: {self.reused_stages} of {total} stages, which saved {duration(self.seconds_saved)}: "
            f"{100 * self.share_saved:.0f} % of what computing all of them takes.",
        ]
        if self.teacher_seconds_saved:
            lines.append(
                "What the original says of the training batches was known to later fine-tunings, which saved "
                f"{duration(self.teacher_seconds_saved)} more."
            )
        return lines

    @property
    def _scale(self) -> AccuracyScale:
        return AccuracyScale.of([self.reference.accuracy])

    def _best_line(self) -> str:
        if self.best is None:
            return f"Best so far: none is feasible at the target {target_text(self.target)}."
        return f"Best so far: {self.best.in_words(self._scale)}."


def status_of(
    trials: Sequence[FrozenTrial],
    *,
    name: str,
    front: ParetoFront,
    wanted: int | None,
    stop_when: StopWhen | None = None,
    leases: Sequence[LeaseFile] = (),
    changes: Sequence[Change] = (),
) -> StudyStatus:
    """Work out how far a study is.

    Args:
        trials: All its trials.
        name: See :class:`StudyStatus`, also for the others.
        front: Its candidates.
        wanted: The total asked for.
        stop_when: What ends it sooner.
        leases: Who computes which stage of the workspace.
        changes: What of it has changed.
    """
    current = current_trials(trials)
    running = [trial for trial in current if trial.state == TrialState.RUNNING]
    counted = Counter(STATES[trial.state] for trial in current if not is_finalist(trial))
    return StudyStatus(
        name=name,
        target=front.target,
        reference=front.reference,
        wanted=wanted,
        stop_when=None if stop_when is None else stop_when.outlook(front.candidates),
        is_enough=stop_when is not None and stop_when.met_by(front.candidates) is not None,
        counts={state: counted[state] for state in STATES.values()},
        finalists=Counter(STATES[trial.state] for trial in current if is_finalist(trial)),
        running={trial.number: tuple(stage_names(_stages_of(trial))) for trial in running},
        abandoned=tuple(
            trial.number
            for trial in running
            if WORKER in trial.user_attrs and Worker(**trial.user_attrs[WORKER]).is_known_dead()
        ),
        best=front.most_accurate,
        front=front.best,
        # Interrupted trials count too: what they computed took its time, and is what their retries reuse.
        stages=stage_times(map(_stages_of, trials)),
        computing=tuple(_computing(leases, running)),
        n_interrupted=sum(t.state == TrialState.FAIL and INTERRUPTED in t.user_attrs for t in trials),
        changes=tuple(changes),
    )


def _stages_of(trial: FrozenTrial) -> list[StageResult]:
    return [StageResult.from_dict(stage) for stage in trial.user_attrs.get(STAGES, ())]


def _computing(leases: Iterable[LeaseFile], running: Iterable[FrozenTrial]) -> Iterator[str]:
    """Say of every stage that this study's processes compute who does so, and who waits for it."""
    numbers = {
        Worker(**trial.user_attrs[WORKER]): f"trial {trial.number}"
        for trial in running
        if WORKER in trial.user_attrs
    }
    for lease in leases:
        if lease.lease is None or not {lease.lease.holder, *lease.waiting} & numbers.keys():
            continue
        holder = lease.lease.holder
        if holder.is_known_dead():
            continue
        said = f"Being computed: {lease.lease}"
        if holder in numbers:
            said += f" for {numbers[holder]}"
        if lease.waiting:
            who = [numbers.get(worker, str(worker)) for worker in lease.waiting]
            said += f"; {', '.join(who)} {'waits' if len(who) == 1 else 'wait'} for it"
        yield f"{said}."
