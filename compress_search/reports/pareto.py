"""The accuracy/MAC front as a figure: the data, then two drawings of it.

The original model lies at a ``mac_ratio`` of 1, far from a band of a few per cent around the target. So each
drawing has two panels: the band, enlarged, and the whole.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from compress_search.accuracy_scale import AccuracyScale
from compress_search.reports.figure_look import Fact
from compress_search.reports.formatting import count, duration, ratio
from compress_search.reports.target import Interval, target_ends
from compress_search.results import Candidate, ParetoFront, format_param, param_names

_MARGIN = 0.05


@dataclass(frozen=True)
class ParetoPoint:
    """One complete trial.

    Attributes:
        number: The trial's number.
        accuracy: On the validation data.
        mac_ratio: MACs / MACs of the original model.
        feasible: Whether ``mac_ratio`` lies in the band.
        on_front: Whether no other feasible trial beats it.
        facts: Everything else worth knowing, as pairs of name and value.
    """

    number: int
    accuracy: float
    mac_ratio: float
    feasible: bool
    on_front: bool
    facts: tuple[Fact, ...]

    @property
    def status(self) -> str:
        """Where the trial stands, in words."""
        if self.on_front:
            return "on the front"
        return "in the band" if self.feasible else "outside the band"


@dataclass(frozen=True)
class View:
    """What one panel shows.

    Attributes:
        x: Lowest and highest ``mac_ratio``.
        y: Lowest and highest accuracy.
        below: Number of points in the ``x`` range whose accuracy is too low to be shown.
    """

    x: Interval
    y: Interval
    below: int = 0


@dataclass(frozen=True)
class ParetoData:
    """All that a figure of the front shows.

    Attributes:
        points: The complete trials, by number.
        original_accuracy: Of the original model, whose ``mac_ratio`` is 1.
        original_facts: What else is known of it.
        targets: The wanted ``mac_ratio``, or the lowest and the highest of a range.
        band: Lowest and highest feasible ``mac_ratio``.
        chosen: Number of the trial that was chosen, if one was.
        scale: How accuracies are shown.
    """

    points: tuple[ParetoPoint, ...]
    original_accuracy: float
    original_facts: tuple[Fact, ...]
    targets: tuple[float, ...]
    band: Interval
    chosen: int | None
    scale: AccuracyScale

    @property
    def front(self) -> tuple[ParetoPoint, ...]:
        """The points on the front, from the fewest MACs to the most."""
        return tuple(sorted((p for p in self.points if p.on_front), key=lambda p: p.mac_ratio))

    @property
    def steps(self) -> tuple[Interval, ...]:
        """Corners of the front's step line: the best accuracy within each budget, up to the band's end."""
        front = self.front
        if not front:
            return ()
        last = front[-1]
        return (
            *((p.mac_ratio, p.accuracy) for p in front),
            (max(self.band[1], last.mac_ratio), last.accuracy),
        )

    @property
    def whole(self) -> View:
        """The view that shows every point and the original model."""
        ratios = [1.0, *self.band, *(p.mac_ratio for p in self.points)]
        accuracies = [self.original_accuracy, *(p.accuracy for p in self.points)]
        return View(_padded(min(ratios), max(ratios)), _padded(min(accuracies), max(accuracies)))

    @property
    def zoomed(self) -> View:
        """The view of the band and half its width on each side, or 0.05 if that is less.

        It reaches down to the lowest point that is no outlier: one failed fine-tuning must not flatten all
        differences that matter. Points that are left out are counted, and the whole view has them.
        """
        low, high = self.band
        margin = min((high - low) / 2, _MARGIN)
        x = (low - margin, high + margin)
        shown = sorted(p.accuracy for p in self.points if x[0] <= p.mac_ratio <= x[1])
        top = max([self.original_accuracy, *shown])
        bottom = min([self.original_accuracy, *shown])
        if shown:
            fence = min([lower_fence(shown, top), *(p.accuracy for p in self.front)])
            bottom = min(self.original_accuracy, *(value for value in shown if value >= fence))
        return View(x, _padded(bottom, top), below=sum(value < bottom for value in shown))


def pareto_data(front: ParetoFront, *, chosen: Candidate | None = None) -> ParetoData:
    """Gather what a figure of the front shows.

    Args:
        front: The study's candidates. Only complete ones become points.
        chosen: The candidate to mark as the chosen one.
    """
    points = [c for c in front.candidates if _is_point(c)]
    scale = AccuracyScale.of(
        [front.reference.accuracy, *(c.accuracy for c in points if c.accuracy is not None)]
    )
    best = {candidate.number for candidate in front.best}
    reference = front.reference
    return ParetoData(
        points=tuple(_point(c, scale=scale, on_front=c.number in best) for c in points),
        original_accuracy=reference.accuracy,
        original_facts=(
            ("accuracy", scale.accuracy(reference.accuracy)),
            ("MACs", count(reference.macs)),
            ("parameters", count(reference.params)),
        ),
        targets=tuple(dict.fromkeys(target_ends(front.target))),
        band=front.band,
        chosen=None if chosen is None else chosen.number,
        scale=scale,
    )


def standings(front: ParetoFront) -> dict[int, str]:
    """Where each trial stands, by number: the status of its point, or its state if it has none."""
    return {c.number: c.state for c in front.candidates} | {
        point.number: point.status for point in pareto_data(front).points
    }


def lower_fence(accuracies: Sequence[float], top: float) -> float:
    """The accuracy below which a trial is an outlier: thrice as far from ``top`` as the lower quartile.

    Args:
        accuracies: One or more.
        top: The highest accuracy that matters.
    """
    if len(accuracies) < 2:
        return min(accuracies)
    quartile = statistics.quantiles(accuracies, n=4, method="inclusive")[0]
    return quartile - 2 * (top - quartile)


def _is_point(candidate: Candidate) -> bool:
    numbers = (candidate.accuracy, candidate.mac_ratio)
    return candidate.state == "complete" and all(n is not None and math.isfinite(n) for n in numbers)


def _point(candidate: Candidate, *, scale: AccuracyScale, on_front: bool) -> ParetoPoint:
    assert candidate.accuracy is not None and candidate.mac_ratio is not None
    stages = candidate.stages
    reused = [stage.name for stage in stages if stage.reused]
    facts = [
        ("finalist of", "" if candidate.finalist_of is None else f"trial {candidate.finalist_of}"),
        *((name, format_param(candidate.params[name])) for name in param_names([candidate])),
        ("mac_ratio", ratio(candidate.mac_ratio)),
        ("accuracy", scale.accuracy(candidate.accuracy)),
        ("drop", scale.drop(candidate.drop)),
        ("MACs", count(stages[-1].macs) if stages else ""),
        ("parameters", count(stages[-1].params) if stages else ""),
        *((f"after {s.name}", f"{scale.accuracy(s.accuracy)} at {ratio(s.mac_ratio)}") for s in stages),
        ("time", duration(candidate.seconds)),
        ("reused stages", f"{len(reused)} of {len(stages)}" if stages else ""),
    ]
    return ParetoPoint(
        number=candidate.number,
        accuracy=candidate.accuracy,
        mac_ratio=candidate.mac_ratio,
        feasible=candidate.feasible,
        on_front=on_front,
        facts=tuple((name, value) for name, value in facts if value),
    )


def _padded(low: float, high: float) -> Interval:
    margin = max(0.1 * (high - low), 0.002 * max(abs(low), abs(high)), 1e-9)
    return low - margin, high + margin
