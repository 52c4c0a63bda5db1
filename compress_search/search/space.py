"""The search space: which ratios a trial may ask of its methods, and the recipe they make.

The ratios of two methods multiply, and their product has to meet the target. So only the first one is free;
the second is what is still missing after the first, within the target's tolerance. That way nearly every
trial is feasible, which free sampling under a constraint is not.

Beside the ratios there may be settings that are variables, which are chosen freely. With the ``grid`` sampler
nothing is: the user lists the ratios.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

import optuna

from compress_search.exceptions import RatioError
from compress_search.methods import METHODS
from compress_search.recipe import Compress, Recipe, Stage
from compress_search.search.history import ANCHOR, proposal_indices
from compress_search.search.sampler import GRID
from compress_search.search.settings import SearchSettings, searchable
from compress_search.search.variables import suggest, value_near

logger = logging.getLogger("compress_search")

AchievedRatio = Callable[[Sequence[Stage]], float]
"""The exact MAC ratio, relative to the original model, after some stages."""

_GUIDEBOOK_RATIO = 0.75
"""The first ratio of the guidebook's example: 0.75 x 0.66 = 0.5."""


@dataclass(frozen=True)
class Anchor:
    """A point that every study tries before it searches.

    Attributes:
        label: What it is, in words.
        ratio: The ratio asked of the first method. The second method's is exactly what is missing.
    """

    label: str
    ratio: float


@dataclass(frozen=True)
class Proposal:
    """What a trial is to do.

    Attributes:
        recipe: Its stages.
        gate_after: The number of stages after which the accuracy decides whether the rest is worth it;
            ``None`` if there is nothing to save.
    """

    recipe: Recipe
    gate_after: int | None


def ratio_grid(target: float, step: float) -> tuple[float, ...]:
    """Return the ratios that the first of two methods may be asked for, ascending.

    They are counted down from 1 in whole steps, so that studies with different targets share them, and
    with them the stages; the target itself is the lowest one.
    """
    points = []
    point, low = Decimal(1), Decimal(str(target))
    while point > low:
        points.append(float(point))
        point -= Decimal(str(step))
    return (target, *reversed(points))


def grid_points(settings: SearchSettings) -> tuple[tuple[float, ...], ...]:
    """Return the points of the ``grid`` sampler, in the order in which they are tried.

    Returns:
        The ratio of each method; the last one's is left out where it is to be what is missing.
    """
    names = [METHODS[method].ratio_name for method in settings.methods]
    return tuple(itertools.product(*(settings.grid[name] for name in names if name in settings.grid)))


def trials_in_reach(settings: SearchSettings, n_trials: int) -> int:
    """Return how many trials there can be of a number that is asked for, and log if they are fewer.

    A grid has so many points and no more. Those that ask for something else than the target are logged too.
    """
    if settings.sampler != GRID:
        return n_trials
    points = grid_points(settings)
    outside = [
        point
        for point in points
        if len(point) == len(settings.methods)
        and abs(math.prod(point) - settings.target) > settings.tolerance * settings.target * (1 + 1e-9)
    ]
    if outside:
        logger.warning(
            "%d of the %d points of the grid are not within the tolerance of the target %g; they are tried, "
            "but will hardly be feasible: %s.",
            len(outside),
            len(points),
            settings.target,
            ", ".join(" x ".join(f"{ratio:g}" for ratio in point) for point in outside),
        )
    if n_trials > len(points):
        logger.info(
            "The grid has %d points, so that the study ends with %d trials, not %d.",
            len(points),
            len(points),
            n_trials,
        )
    return min(n_trials, len(points))


def anchors(settings: SearchSettings) -> tuple[Anchor, ...]:
    """Return the points that come first, each ratio once.

    Either method alone, both with the same ratio, and the guidebook's example; for a single method, the
    target itself. Beside a grid, which says itself what is tried, there are none.
    """
    if settings.sampler == GRID:
        return ()
    target = settings.target
    if len(settings.methods) == 1:
        return (Anchor("target", target),)
    first, second = settings.methods
    grid = ratio_grid(target, settings.step)
    wanted = (
        (f"{first} only", target),
        (f"{second} only", 1.0),
        ("equal ratios", target**0.5),
        ("guidebook", _GUIDEBOOK_RATIO),
    )
    found: dict[float, Anchor] = {}
    for label, ratio in wanted:
        nearest = min(grid, key=lambda point: abs(point - ratio))
        found.setdefault(nearest, Anchor(label, nearest))
    return tuple(found.values())


def enqueue_anchors(study: optuna.Study, settings: SearchSettings) -> None:
    """Queue the anchors that are not queued yet: all in a new study, the rest if that was interrupted."""
    # An anchor is to show what the ratios do, so that everything else is as without a search.
    plain = {
        name: value_near(variable, settings.plain_value(name), searchable()[name])
        for name, variable in settings.variables.items()
    }
    queued = {trial.user_attrs.get(ANCHOR) for trial in study.get_trials(deepcopy=False)}
    for anchor in anchors(settings):
        if anchor.label not in queued:
            study.enqueue_trial(plain, user_attrs={ANCHOR: anchor.label})


def last_ratio_range(
    settings: SearchSettings, achieved: float = 1.0, *, exact: bool = False
) -> tuple[float, float]:
    """Return the ratios to ask of the last method, so that the model ends in the target's band.

    A selector gives at most what it is asked for, and on small networks up to a percent less. So what is
    asked for begins half a tolerance below the target, not a whole one.

    Args:
        settings: The study's settings.
        achieved: The exact ratio of the model that the last method gets, relative to the original.
        exact: Aim at the target itself rather than at the band around it.

    Returns:
        Lowest and highest ratio, relative to the model that the method gets; both are 1 if that model is
        small enough already.
    """
    low, high = settings.target * (1 - settings.tolerance / 2), settings.target * (1 + settings.tolerance)
    if achieved <= high:
        return 1.0, 1.0
    if exact:
        return settings.target / achieved, settings.target / achieved
    return low / achieved, high / achieved


def propose(trial: optuna.Trial, settings: SearchSettings, achieved_ratio: AchievedRatio) -> Proposal:
    """Let a trial choose its ratios and the settings that are variables, and make its recipe.

    Every method's ratio becomes a parameter of the trial, the ones with no choice left included. The first
    method's ratio comes first, then the settings of compressing, which decide what it achieves; then the
    second ratio, then the settings of fine-tuning.

    Args:
        trial: The trial.
        settings: The study's settings.
        achieved_ratio: Says what the first method really achieves: sizes are whole numbers, so that it
            is not quite what was asked.

    Raises:
        RatioError: The first method cannot reach its ratio.
        optuna.TrialPruned: All points of the grid are taken.
    """
    names = [METHODS[method].ratio_name for method in settings.methods]
    if settings.sampler == GRID:
        return _propose_of_grid(trial, settings, achieved_ratio, names)
    label = trial.user_attrs.get(ANCHOR)
    anchor = next((anchor for anchor in anchors(settings) if anchor.label == label), None)
    exact = anchor is not None
    of_tuning = [name for name in settings.variables if "." in name]
    of_compressing = [name for name in settings.variables if "." not in name]
    if len(names) == 1:
        ratio = trial.suggest_float(names[0], *last_ratio_range(settings, exact=exact))
        return _proposal(settings.with_values(_values(trial, settings, of_compressing + of_tuning)), [ratio])

    if anchor is not None:
        first = trial.suggest_float(names[0], anchor.ratio, anchor.ratio)
    else:
        # The target itself leaves no choice to the second method, so the anchor has tried all of it.
        lowest = ratio_grid(settings.target, settings.step)[1]
        first = trial.suggest_float(names[0], lowest, 1.0, step=settings.step)
    values = _values(trial, settings, of_compressing)
    try:
        second = _suggest_last(trial, settings.with_values(values), achieved_ratio, first, exact=exact)
    except RatioError:
        # The sampler is to learn from this trial too, which takes all parameters.
        _values(trial, settings, of_tuning)
        raise
    values |= _values(trial, settings, of_tuning)
    return _proposal(settings.with_values(values), [first, second])


def _propose_of_grid(
    trial: optuna.Trial, settings: SearchSettings, achieved_ratio: AchievedRatio, names: Sequence[str]
) -> Proposal:
    """Take the point with the index of the proposal, so that two workers never take the same one."""
    points = grid_points(settings)
    index = proposal_indices(trial.study.get_trials(deepcopy=False))[trial.number]
    if index >= len(points):
        raise optuna.TrialPruned(f"all {len(points)} points of the grid are taken")
    point = points[index]
    ratios = [trial.suggest_float(name, ratio, ratio) for name, ratio in zip(names, point, strict=False)]
    if len(ratios) < len(names):
        ratios.append(_suggest_last(trial, settings, achieved_ratio, ratios[0], exact=True))
    return _proposal(settings, ratios)


def _suggest_last(
    trial: optuna.Trial,
    settings: SearchSettings,
    achieved_ratio: AchievedRatio,
    first: float,
    *,
    exact: bool,
) -> float:
    """Let a trial choose the second method's ratio, after what the first one really achieves.

    Raises:
        RatioError: The first method cannot reach its ratio. The parameter is recorded all the same.
    """
    name = METHODS[settings.methods[1]].ratio_name
    try:
        achieved = achieved_ratio([_compress(settings, settings.methods[0], first)]) if first < 1 else 1.0
    except RatioError:
        trial.suggest_float(name, *last_ratio_range(settings, first, exact=exact))
        raise
    return trial.suggest_float(name, *last_ratio_range(settings, achieved, exact=exact))


def _values(trial: optuna.Trial, settings: SearchSettings, names: Iterable[str]) -> dict[str, Any]:
    return {name: suggest(trial, name, settings.variables[name], searchable()[name]) for name in names}


def _proposal(settings: SearchSettings, ratios: Sequence[float]) -> Proposal:
    """Leave out what a ratio of 1 makes needless, and train last as the settings say for the last."""
    used = [(method, ratio) for method, ratio in zip(settings.methods, ratios, strict=True) if ratio < 1]
    halves: list[list[Stage]] = []
    for position, (method, ratio) in enumerate(used, start=1):
        tuning = settings.fine_tune
        if position == len(used) and settings.final_fine_tune is not None:
            tuning = settings.final_fine_tune
        stages: list[Stage] = [_compress(settings, method, ratio)]
        halves.append([*stages, tuning] if tuning.epochs else stages)
    return Proposal(
        Recipe(tuple(stage for half in halves for stage in half)),
        gate_after=len(halves[0]) if len(halves) > 1 else None,
    )


def _compress(settings: SearchSettings, method: str, ratio: float) -> Compress:
    # What a stage and the settings both have has the same name and means the same.
    shared = {field.name for field in fields(Compress)} & {field.name for field in fields(settings)}
    return Compress(method=method, mac_ratio=ratio, **{name: getattr(settings, name) for name in shared})
