"""What became of one trial, and why: as a value and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from compress_search.exceptions import StudyError
from compress_search.recipe import FineTune, Recipe
from compress_search.reports.trials import stage_names
from compress_search.results import StageResult, format_param
from compress_search.search.candidates import STATES, is_feasible
from compress_search.search.history import (
    ANCHOR,
    DUPLICATE_OF,
    FINALIST_OF,
    INTERRUPTED,
    REASON,
    RECIPE,
    RETRIES,
    RETRY_OF,
    STAGES,
    TRACEBACK,
    WORKER,
    epochs_done,
)
from compress_search.worker_process import Worker


@dataclass(frozen=True, kw_only=True)
class TrialHistory:
    """Everything that is known of one trial.

    Attributes:
        number: Its number in the study.
        state: ``"complete"``, ``"pruned"``, ``"failed"``, ``"running"`` or ``"waiting"``.
        feasible: Whether a complete one ended in the band; ``None`` if it is not complete.
        params: What it asks for, so far.
        reason: Why it was pruned, failed or interrupted.
        traceback: The last lines of the traceback of a failed trial.
        interrupted: ``"died"`` or ``"stopped"`` if it was stopped from outside.
        retry_of: The trial that it stands in for.
        retries: How many retries in a row died before it, or with it, without finishing anything more.
        replaced_by: The retry that stands in for it.
        duplicate_of: The retry that made this one needless.
        anchor: What it shows, if it is one of the first trials of a study.
        finalist_of: The trial whose model it trains on.
        finalists: The trials that train its model on.
        worker: The process that ran it, or runs it.
        worker_gone: Whether that is known to have ended.
        began: When it was first run, in local time.
        ended: When it ended.
        stages: Its finished stages.
        ahead: Names of the stages that it has not finished, in order; empty before it has chosen its ratios.
        epochs: How many epochs of the first of those are done; ``None`` if that trains nothing.
        of_epochs: How many there are to be.
        folder: Where the plan and the weights of its last finished stage lie.
    """

    number: int
    state: str
    feasible: bool | None
    params: Mapping[str, float | int | str]
    reason: str | None
    traceback: tuple[str, ...]
    interrupted: str | None
    retry_of: int | None
    retries: int
    replaced_by: int | None
    duplicate_of: int | None
    anchor: str | None
    finalist_of: int | None
    finalists: tuple[int, ...]
    worker: Worker | None
    worker_gone: bool
    began: datetime | None
    ended: datetime | None
    stages: tuple[StageResult, ...]
    ahead: tuple[str, ...]
    epochs: int | None
    of_epochs: int | None
    folder: Path | None

    def __str__(self) -> str:
        return "\n".join([self.headline, *self.facts, *self._lines()])

    @property
    def headline(self) -> str:
        """What became of it, in a sentence."""
        return f"Trial {self.number} is {self.state}{self._because()}."

    @property
    def facts(self) -> tuple[str, ...]:
        """What it asked for, how it hangs together with other trials, who ran it, and when; sentences."""
        return tuple(self._facts())

    def _because(self) -> str:
        if self.reason is not None:
            return f": {self.reason}"
        if self.state == "running" and self.worker_gone:
            return ", but its process is gone; resuming the study runs it again"
        return ", but outside the band: it does not meet the target" if self.feasible is False else ""

    def _facts(self) -> Iterator[str]:
        if self.params:
            yield f"Asks for: {', '.join(f'{name} {format_param(v)}' for name, v in self.params.items())}."
        if self.anchor is not None:
            yield f"Anchor: {self.anchor}."
        if self.finalist_of is not None:
            yield f"Finalist: trains the model of trial {self.finalist_of} on."
        if self.finalists:
            yield f"Trained on by: {_trials(self.finalists)}."
        if self.retry_of is not None:
            held = f"; {self.retries} in a row died without finishing anything more" if self.retries else ""
            yield f"Retry of trial {self.retry_of}{held}."
        if self.replaced_by is not None:
            yield f"Replaced by trial {self.replaced_by}, which goes on from its stages and does count."
        if self.duplicate_of is not None:
            yield f"Needless beside trial {self.duplicate_of}; it does not count."
        if self.worker is not None:
            yield f"Worker: {self.worker}{' (gone)' if self.worker_gone else ''}."
        if self.began is not None:
            ended = "" if self.ended is None else f", ended {self.ended:%Y-%m-%d %H:%M:%S}"
            yield f"Began {self.began:%Y-%m-%d %H:%M:%S}{ended}."

    def _lines(self) -> Iterator[str]:
        for label, stage in zip(stage_names(self.stages), self.stages, strict=True):
            how = f"reused, saved {stage.seconds:.1f} s" if stage.reused else f"{stage.seconds:.1f} s"
            yield f"  {label}: {how}; accuracy {stage.accuracy:.4f}, mac_ratio {stage.mac_ratio:.4f}"
        for position, name in enumerate(self.ahead):
            done = ""
            if position == 0 and self.epochs is not None:
                done = f" ({self.epochs} of {self.of_epochs} epochs are done)"
            yield f"  {name}: not finished{done}"
        if self.folder is not None:
            gone = "" if self.folder.is_dir() else " (removed)"
            yield f"Plan and weights of the last stage: {self.folder}{gone}"
        if self.traceback:
            yield "The end of its traceback:"
            yield from (f"  {line}" for line in self.traceback)


def trial_history(trials: Sequence[FrozenTrial], number: int, *, study: str, stages: Path) -> TrialHistory:
    """Read everything that is known of one trial.

    Args:
        trials: All trials of the study.
        number: Of the trial.
        study: Name of the study.
        stages: Folder of the workspace's stages.

    Raises:
        StudyError: There is no such trial; the message says which there are.
    """
    by_number = {trial.number: trial for trial in trials}
    if number not in by_number:
        there = f"its trials are 0 to {max(by_number)}" if by_number else "it has none yet"
        raise StudyError(f"The study {study!r} has no trial {number!r}; {there}.")
    trial = by_number[number]
    attributes = trial.user_attrs
    finished = tuple(StageResult.from_dict(stage) for stage in attributes.get(STAGES, ()))
    planned = Recipe.from_dict(attributes[RECIPE]).stages if RECIPE in attributes else ()
    ahead = planned[len(finished) :]
    training = ahead[0] if ahead and isinstance(ahead[0], FineTune) else None
    worker = Worker(**attributes[WORKER]) if WORKER in attributes else None
    needless = {other.number for other in trials if DUPLICATE_OF in other.user_attrs}
    retries = [other.number for other in trials if other.user_attrs.get(RETRY_OF) == number]
    return TrialHistory(
        number=number,
        state=STATES[trial.state],
        feasible=is_feasible(trial) if trial.state == TrialState.COMPLETE else None,
        params=trial.params,
        reason=attributes.get(REASON),
        traceback=tuple(attributes.get(TRACEBACK, ())),
        interrupted=attributes.get(INTERRUPTED),
        retry_of=attributes.get(RETRY_OF),
        retries=attributes.get(RETRIES, 0),
        replaced_by=min((other for other in retries if other not in needless), default=None),
        duplicate_of=attributes.get(DUPLICATE_OF),
        anchor=attributes.get(ANCHOR),
        finalist_of=attributes.get(FINALIST_OF),
        finalists=tuple(other.number for other in trials if other.user_attrs.get(FINALIST_OF) == number),
        worker=worker,
        worker_gone=worker is not None and worker.is_known_dead(),
        began=trial.datetime_start,
        ended=trial.datetime_complete,
        stages=finished,
        ahead=tuple(stage.name for stage in ahead),
        epochs=None if training is None else epochs_done(attributes),
        of_epochs=None if training is None else training.epochs,
        folder=stages / finished[-1].key if finished else None,
    )


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
