"""How far a study is, as a value and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from optuna.trial import FrozenTrial, TrialState

from compress_search.accuracy_scale import AccuracyScale
from compress_search.recipe import FineTune
from compress_search.results import Candidate, Reference, StageResult, format_param, param_names
from compress_search.search.candidates import STATES
from compress_search.search.history import INTERRUPTED, STAGES, WORKER, current_trials, is_finalist
from compress_search.worker_process import Worker


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """How far a study is.

    Attributes:
        name: Of the study.
        target: The wanted ``mac_ratio``.
        reference: The original model.
        wanted: Total number of finished trials that was last asked for; ``None`` if it never ran.
        counts: Number of trials by state. Those that a retry stands in for are not counted, nor finalists.
        finalists: Number of finalists by state.
        running: Per running trial, its number and its finished stages.
        abandoned: The numbers of those whose process ran on this machine and is gone.
        best: The most accurate feasible candidate so far, if there is one.
        seconds_by_stage: Seconds of computing, by stage.
        reused_stages: Number of stages that trials found finished.
        seconds_saved: Seconds that computing those had taken.
        n_interrupted: Number of trials that were stopped from outside.
    """

    name: str
    target: float
    reference: Reference
    wanted: int | None
    counts: Mapping[str, int]
    finalists: Mapping[str, int]
    running: Mapping[int, tuple[str, ...]]
    abandoned: tuple[int, ...]
    best: Candidate | None
    seconds_by_stage: Mapping[str, float]
    reused_stages: int
    seconds_saved: float
    n_interrupted: int

    @property
    def finished(self) -> int:
        """Number of trials that count towards the total."""
        return sum(self.counts[state] for state in ("complete", "pruned", "failed"))

    def __str__(self) -> str:
        wanted = f" of {self.wanted}" if self.wanted is not None else ""
        states = ", ".join(f"{count} {state}" for state, count in self.counts.items() if count)
        lines = [
            f"Study {self.name!r}: {self.finished}{wanted} trials finished ({states or 'none yet'}).",
            f"Interrupted and run again: {self.n_interrupted}.",
        ]
        if self.finalists:
            lines.append(f"Finalists: {', '.join(f'{n} {state}' for state, n in self.finalists.items())}.")
        for number, stages in self.running.items():
            how = (
                "Abandoned (its process is gone; resume runs it again)"
                if number in self.abandoned
                else "Running"
            )
            lines.append(f"{how}: trial {number}, finished so far: {', '.join(stages) or 'nothing'}.")
        original = self._scale.accuracy(self.reference.accuracy)
        lines.append(f"Original: accuracy {original}, {self.reference.macs:,} MACs.")
        lines.append(self._best_line())
        if self.seconds_by_stage:
            width = max(map(len, self.seconds_by_stage))
            lines.append("Time per stage:")
            lines += [f"  {name:<{width}}  {_duration(s)}" for name, s in self.seconds_by_stage.items()]
        lines.append(f"Reused stages: {self.reused_stages}, which saved {_duration(self.seconds_saved)}.")
        return "\n".join(lines)

    @property
    def _scale(self) -> AccuracyScale:
        return AccuracyScale.of([self.reference.accuracy])

    def _best_line(self) -> str:
        if self.best is None:
            return f"Best so far: none is feasible at the target {self.target:g}."
        params = ", ".join(
            f"{name} {format_param(self.best.params[name])}" for name in param_names([self.best])
        )
        return (
            f"Best so far: trial {self.best.number} ({params}), "
            f"accuracy {self._scale.accuracy(self.best.accuracy)}, drop {self._scale.drop(self.best.drop)}, "
            f"mac_ratio {self.best.mac_ratio:.4f}."
        )


def status_of(
    trials: Sequence[FrozenTrial],
    *,
    name: str,
    target: float,
    reference: Reference,
    wanted: int | None,
    best: Candidate | None,
) -> StudyStatus:
    """Work out how far a study is.

    Args:
        trials: All its trials.
        name: See :class:`StudyStatus`, also for the others.
        target: The wanted ratio.
        reference: The original model.
        wanted: The total asked for.
        best: The best candidate.
    """
    current = current_trials(trials)
    running = [trial for trial in current if trial.state == TrialState.RUNNING]
    counted = Counter(STATES[trial.state] for trial in current if not is_finalist(trial))
    # Interrupted trials count too: what they computed took its time, and is what their retries reuse.
    stages = [named for trial in trials for named in _named(_stages_of(trial))]
    seconds: dict[str, float] = {}
    for label, stage in stages:
        if not stage.reused:
            seconds[label] = seconds.get(label, 0.0) + stage.seconds
    reused = [stage for _, stage in stages if stage.reused]
    return StudyStatus(
        name=name,
        target=target,
        reference=reference,
        wanted=wanted,
        counts={state: counted[state] for state in STATES.values()},
        finalists=Counter(STATES[trial.state] for trial in current if is_finalist(trial)),
        running={trial.number: tuple(label for label, _ in _named(_stages_of(trial))) for trial in running},
        abandoned=tuple(
            trial.number
            for trial in running
            if WORKER in trial.user_attrs and Worker(**trial.user_attrs[WORKER]).is_known_dead()
        ),
        best=best,
        seconds_by_stage=seconds,
        reused_stages=len(reused),
        seconds_saved=sum(stage.seconds for stage in reused),
        n_interrupted=sum(t.state == TrialState.FAIL and INTERRUPTED in t.user_attrs for t in trials),
    )


def _stages_of(trial: FrozenTrial) -> list[StageResult]:
    return [StageResult.from_dict(stage) for stage in trial.user_attrs.get(STAGES, ())]


def _named(stages: Iterable[StageResult]) -> list[tuple[str, StageResult]]:
    """Tell the fine-tunings apart by what they come after."""
    named = []
    before = ""
    for stage in stages:
        named.append((f"{stage.name} after {before}" if stage.name == FineTune().name else stage.name, stage))
        before = stage.name
    return named


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
