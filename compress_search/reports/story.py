"""The study told as AIMET's *Compression Features Guidebook* has it: first half, gate, second half, pick."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress_search.accuracy_scale import AccuracyScale
from compress_search.methods import METHODS
from compress_search.reports.formatting import technique
from compress_search.results import Candidate, ParetoFront, StageResult
from compress_search.target import target_text


@dataclass(frozen=True)
class Chapter:
    """One step of the story.

    Attributes:
        title: What it is.
        text: What happened, in sentences.
    """

    title: str
    text: str


@dataclass(frozen=True)
class _Half:
    """One method's part of a trial: its compression, and the fine-tuning that follows.

    Attributes:
        method: The method.
        ratio: MACs after / MACs before the method.
        compressed: Accuracy right after it.
        tuned: Accuracy before the next method, or at the end.
    """

    method: str
    ratio: float
    compressed: float
    tuned: float


def story_of(
    front: ParetoFront, *, chosen: Candidate | None, allowed_drop: float | None
) -> tuple[Chapter, ...]:
    """Tell what the trials did, half by half; finalists only repeat others, and can only be picked.

    Args:
        front: The study's candidates.
        chosen: The model to ship, if there is one.
        allowed_drop: The drop of accuracy after the first half that gives a trial up; ``None`` for any.
    """
    searched = [candidate for candidate in front.candidates if candidate.finalist_of is None]
    halves = {candidate.number: tuple(_halves(candidate.stages)) for candidate in searched}
    methods = list(
        dict.fromkeys(half.method for own in sorted(halves.values(), key=len)[::-1] for half in own)
    )
    scale = AccuracyScale.of(
        [front.reference.accuracy, *(half.tuned for own in halves.values() for half in own)]
    )
    chapters = []
    for position, method in enumerate(methods):
        done = [half for own in halves.values() for half in own if half.method == method]
        title = technique(method) if len(methods) == 1 else f"{_ORDINALS[position]} half: {technique(method)}"
        chapters.append(Chapter(title, _half_text(done, front.reference.accuracy, scale)))
        if position == 0 and len(methods) > 1:
            gate = _gate_text(searched, halves, front.reference.accuracy, allowed_drop, scale)
            chapters.append(Chapter("Gate", gate))
    stopped = sum(c.state == "pruned" and len(c.learning_curve) > 0 for c in searched)
    if stopped:
        text = (
            f"{_trials(stopped)} ended before the last epoch: half of the others were ahead by then "
            "(median_stopping)."
        )
        chapters.append(Chapter("Given up in the last fine-tuning", text))
    if chosen is not None and chosen.accuracy is not None:
        chapters.append(Chapter("Pick", _pick_text(front, chosen, scale)))
    return tuple(chapters)


_ORDINALS = ("First", "Second", "Third", "Fourth")


def _halves(stages: Sequence[StageResult]) -> Iterator[_Half]:
    starts = [place for place, stage in enumerate(stages) if stage.name in METHODS]
    before = 1.0
    for start, end in pairwise([*starts, len(stages)]):
        compressed, last = stages[start], stages[end - 1]
        if not math.isfinite(compressed.accuracy + last.accuracy):
            return
        yield _Half(compressed.name, compressed.mac_ratio / before, compressed.accuracy, last.accuracy)
        before = compressed.mac_ratio


def _half_text(done: Sequence[_Half], original: float, scale: AccuracyScale) -> str:
    ratios = sorted({round(half.ratio, 4) for half in done})
    compressed, tuned = [half.compressed for half in done], [half.tuned for half in done]
    return (
        f"{_trials(len(done))}, {len(ratios)} different ratios ({METHODS[done[0].method].ratio_name}, as "
        f"achieved): {_range(f'{ratios[0]:.4g}', f'{ratios[-1]:.4g}')}. Accuracy right after it "
        f"{_range(*map(scale.accuracy, _ends(compressed)))}, after the fine-tuning that follows "
        f"{_range(*map(scale.accuracy, _ends(tuned)))}; the original's is {scale.accuracy(original)}."
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _gate_text(
    searched: Sequence[Candidate],
    halves: dict[int, tuple[_Half, ...]],
    original: float,
    allowed_drop: float | None,
    scale: AccuracyScale,
) -> str:
    passed = sum(len(own) > 1 for own in halves.values())
    if allowed_drop is None:
        return f"None was set (max_drop_after_ssvd), so no trial gave up here: {_trials(passed)} went on."
    # Others are pruned with one half too: one that has no second half, in its last fine-tuning; and one whose
    # second ratio cannot be reached.
    pruned = [c for c in searched if c.state == "pruned" and len(halves[c.number]) == 1]
    at_gate = [
        c for c in pruned if not c.learning_curve and original - halves[c.number][0].tuned > allowed_drop
    ]
    given_up = f"{_trials(len(at_gate))} gave up here" if at_gate else "none gave up here"
    return (
        f"A trial may have lost {scale.drop(allowed_drop).removeprefix('+')} half-way (max_drop_after_ssvd). "
        f"{_trials(passed)} went on, {given_up}."
    )


def _pick_text(front: ParetoFront, chosen: Candidate, scale: AccuracyScale) -> str:
    assert chosen.accuracy is not None and chosen.mac_ratio is not None
    feasible = [c for c in front.candidates if c.feasible and c.accuracy is not None]
    low, high = front.band
    product = " x ".join(f"{half.ratio:.4f}" for half in _halves(chosen.stages))
    origin = "" if chosen.finalist_of is None else f", which trained trial {chosen.finalist_of} on,"
    text = (
        f"{_trials(len(feasible))} ended in the band from {low:.4g} to {high:.4g} around the target "
        f"{target_text(front.target)}. Trial {chosen.number}{origin} is picked: {product or '1'} = "
        f"{chosen.mac_ratio:.4f} of the MACs, accuracy {scale.accuracy(chosen.accuracy)}, drop "
        f"{scale.drop(chosen.drop)}."
    )
    others = [c for c in feasible if c.number != chosen.number]
    if others:
        best = max(others, key=lambda c: c.accuracy or 0.0)
        text += (
            f" The most accurate of the others in the band, trial {best.number}, has "
            f"{scale.accuracy(best.accuracy)} at {best.mac_ratio:.4f}."
        )
    return text


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _trials(number: int) -> str:
    return "1 trial" if number == 1 else f"{number} trials"
