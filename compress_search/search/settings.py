"""SearchSettings: what a study searches for, and within which bounds."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from compress_search.exceptions import ConfigError
from compress_search.methods import METHODS
from compress_search.recipe import Compress, FineTune, compress_faults, sorted_channels
from compress_search.search.sampler import GRID, SAMPLERS, missing_package
from compress_search.search.variables import (
    Choice,
    Range,
    Variable,
    ends,
    scalar_types,
    typed,
    variable_faults,
    variable_from_dict,
    variable_to_dict,
)
from compress_search.selection import SELECTORS
from compress_search.target import Target, band_of, target_ends

_MOST_METHODS = 2
METHOD_CHOICE = "methods"
"""The one variable that decides which ratios there are."""
_AND_THEN = "+"
"""Joins the names of methods where they are a choice of the search."""

TUNINGS = ("fine_tune", "final_fine_tune")
"""The settings whose own fields can be searched, under names such as ``fine_tune.lr``."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search. Two studies with equal settings, task and seed propose the same trials.

    Attributes:
        target: MACs to keep / MACs of the original model, in (0, 1). Two of them, the lowest and the highest,
            ask for the whole front between them: then every trial chooses a target of its own.
        tolerance: How far a feasible candidate may be from the target, relative to it (0.02 is 2 %).
        methods: One or two compression methods in the order in which they are applied, keys of
            :data:`compress_search.methods.METHODS`. The last one brings the model to the target.
        selection: How each layer's size is chosen, a key of :data:`compress_search.selection.SELECTORS`.
        least_share: Every layer keeps at least this share of what it costs.
        shares: For the ``manual`` selection: the share that a layer keeps, by its name or by a pattern.
        samples: Number of unlabelled calibration examples; 0 is the data-free mode.
        sensitivity: What sensitivity tables measure: ``"divergence"`` of the outputs, without labels, or
            ``"score"``, the drop of the task's own score.
        scoring_samples: Number of calibration examples that the divergence is measured on.
        probes: At how many sizes of each layer the divergence is measured; the others follow from the error
            of the layer itself.
        on_cell_error: What to do when the score fails at one cell of a table: ``"stop"`` or ``"skip"``.
        ignore: Layers to leave alone: their names, or patterns such as ``"head.*"``.
        round_to: Ranks and channels are multiples of this.
        keep_channels: Indices of output channels that no pruning removes, by the name of the layer of the
            original model that makes them.
        per_layer_fine_tune: The fine-tuning after each single layer, or group of coupled channels, of every
            method; ``None`` compresses all layers at once.
        fine_tune: The fine-tuning after each method but the last.
        final_fine_tune: The last fine-tuning of a trial; ``None`` is as ``fine_tune``.
        variables: Settings for which every trial chooses a value, in place of the one above, by their names:
            ``"fine_tune.lr"``, ``"final_fine_tune.epochs"``, ``"selection"``. Those of ``fine_tune`` are the
            last fine-tuning's too, unless ``final_fine_tune`` is given. The choices of ``"methods"`` are
            texts, such as ``"weight_svd+channel_pruning"`` and ``"channel_pruning"``.
        step: Step of the grid of the first method's ratio. Trials with the same ratio share the first
            method's compression and fine-tuning.
        max_drop_after_ssvd: A trial whose accuracy after the first method and its fine-tuning is lower
            than the original's by more than this (0.05 is five points) is pruned; ``None`` prunes none.
        median_stopping: Whether a trial is pruned after an epoch of its last fine-tuning if half of the
            others were ahead of it by then; see :mod:`compress_search.search.median_stopping`. Anchors and
            finalists are trained to their end.
        sampler: How points are proposed, a key of :data:`compress_search.search.sampler.SAMPLERS`.
        grid: For the ``grid`` sampler: the ratios to try, by the methods' ratio names. Every combination is
            tried once, in the order of the lists, and nothing else. Without a list for the last method it
            gets what is missing to the target, which has to be one; with one the target only judges.
        seed: Fixes the proposals, the calibration samples and the fine-tuning.
    """

    target: Target
    tolerance: float = 0.02
    methods: tuple[str, ...] = ("spatial_svd", "channel_pruning")
    selection: str = "optimal"
    least_share: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    samples: int = 512
    sensitivity: str = "divergence"
    scoring_samples: int = 128
    probes: int = 3
    on_cell_error: str = "stop"
    ignore: tuple[str, ...] = ()
    round_to: int = 1
    keep_channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    per_layer_fine_tune: FineTune | None = None
    fine_tune: FineTune = field(default_factory=FineTune)
    final_fine_tune: FineTune | None = None
    variables: Mapping[str, Range | Choice] = field(default_factory=dict)
    step: float = 0.05
    max_drop_after_ssvd: float | None = None
    median_stopping: bool = False
    sampler: str = "tpe"
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        # JSON has no tuples.
        target: Any = self.target
        if isinstance(target, list):
            object.__setattr__(self, "target", tuple(target))
        if faults := _faults_of(self):
            raise ConfigError(faults, source="search settings")
        object.__setattr__(self, "keep_channels", sorted_channels(self.keep_channels))
        object.__setattr__(self, "variables", dict(sorted(self.variables.items())))
        object.__setattr__(self, "grid", {name: tuple(ratios) for name, ratios in self.grid.items()})

    def plain_value(self, name: str) -> Any:
        """Return the value that a setting has without a search.

        Args:
            name: One of :func:`searchable`.
        """
        group, _, name_in_group = name.rpartition(".")
        if not group:
            return _AND_THEN.join(self.methods) if name == METHOD_CHOICE else getattr(self, name)
        tuning = self.final_fine_tune if group == "final_fine_tune" else None
        return getattr(tuning or self.fine_tune, name_in_group)

    def with_values(self, values: Mapping[str, Any]) -> SearchSettings:
        """Return the settings of one trial, in which nothing is left to search but the ratios.

        Args:
            values: A value for each variable, by its name. What is missing is as without a search.
        """
        own, first, last = (
            {name.rpartition(".")[2]: value for name, value in values.items() if name.rpartition(".")[0] == g}
            for g in ("", *TUNINGS)
        )
        own = _as_settings(own)
        tuning, final = dataclasses.replace(self.fine_tune, **first), self.final_fine_tune
        if last:
            final = dataclasses.replace(tuning if final is None else final, **last)
        return dataclasses.replace(self, **own, fine_tune=tuning, final_fine_tune=final, variables={})

    def of_methods(self, methods: str) -> SearchSettings:
        """Return the settings with one of the choices of ``methods``; everything else is left to search.

        Args:
            methods: Such as ``"weight_svd+channel_pruning"``.
        """
        others = {name: variable for name, variable in self.variables.items() if name != METHOD_CHOICE}
        return dataclasses.replace(self, **_as_settings({METHOD_CHOICE: methods}), variables=others)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values."""
        return dataclasses.asdict(self) | {
            "target": list(self.target) if isinstance(self.target, tuple) else self.target,
            "methods": list(self.methods),
            "ignore": list(self.ignore),
            "keep_channels": {name: list(channels) for name, channels in self.keep_channels.items()},
            "grid": {name: list(ratios) for name, ratios in self.grid.items()},
            "variables": {name: variable_to_dict(variable) for name, variable in self.variables.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SearchSettings:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            **{
                **value,
                "methods": tuple(value["methods"]),
                "ignore": tuple(value["ignore"]),
                "fine_tune": FineTune(**value["fine_tune"]),
                "final_fine_tune": _fine_tune_of(value["final_fine_tune"]),
                # Studies that are older than these settings do not name them.
                "per_layer_fine_tune": _fine_tune_of(value.get("per_layer_fine_tune")),
                "grid": {name: tuple(ratios) for name, ratios in value.get("grid", {}).items()},
                "variables": {
                    name: variable_from_dict(variable)
                    for name, variable in value.get("variables", {}).items()
                },
            }
        )


@cache
def searchable() -> Mapping[str, frozenset[type]]:
    """Return every setting that can be a variable, with its types: those of fine-tunings and of stages."""
    own, of_tuning = typing.get_type_hints(SearchSettings), typing.get_type_hints(FineTune)
    stages = [item.name for item in dataclasses.fields(Compress) if item.name in own]
    hints = {name: own[name] for name in stages}
    hints |= {f"{group}.{name}": hint for group in TUNINGS for name, hint in of_tuning.items()}
    found = {name: types for name, hint in hints.items() if (types := scalar_types(hint))}
    return {**found, METHOD_CHOICE: frozenset({str})}


def methods_of(choice: str) -> tuple[str, ...]:
    """Read a choice of ``methods``, such as ``"weight_svd+channel_pruning"``."""
    return tuple(choice.split(_AND_THEN))


def _as_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn values of variables into those of the settings of these names."""
    settings = dict(values)
    if METHOD_CHOICE in settings:
        settings[METHOD_CHOICE] = methods_of(settings[METHOD_CHOICE])
    return settings


def _fine_tune_of(value: Mapping[str, Any] | None) -> FineTune | None:
    return None if value is None else FineTune(**value)


def _faults_of(settings: SearchSettings) -> list[str]:
    s = settings
    checks = (
        ("step", s.step, _is_share(s.step), "in (0, 1), for example 0.05"),
        (
            "max_drop_after_ssvd",
            s.max_drop_after_ssvd,
            s.max_drop_after_ssvd is None
            or (_is_number(s.max_drop_after_ssvd) and s.max_drop_after_ssvd >= 0),
            "0 or more (0.05 is five points), or none",
        ),
        (
            "median_stopping",
            s.median_stopping,
            isinstance(s.median_stopping, bool),
            "true or false",
        ),
        ("seed", s.seed, _is_number(s.seed, whole=True) and s.seed >= 0, "a whole number, 0 or more"),
    )
    faults = [f"{name} is {value!r}; it must be {what}." for name, value, good, what in checks if not good]
    aim = _target_faults(s.target)
    faults = aim + faults + _tolerance_faults(s.tolerance, None if aim else s.target) + compress_faults(s)
    if not 1 <= len(s.methods) <= _MOST_METHODS:
        faults.append(f"methods has {len(s.methods)} names; give one or two of: {', '.join(METHODS)}.")
    faults += [f"methods names {name!r} twice." for name in sorted({*s.methods}) if s.methods.count(name) > 1]
    for name in s.methods:
        faults += _unknown("methods", name, METHODS)
    faults += _unknown("selection", s.selection, SELECTORS)
    faults += _unknown("sampler", s.sampler, SAMPLERS)
    if package := missing_package(s.sampler):
        faults.append(
            f"sampler is {s.sampler!r}, which needs {package}: pip install {package}, or choose tpe, which "
            "needs nothing."
        )
    # Points are judged by the target, which has to be sound for that.
    return faults + ([] if aim else _grid_faults(s)) + _variables_faults(s)


def _grid_faults(settings: SearchSettings) -> list[str]:
    names = [METHODS[method].ratio_name for method in settings.methods if method in METHODS]
    example = f"grid={{{', '.join(f'{name!r}: [0.9, 0.8]' for name in names)}}}"
    grid: Any = settings.grid
    if not isinstance(grid, Mapping):
        return [f"grid is {grid!r}; it must be a mapping of ratio names to lists, such as {example}."]
    if settings.sampler != GRID:
        unused = f"grid is given, but the sampler {settings.sampler!r} does not use it. "
        return [f"{unused}Choose sampler={GRID!r}, or leave grid out."] if grid else []
    if not names:
        return []
    if not grid:
        return [f"sampler is {GRID!r}, which needs the ratios to try: {example}."]
    faults = [fault for name in grid for fault in _unknown("grid", name, names)]
    if names[0] not in grid:
        faults.append(
            f"grid has no {names[0]}, the ratio of {settings.methods[0]}. Write, for example, {example}."
        )
    if settings.variables:
        faults.append(
            f"variables names {', '.join(map(str, settings.variables))}, but the sampler {GRID!r} tries the "
            "ratios of grid and nothing else. Leave variables out, or choose another sampler."
        )
    own = [fault for name in names if name in grid for fault in _faults_of_ratios(name, grid[name])]
    if own or faults:
        return faults + own
    return _faults_of_points(settings, names)


def _faults_of_ratios(name: str, ratios: Any) -> list[str]:
    if isinstance(ratios, str) or not isinstance(ratios, Sequence) or not ratios:
        return [f"grid.{name} is {ratios!r}; it must be a list of ratios, for example [0.9, 0.8]."]
    wrong = [r for r in ratios if isinstance(r, bool) or not isinstance(r, int | float) or not 0 < r <= 1]
    if wrong:
        return [f"grid.{name} has {', '.join(map(repr, wrong))}; ratios are in (0, 1]: MACs kept / MACs."]
    twice = sorted({ratio for ratio in ratios if list(ratios).count(ratio) > 1})
    return [f"grid.{name} has {', '.join(map(repr, twice))} twice. Remove one."] if twice else []


def _faults_of_points(settings: SearchSettings, names: Sequence[str]) -> list[str]:
    first, last = settings.grid[names[0]], settings.grid.get(names[-1])
    if last is None:
        if isinstance(settings.target, tuple):
            return [
                f"grid has no {names[-1]}, but what is missing to a target that is a range, "
                f"{list(settings.target)}, is not one ratio. List the ratios of {names[-1]} too, or give one "
                "target."
            ]
        # Of what is less than the target nothing may be removed, so that it can only end beside it.
        low, _ = band_of(settings.target, settings.tolerance)
        if less := [ratio for ratio in first if ratio < low]:
            return [
                f"grid.{names[0]} has {', '.join(map(repr, less))}, less than the target {settings.target!r} "
                f"and its tolerance, so that nothing is left for {names[-1]}. Remove it, or list ratios of "
                f"{names[-1]} too."
            ]
    elif 1 in first and 1 in last:
        both = " and ".join(f"grid.{name}" for name in dict.fromkeys(names))
        return [f"{both} {'have' if len(names) > 1 else 'has'} 1, which is the original model. Remove it."]
    return []


def _variables_faults(settings: SearchSettings) -> list[str]:
    variables: Any = settings.variables
    if not isinstance(variables, Mapping):
        return [
            f"variables is {variables!r}; it must be a mapping, such as "
            "{'fine_tune.lr': Range(1e-4, 1e-1, log=True)}."
        ]
    faults: list[str] = []
    for name, variable in variables.items():
        types = searchable().get(name)
        if types is None:
            faults.append(_not_searchable(name))
        elif own := variable_faults(name, variable, types):
            faults += own
        else:
            faults += _faults_of_values(settings, name, variable, types)
    return faults


def _not_searchable(name: str) -> str:
    near = difflib.get_close_matches(str(name), searchable(), n=1)
    own = ", ".join(known for known in searchable() if "." not in known)
    remedy = f"Did you mean {near[0]!r}?" if near else f"There are {own}, and fine_tune.lr and the like."
    return f"variables names {name!r}, which is no setting that can be searched. {remedy}"


def _faults_of_values(
    settings: SearchSettings, name: str, variable: Variable, types: frozenset[type]
) -> list[str]:
    """Say which values a setting does not take, by trying them."""
    group, _, name_in_group = name.rpartition(".")
    faults = []
    for value in ends(variable):
        changes = _as_settings({name_in_group: typed(value, types)})
        try:
            if not group:
                # Beside sound settings: the faults of the others are told by themselves.
                SearchSettings(target=0.5, **changes)
            else:
                dataclasses.replace(
                    (settings.final_fine_tune if group == "final_fine_tune" else None) or settings.fine_tune,
                    **changes,
                )
        except ConfigError as error:
            faults += [f"{group}.{fault}" if group else fault for fault in error.faults]
    return list(dict.fromkeys(faults))


def _target_faults(target: Any) -> list[str]:
    ends = target if isinstance(target, tuple) else (target,)
    if not ends or not all(map(_is_share, ends)):
        what = (
            "in (0, 1): the share of the MACs to keep (0.5 keeps half), or the lowest and the highest of a "
            "range, such as [0.3, 0.8]"
        )
    elif isinstance(target, tuple) and not (len(ends) == 2 and ends[0] < ends[1]):
        what = (
            "the lowest ratio of a range and then the highest, such as [0.3, 0.8], or a single ratio "
            "without brackets"
        )
    else:
        return []
    return [f"target is {_written(target)}; it must be {what}."]


def _tolerance_faults(tolerance: float, target: Target | None) -> list[str]:
    """Say what is wrong with the tolerance; ``None`` stands for a target that is wrong itself."""
    if not _is_number(tolerance):
        return [f"tolerance is {tolerance!r}; it must be a number, for example 0.02."]
    if not tolerance > 0:
        return [
            f"tolerance is {tolerance!r}, which leaves no room: sizes are whole numbers, so a target is met "
            "only nearly. Give a positive share of the target, for example 0.02."
        ]
    most = 1.0 if target is None else min(1.0, 1 / target_ends(target)[1] - 1)
    if not tolerance < most:
        around = "" if target is None else f" {_written(target)}"
        return [
            f"tolerance is {tolerance!r}, so that the band around the target{around} leaves (0, 1). "
            f"Give less than {most:.4g}, for example 0.02."
        ]
    return []


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1


def _is_number(value: object, *, whole: bool = False) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _written(target: Any) -> str:
    """A target as it stands in a YAML file."""
    return repr(list(target) if isinstance(target, tuple) else target)


def _unknown(field: str, name: Any, table: Collection[str]) -> list[str]:
    if isinstance(name, str) and name in table:
        return []
    near = difflib.get_close_matches(str(name), table, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(table)}."
    return [f"{field} names {name!r}, which does not exist. {remedy}"]
