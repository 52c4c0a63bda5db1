"""The search space: which ratios a trial may ask of its methods, and the recipe they make.

The ratios of two methods multiply, and their product has to meet the target. So only the first one is free;
the second is what is still missing after the first, within the target's tolerance. That way nearly every
trial is feasible, which free sampling under a constraint is not. The first trial of each first ratio aims at
the target itself, so that the ratios are compared at the same MACs; later ones choose around it.

Where the target is a range, ``[0.3, 0.8]``, a trial chooses two numbers instead, which have the same bounds
in every trial, so that samplers can look at both together: ``target``, the ratio of the whole, by its
logarithm; and ``split``, how much of that logarithm is the first method's. With 0 the second method does all,
with 1 the first, and with 0.5 both have the same ratio. The first ratio is then the nearest one on the grid,
the second exactly what is missing.

Beside the ratios there may be settings that are variables, which are chosen freely, the methods among them.
With the ``grid`` sampler nothing is: the user lists the ratios.
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
from compress_search.search.settings import METHOD_CHOICE, SearchSettings, searchable
from compress_search.search.variables import ends, suggest, value_near
from compress_search.target import SPLIT, TARGET, excess, target_text

logger = logging.getLogger("compress_search")

AchievedRatio = Callable[[Sequence[Stage]], float]
"""The exact MAC ratio, relative to the original model, after some stages."""

_QUEUED = "fixed_params"
"""Under this name Optuna keeps what was queued for a trial."""

_GUIDEBOOK_RATIO, _GUIDEBOOK_TARGET = 0.75, 0.5
"""The first ratio of the guidebook's example, 0.75 x 0.66 = 0.5, and what comes of both."""


@dataclass(frozen=True)
class Anchor:
    """A point that every study tries before it searches.

    Attributes:
        label: What it is, in words.
        ratio: The ratio asked of the first method. The second method's is exactly what is missing.
        target: The ratio of the whole.
        methods: The methods' names, as a choice of the search.
    """

    label: str
    ratio: float
    target: float
    methods: str


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
        and excess(math.prod(point), settings.target, settings.tolerance) > 1e-9
    ]
    if outside:
        logger.warning(
            "%d of the %d points of the grid are not within the tolerance of the target %s; they are tried, "
            "but will hardly be feasible: %s.",
            len(outside),
            len(points),
            target_text(settings.target),
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
    """Return the points that come first, each once.

    Either method alone, both with the same ratio, and the guidebook's example; for a single method, the
    target itself. Where the target is a range, that at its lowest, its highest and its middle. Where the
    methods are searched, that with the plain ones, and each other choice of them once, with equal ratios.
    Beside a grid, which says itself what is tried, there are none.
    """
    if settings.sampler == GRID:
        return ()
    plain, *others = _each_choice_of_methods(settings)
    found = _anchors_of_methods(plain)
    for other in others:
        # Of two methods that are tried each alone anyway, one alone is no news.
        if len(other.methods) > 1 or other.methods[0] not in plain.methods:
            name, target = other.plain_value("methods"), _targets(other)[-1]
            found.append(Anchor(f"equal ratios of {name}", _equal_ratio(other, target), target, name))
    return tuple(found)


def _each_choice_of_methods(settings: SearchSettings) -> list[SearchSettings]:
    """Return the settings with each choice of methods, the plain one first."""
    if METHOD_CHOICE not in settings.variables:
        return [settings]
    plain = _plain_values(settings)[METHOD_CHOICE]
    others = [choice for choice in ends(settings.variables[METHOD_CHOICE]) if choice != plain]
    return [settings.of_methods(str(choice)) for choice in (plain, *others)]


def _targets(settings: SearchSettings) -> tuple[float, ...]:
    """Return the target, or the lowest, the highest and the middle one of a range; the geometric middle."""
    if not isinstance(settings.target, tuple):
        return (settings.target,)
    low, high = settings.target
    middle = math.sqrt(low * high)
    # A round one, if the range is wide enough to have it.
    return low, high, round(middle, 2) if low < round(middle, 2) < high else middle


def _anchors_of_methods(settings: SearchSettings) -> list[Anchor]:
    """Return the anchors of one choice of methods."""
    targets, methods = _targets(settings), settings.plain_value("methods")
    where = {target: f" at {target:.4g}" if len(targets) > 1 else "" for target in targets}
    if len(settings.methods) == 1:
        return [Anchor(f"target{where[target]}", target, target, methods) for target in targets]
    first, second = settings.methods
    # By how much of the target's logarithm is the first method's.
    kinds = ((f"{first} only", 1.0), (f"{second} only", 0.0), ("equal ratios", 0.5))
    wanted = [(f"{kind}{where[aim]}", aim, aim**split) for kind, split in kinds for aim in targets]
    if len(targets) == 1:
        wanted.append(("guidebook", targets[0], _GUIDEBOOK_RATIO))
    elif targets[0] <= _GUIDEBOOK_TARGET <= targets[1]:
        wanted.append(("guidebook", _GUIDEBOOK_TARGET, _GUIDEBOOK_RATIO))
    found: dict[tuple[float, float], Anchor] = {}
    for label, target, ratio in wanted:
        nearest = _nearest_on_grid(ratio, target, settings.step)
        found.setdefault((target, nearest), Anchor(label, nearest, target, methods))
    return list(found.values())


def _equal_ratio(settings: SearchSettings, target: float) -> float:
    return target if len(settings.methods) == 1 else _nearest_on_grid(target**0.5, target, settings.step)


def _nearest_on_grid(ratio: float, target: float, step: float) -> float:
    return min(ratio_grid(target, step), key=lambda point: abs(point - ratio))


def enqueue_anchors(study: optuna.Study, settings: SearchSettings) -> None:
    """Queue the anchors that are not queued yet: all in a new study, the rest if that was interrupted."""
    plain = _plain_values(settings)
    queued = {trial.user_attrs.get(ANCHOR) for trial in study.get_trials(deepcopy=False)}
    for anchor in anchors(settings):
        if anchor.label not in queued:
            study.enqueue_trial({**plain, **_choices_of(anchor, settings)}, user_attrs={ANCHOR: anchor.label})


def _plain_values(settings: SearchSettings) -> dict[str, Any]:
    """What anchors choose: they are to show what the ratios do, so everything else is as without a search."""
    return {
        name: value_near(variable, settings.plain_value(name), searchable()[name])
        for name, variable in settings.variables.items()
    }


def _choices_of(anchor: Anchor, settings: SearchSettings) -> dict[str, Any]:
    """What an anchor chooses where others would too."""
    choices: dict[str, Any] = {}
    if METHOD_CHOICE in settings.variables:
        choices[METHOD_CHOICE] = anchor.methods
    if isinstance(settings.target, tuple):
        choices[TARGET] = anchor.target
        if len(settings.of_methods(anchor.methods).methods) > 1:
            choices[SPLIT] = abs(math.log(anchor.ratio) / math.log(anchor.target))
    return choices


def last_ratio_range(
    target: float, tolerance: float, achieved: float = 1.0, *, exact: bool = False
) -> tuple[float, float]:
    """Return the ratios to ask of the last method, so that the model ends in the target's band.

    A selector gives at most what it is asked for, and on small networks up to a percent less. So what is
    asked for begins half a tolerance below the target, not a whole one.

    Args:
        target: The ratio of the whole.
        tolerance: How far from it the whole may be, relative to it.
        achieved: The exact ratio of the model that the last method gets, relative to the original.
        exact: Aim at the target itself rather than at the band around it.

    Returns:
        Lowest and highest ratio, relative to the model that the method gets; both are 1 if that model is
        small enough already.
    """
    low, high = target * (1 - tolerance / 2), target * (1 + tolerance)
    if achieved <= high:
        return 1.0, 1.0
    if exact:
        return target / achieved, target / achieved
    return low / achieved, high / achieved


def propose(trial: optuna.Trial, settings: SearchSettings, achieved_ratio: AchievedRatio) -> Proposal:
    """Let a trial choose its ratios and the settings that are variables, and make its recipe.

    Every method's ratio becomes a parameter of the trial, the ones with no choice left included. The methods
    come first, if they are searched, and the target, if it is a range; then the first method's ratio; then
    the settings of compressing, which decide what it achieves; then the second ratio, then the settings of
    fine-tuning.

    Args:
        trial: The trial.
        settings: The study's settings.
        achieved_ratio: Says what the first method really achieves: sizes are whole numbers, so that it
            is not quite what was asked.

    Raises:
        RatioError: The first method cannot reach its ratio.
        optuna.TrialPruned: All points of the grid are taken.
    """
    if settings.sampler == GRID:
        return _propose_of_grid(trial, settings, achieved_ratio)
    label = trial.user_attrs.get(ANCHOR)
    anchor = next((anchor for anchor in anchors(settings) if anchor.label == label), None)
    if METHOD_CHOICE in settings.variables:
        settings = settings.of_methods(_values(trial, settings, [METHOD_CHOICE])[METHOD_CHOICE])
    aim = _suggest_target(trial, settings)
    # Where the target is chosen there is nothing to choose around it.
    exact = anchor is not None or isinstance(settings.target, tuple)
    of_tuning = [name for name in settings.variables if "." in name]
    of_compressing = [name for name in settings.variables if "." not in name]
    if len(settings.methods) == 1:
        name = METHODS[settings.methods[0]].ratio_name
        ratio = trial.suggest_float(name, *last_ratio_range(aim, settings.tolerance, exact=exact))
        return _proposal(settings.with_values(_values(trial, settings, of_compressing + of_tuning)), [ratio])

    first = _suggest_first(trial, settings, aim, anchor)
    exact = exact or _is_first_with(first, trial, settings)
    values = _values(trial, settings, of_compressing)
    try:
        second = _suggest_last(trial, settings.with_values(values), achieved_ratio, aim, first, exact=exact)
    except RatioError:
        # The sampler is to learn from this trial too, which takes all parameters.
        _values(trial, settings, of_tuning)
        raise
    values |= _values(trial, settings, of_tuning)
    return _proposal(settings.with_values(values), [first, second])


def _suggest_target(trial: optuna.Trial, settings: SearchSettings) -> float:
    """Let a trial choose its target, where that is a range."""
    if isinstance(settings.target, tuple):
        low, high = settings.target
        return trial.suggest_float(TARGET, low, high, log=True)
    return settings.target


def _suggest_first(
    trial: optuna.Trial, settings: SearchSettings, target: float, anchor: Anchor | None
) -> float:
    """Let a trial choose the first of two methods' ratio."""
    name = METHODS[settings.methods[0]].ratio_name
    if isinstance(settings.target, tuple):
        split = trial.suggest_float(SPLIT, 0.0, 1.0)
        nearest = _nearest_on_grid(target**split, target, settings.step)
        return trial.suggest_float(name, nearest, nearest)
    if anchor is not None:
        return trial.suggest_float(name, anchor.ratio, anchor.ratio)
    # The target itself leaves no choice to the second method, so the anchor has tried all of it.
    lowest = ratio_grid(target, settings.step)[1]
    return trial.suggest_float(name, lowest, 1.0, step=settings.step)


def _is_first_with(first: float, trial: optuna.Trial, settings: SearchSettings) -> bool:
    """Whether no trial that was proposed before this one asks the first method for that ratio.

    Where the user has queued the second ratio too, or the trial is of no study, no other one is meant.
    """
    study = getattr(trial, "study", None)
    if study is None:
        return False
    name, last = (METHODS[method].ratio_name for method in settings.methods)
    trials = study.get_trials(deepcopy=False)
    indices = proposal_indices(trials)
    own = indices[trial.number]
    # What a retry has in its queue is all that the trial has chosen that it stands in for.
    original = next(other for other in trials if indices.get(other.number) == own)
    if last in original.system_attrs.get(_QUEUED, {}):
        return False
    return all(other.params.get(name) != first for other in trials if indices.get(other.number, own) < own)


def _propose_of_grid(
    trial: optuna.Trial, settings: SearchSettings, achieved_ratio: AchievedRatio
) -> Proposal:
    """Take the point with the index of the proposal, so that two workers never take the same one."""
    names = [METHODS[method].ratio_name for method in settings.methods]
    points = grid_points(settings)
    index = proposal_indices(trial.study.get_trials(deepcopy=False))[trial.number]
    if index >= len(points):
        raise optuna.TrialPruned(f"all {len(points)} points of the grid are taken")
    point = points[index]
    ratios = [trial.suggest_float(name, ratio, ratio) for name, ratio in zip(names, point, strict=False)]
    if len(ratios) < len(names):
        # The settings ask for this ratio too where the target is a range.
        assert not isinstance(settings.target, tuple)
        ratios.append(_suggest_last(trial, settings, achieved_ratio, settings.target, ratios[0], exact=True))
    return _proposal(settings, ratios)


def _suggest_last(
    trial: optuna.Trial,
    settings: SearchSettings,
    achieved_ratio: AchievedRatio,
    target: float,
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
        trial.suggest_float(name, *last_ratio_range(target, settings.tolerance, first, exact=exact))
        raise
    return trial.suggest_float(name, *last_ratio_range(target, settings.tolerance, achieved, exact=exact))


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
