"""Results: frozen numbers of stages and trials, and the accuracy/MAC Pareto front made of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from compress_search.accuracy_scale import AccuracyScale
from compress_search.checkpoint import load_weights
from compress_search.exceptions import PlanError, StudyError, WorkspaceError
from compress_search.html_table import html_table
from compress_search.plain_text import format_table, without_numbers
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.stage_files import PLAN, RESULT, WEIGHTS, fault_of
from compress_search.target import SPLIT, TARGET, Interval, Target, band_of

MADE_AGAIN = (
    "Run the same study under another name in this workspace: it reuses every stage that is whole, and "
    "computes this one again."
)
"""What to do where a finished candidate's files are gone or damaged."""


@dataclass(frozen=True)
class Reference:
    """The original model's numbers, which every drop and ratio is relative to.

    Attributes:
        accuracy: What ``Task.evaluate`` said of it on the validation data.
        macs: MACs per example.
        params: Number of parameters.
    """

    accuracy: float
    macs: int
    params: int


@dataclass(frozen=True)
class StageResult:
    """What one finished stage left.

    Attributes:
        key: Hash of everything that made it; also the name of its folder in the workspace.
        name: ``"spatial_svd"``, ``"fine_tune"``, ...
        accuracy: On the validation data, after the stage.
        macs: MACs per example, after the stage.
        params: Number of parameters, after the stage.
        mac_ratio: MACs / MACs of the original model.
        seconds: Wall time that computing it took.
        reused: Whether this trial found it in the workspace instead of computing it.
        learning_curve: Of a fine-tuning: the accuracy on the validation data before its first epoch, and
            after each. Empty for other stages, and where a training function of the user's own does not tell.
        teacher_seconds_saved: Of a fine-tuning: further time that it would have taken if what the original
            says of the training batches had not been known.
    """

    key: str
    name: str
    accuracy: float
    macs: int
    params: int
    mac_ratio: float
    seconds: float
    reused: bool = False
    learning_curve: tuple[float, ...] = ()
    teacher_seconds_saved: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {**dataclasses.asdict(self), "learning_curve": [*self.learning_curve]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> StageResult:
        """Read what :meth:`to_dict` wrote."""
        # JSON has no tuples, and stages that are older than learning curves have none.
        return cls(**{**value, "learning_curve": tuple(value.get("learning_curve", ()))})


@dataclass(frozen=True)
class Candidate:
    """What a trial ended as.

    Attributes:
        number: The trial's number in the study.
        state: ``"complete"``, ``"pruned"``, ``"failed"``, ``"running"`` or ``"waiting"``.
        params: The search variables: the ratios that were asked of each method, and any other.
        stages: Its finished stages, in order.
        learning_curve: Of the fine-tuning that it has begun and not finished: the accuracy on the validation
            data before the first epoch, and after each; empty if there is none.
        accuracy: On the validation data at its end; ``None`` unless complete.
        mac_ratio: MACs / MACs of the original model at its end; ``None`` unless complete.
        drop: Accuracy of the original minus its own (0.01 is one point); ``None`` unless complete.
        feasible: Whether it is complete and its ``mac_ratio`` lies in the target's band.
        seconds: Wall time of the trial, reused stages not counted.
        reason: Why it was pruned or failed.
        finalist_of: Number of the trial whose model this one trained on for longer; ``None`` for others.
        folder: Where its plan and weights lie; ``None`` unless complete.
        build_model: Makes the original model, for :meth:`load_model`.
    """

    number: int
    state: str
    params: Mapping[str, float | int | str]
    stages: tuple[StageResult, ...] = ()
    learning_curve: tuple[float, ...] = ()
    accuracy: float | None = None
    mac_ratio: float | None = None
    drop: float | None = None
    feasible: bool = False
    seconds: float = 0.0
    reason: str | None = None
    finalist_of: int | None = None
    folder: Path | None = None
    build_model: Callable[[], nn.Module] | None = field(default=None, repr=False, compare=False)

    @property
    def plan(self) -> CompressionPlan:
        """The plan that rebuilds the candidate's architecture.

        Raises:
            StudyError: The candidate did not complete.
            PlanError: The file is gone or damaged.
        """
        folder = self._finished_folder()
        if fault := _fault_in_store(folder, PLAN):
            raise PlanError(self._damaged(folder, fault))
        return CompressionPlan.load(folder / PLAN)

    @property
    def weights(self) -> Path:
        """The candidate's weights, a safetensors file.

        Raises:
            StudyError: The candidate did not complete.
            WorkspaceError: The file is damaged.
        """
        folder = self._finished_folder()
        if fault := _fault_in_store(folder, WEIGHTS):
            raise WorkspaceError(self._damaged(folder, fault))
        return folder / WEIGHTS

    def load_model(self, original: nn.Module | None = None) -> nn.Module:
        """Rebuild the compressed model and load its weights.

        Args:
            original: The original model, if the study was opened without its task.

        Returns:
            A new model in evaluation mode, on the original's device.

        Raises:
            StudyError: The candidate did not complete, or there is no original model to start from.
            PlanError: The plan is gone or damaged, or does not fit ``original``.
            WorkspaceError: The weights are gone or damaged.
            ModelError: The weights are those of another model.
        """
        if original is None:
            if self.build_model is None:
                raise StudyError(
                    "This study was opened without its task, so the original architecture is not known. "
                    "Call load_model(original=...) or load_study(..., task=...)."
                )
            original = self.build_model()
        model = apply_plan(original, self.plan)
        load_weights(model, self.weights, remedy=MADE_AGAIN)
        return model.eval()

    def __str__(self) -> str:
        return self.in_words(self._scale)

    def in_words(self, scale: AccuracyScale) -> str:
        """Say in a line what the trial ended as.

        Args:
            scale: How accuracies are written.
        """
        head = f"trial {self.number} ({self._params_text})"
        if self.mac_ratio is None:
            return f"{head}, {self.state}{'' if self.reason is None else f': {self.reason}'}"
        return (
            f"{head}, accuracy {scale.accuracy(self.accuracy)}, drop {scale.drop(self.drop)}, "
            f"mac_ratio {self.mac_ratio:.4f}"
        )

    def _repr_html_(self) -> str:
        """Show the candidate in a notebook: a row for each of its stages."""
        scale = self._scale
        head = ["stage", f"accuracy{scale.unit}", "mac_ratio", "seconds", "reused"]
        rows = [
            [
                stage.name,
                f"{scale.factor * stage.accuracy:.2f}",
                f"{stage.mac_ratio:.4f}",
                f"{stage.seconds:.1f}",
                "yes" if stage.reused else "",
            ]
            for stage in self.stages
        ]
        said = "" if self.reason is None else f": {self.reason}"
        caption = f"Trial {self.number} ({self._params_text}) is {self.state}{said}"
        return html_table([head, *rows], right=head[1:-1], caption=caption)

    @property
    def _scale(self) -> AccuracyScale:
        own = () if self.accuracy is None else (self.accuracy,)
        return AccuracyScale.of([*(stage.accuracy for stage in self.stages), *own])

    @property
    def _params_text(self) -> str:
        return ", ".join(f"{name} {format_param(self.params[name])}" for name in param_names([self]))

    def _finished_folder(self) -> Path:
        if self.folder is None:
            raise StudyError(
                f"Trial {self.number} is {self.state}, so it left no model. "
                "Choose a complete one: study.front()."
            )
        return self.folder

    def _damaged(self, folder: Path, fault: str) -> str:
        return f"The stored model of trial {self.number}, {str(folder)!r}, is damaged: {fault}. {MADE_AGAIN}"


@dataclass(frozen=True)
class ParetoFront:
    """The study's answer: every candidate, and which of them no other one beats.

    A candidate is on the front if it is feasible and no other feasible one is at least as accurate with
    at most as many MACs, and better in one of the two.

    Attributes:
        candidates: All candidates, by trial number.
        reference: The original model.
        target: The wanted ``mac_ratio``, or the lowest and the highest of a range.
        tolerance: How far the band reaches beyond the target, relative to it.
    """

    candidates: tuple[Candidate, ...]
    reference: Reference
    target: Target
    tolerance: float

    @property
    def band(self) -> Interval:
        """Lowest and highest feasible ``mac_ratio``."""
        return band_of(self.target, self.tolerance)

    @property
    def best(self) -> tuple[Candidate, ...]:
        """The candidates on the front, from the fewest MACs to the most."""
        return pareto_optimal([c for c in self.candidates if c.feasible])

    @property
    def most_accurate(self) -> Candidate | None:
        """The most accurate feasible candidate, if there is one."""
        return self.best[-1] if self.best else None

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.best)

    def __len__(self) -> int:
        return len(self.best)

    def choose(self, *, max_drop: float | None = None) -> Candidate:
        """Pick the model to ship.

        Args:
            max_drop: Largest acceptable drop of accuracy (0.01 is one point). With it, the feasible
                candidate with the fewest MACs within that drop; without it, the most accurate one.

        Raises:
            StudyError: There is no such candidate; the nearest one is named.
        """
        feasible = self.best
        if not feasible:
            raise StudyError(self._why_none_is_feasible())
        if max_drop is None:
            return feasible[-1]
        for candidate in feasible:
            assert candidate.drop is not None
            if within(candidate.drop, max_drop):
                return candidate
        nearest = feasible[-1]
        assert nearest.drop is not None
        raise StudyError(
            f"No feasible candidate drops at most {max_drop}; the nearest is trial {nearest.number} with "
            f"{nearest.drop:.4f} at mac_ratio {nearest.mac_ratio:.4f}. "
            "Allow a larger drop, or run more trials."
        )

    def _why_none_is_feasible(self) -> str:
        ended = [c for c in self.candidates if c.state in ("complete", "pruned", "failed")]
        if self.candidates and not ended:
            return (
                "No trial has ended, so there is no candidate yet. If trials failed and wait to be run "
                "again, put right what they failed of; then run the study."
            )
        if ended and all(candidate.state != "complete" for candidate in ended):
            reasons = [candidate.reason or "a reason that is not known" for candidate in ended]
            ((kind, count),) = Counter(map(without_numbers, reasons)).most_common(1)
            reason = next(reason for reason in reasons if without_numbers(reason) == kind)
            many = f"all of its {len(ended)} trials" if len(ended) > 1 else "its only trial"
            ways = {"failed": "failed", "pruned": "gave up"}
            ends = " or ".join(sorted({ways[candidate.state] for candidate in ended}))
            same = "" if count == len(ended) else f" {count} of them"
            return (
                f"The study has no candidate: {many} {ends},{same} with: {reason.rstrip('.')}. "
                "Put that right, and run more trials."
            )
        low, high = self.band
        return (
            f"No candidate is complete with a mac_ratio in [{low:.4f}, {high:.4f}]. "
            "Run more trials, or widen the tolerance."
        )

    def __str__(self) -> str:
        return format_candidates(self.best)

    def _repr_html_(self) -> str:
        """Show the front in a notebook."""
        rows = _cells_of(self.best)
        original = AccuracyScale.of([self.reference.accuracy]).accuracy(self.reference.accuracy)
        caption = f"The front of {len(self.candidates)} trials; the original has {original}"
        return html_table(rows, right=rows[0], caption=caption)


def within(drop: float, most: float) -> bool:
    """Whether a drop is at most another; what binary fractions add to 0.98 - 0.97 is not counted."""
    return drop <= most + 1e-9


def pareto_optimal(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the non-dominated candidates (accuracy up, MAC ratio down), from the fewest MACs to the most.

    Of candidates with equal accuracy and MACs, the one with the lowest number stays.

    Args:
        candidates: Complete candidates, in any order.
    """
    front: list[Candidate] = []
    highest = float("-inf")
    for candidate in sorted(candidates, key=_by_macs_then_accuracy):
        assert candidate.accuracy is not None
        if candidate.accuracy > highest:
            highest = candidate.accuracy
            front.append(candidate)
    return tuple(front)


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """Format complete candidates as a plain table.

    One row a candidate: trial, the trial that it is a finalist of (if there are finalists), each search
    variable, achieved ``mac_ratio``, validation accuracy and drop (both in % where accuracies are shares),
    seconds.
    """
    rows = _cells_of(candidates)
    return format_table(rows, right=rows[0])


def _cells_of(candidates: Sequence[Candidate]) -> list[list[str]]:
    """The cells of the table of complete candidates, its titles first."""
    names = param_names(candidates)
    scale = AccuracyScale.of(c.accuracy for c in candidates if c.accuracy is not None)
    of = ["finalist of"] if any(c.finalist_of is not None for c in candidates) else []
    header = ["trial", *of, *names, "mac_ratio", f"accuracy{scale.unit}", f"drop{scale.unit}", "seconds"]
    rows = [
        [
            str(c.number),
            *(["" if c.finalist_of is None else str(c.finalist_of)] if of else []),
            *(format_param(c.params[name]) if name in c.params else "" for name in names),
            f"{c.mac_ratio:.4f}",
            f"{scale.factor * (c.accuracy or 0):.2f}",
            f"{scale.factor * (c.drop or 0):+.2f}",
            f"{c.seconds:.1f}",
        ]
        for c in candidates
    ]
    return [header, *rows]


def param_names(candidates: Iterable[Candidate]) -> list[str]:
    """Names of all search variables in the order of columns: ratios as they are applied, then settings.

    Where the target is searched it comes first, and how it is split among the methods.
    """
    names = sorted({name for candidate in candidates for name in candidate.params})
    whole = [name for name in (TARGET, SPLIT) if name in names]
    ratios = [name for name in names if name.startswith("c_")]
    return [*whole, *reversed(ratios), *(name for name in names if name not in (*whole, *ratios))]


def format_param(value: float | int | str) -> str:
    """Write the value of a search variable for people: four digits of a fraction, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fault_in_store(folder: Path, name: str) -> str | None:
    # A file that is gone is named by who reads it, and a folder without checksums is not one of the store.
    if not all((folder / needed).is_file() for needed in (RESULT, name)):
        return None
    return fault_of(folder, (name,))


def _by_macs_then_accuracy(candidate: Candidate) -> tuple[float, float, int]:
    assert candidate.mac_ratio is not None and candidate.accuracy is not None
    return candidate.mac_ratio, -candidate.accuracy, candidate.number
