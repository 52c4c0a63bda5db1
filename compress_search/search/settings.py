"""SearchSettings: what a study searches for, and within which bounds."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from compress_search.exceptions import ConfigError
from compress_search.methods import METHODS
from compress_search.recipe import FineTune, compress_faults, sorted_channels
from compress_search.search.sampler import SAMPLERS
from compress_search.selection import SELECTORS

_MOST_METHODS = 2


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search. Two studies with equal settings, task and seed propose the same trials.

    Attributes:
        target: MACs to keep / MACs of the original model, in (0, 1).
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
        step: Step of the grid of the first method's ratio. Trials with the same ratio share the first
            method's compression and fine-tuning.
        max_drop_after_ssvd: A trial whose accuracy after the first method and its fine-tuning is lower
            than the original's by more than this (0.05 is five points) is pruned; ``None`` prunes none.
        sampler: How points are proposed, a key of :data:`compress_search.search.sampler.SAMPLERS`.
        seed: Fixes the proposals, the calibration samples and the fine-tuning.
    """

    target: float
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
    step: float = 0.05
    max_drop_after_ssvd: float | None = None
    sampler: str = "tpe"
    seed: int = 0

    def __post_init__(self) -> None:
        if faults := _faults_of(self):
            raise ConfigError(faults, source="search settings")
        object.__setattr__(self, "keep_channels", sorted_channels(self.keep_channels))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values."""
        return dataclasses.asdict(self) | {
            "methods": list(self.methods),
            "ignore": list(self.ignore),
            "keep_channels": {name: list(channels) for name, channels in self.keep_channels.items()},
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
                # Studies that are older than this setting do not name it.
                "per_layer_fine_tune": _fine_tune_of(value.get("per_layer_fine_tune")),
            }
        )


def _fine_tune_of(value: Mapping[str, Any] | None) -> FineTune | None:
    return None if value is None else FineTune(**value)


def _faults_of(settings: SearchSettings) -> list[str]:
    s = settings
    checks = (
        ("target", s.target, 0 < s.target < 1, "in (0, 1): the share of the MACs to keep (0.5 keeps half)"),
        ("step", s.step, 0 < s.step < 1, "in (0, 1), for example 0.05"),
        (
            "max_drop_after_ssvd",
            s.max_drop_after_ssvd,
            s.max_drop_after_ssvd is None or s.max_drop_after_ssvd >= 0,
            "0 or more (0.05 is five points), or none",
        ),
        ("seed", s.seed, s.seed >= 0, "0 or more"),
    )
    faults = [f"{name} is {value!r}; it must be {what}." for name, value, good, what in checks if not good]
    faults += _tolerance_faults(s)
    faults += compress_faults(s)
    if not 1 <= len(s.methods) <= _MOST_METHODS:
        faults.append(f"methods has {len(s.methods)} names; give one or two of: {', '.join(METHODS)}.")
    faults += [f"methods names {name!r} twice." for name in sorted({*s.methods}) if s.methods.count(name) > 1]
    for name in s.methods:
        faults += _unknown("methods", name, METHODS)
    faults += _unknown("selection", s.selection, SELECTORS)
    faults += _unknown("sampler", s.sampler, SAMPLERS)
    return faults


def _tolerance_faults(settings: SearchSettings) -> list[str]:
    target, tolerance = settings.target, settings.tolerance
    if not tolerance > 0:
        return [
            f"tolerance is {tolerance!r}, which leaves no room: sizes are whole numbers, so a target is met "
            "only nearly. Give a positive share of the target, for example 0.02."
        ]
    most = min(1.0, 1 / target - 1) if 0 < target < 1 else 1.0
    if not tolerance < most:
        return [
            f"tolerance is {tolerance!r}, so that the band around the target {target!r} leaves (0, 1). "
            f"Give less than {most:.4g}, for example 0.02."
        ]
    return []


def _unknown(field: str, name: str, table: Collection[str]) -> list[str]:
    if name in table:
        return []
    near = difflib.get_close_matches(str(name), table, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(table)}."
    return [f"{field} names {name!r}, which does not exist. {remedy}"]
