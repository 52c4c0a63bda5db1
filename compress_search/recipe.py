"""Recipe: the intent of one trial, an ordered list of stages. It is what the search proposes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from compress_search.exceptions import ConfigError, RatioError

COSTS = ("macs", "params")
SENSITIVITIES = ("divergence", "score")
ON_CELL_ERROR = ("stop", "skip")
OPTIMISERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "one_cycle", "multi_step")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Compress:
    """A stage that compresses.

    Attributes:
        method: Name of a method, a key of :data:`compress_search.methods.METHODS`.
        mac_ratio: MACs to keep / MACs of the model that this stage gets, in (0, 1].
        selection: How each layer's size is chosen, a key of :data:`compress_search.selection.SELECTORS`.
        cost: What the ratio counts, ``"macs"`` or ``"params"``.
        least_share: Every layer keeps at least this share of what it costs.
        shares: For the ``manual`` selection: the share that a layer keeps, by its name or by a pattern such
            as ``"layer3.*"``.
        samples: Number of unlabelled calibration examples; 0 is the data-free mode.
        sensitivity: What the sensitivity table measures: ``"divergence"`` of the outputs from those of the
            model that this stage gets, without labels; or ``"score"``, the drop of the task's own score.
        scoring_samples: Number of calibration examples that the divergence is measured on.
        probes: At how many sizes of each layer the divergence is measured; the others follow from the error
            of the layer itself.
        on_cell_error: What to do when the score fails at one cell of the table: ``"stop"`` or ``"skip"``.
        ignore: Layers to leave alone: their names, or patterns such as ``"head.*"``.
        round_to: Ranks and channels are multiples of this.
        keep_channels: Indices of output channels that no pruning removes, by the name of the layer that makes
            them; in a study, a layer of the original model.
        per_layer_fine_tune: The fine-tuning after each single layer, or group of coupled channels, before the
            next one is compressed; ``None``, or 0 epochs, compresses all at once.
    """

    method: str
    mac_ratio: float
    selection: str = "optimal"
    cost: str = "macs"
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

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if faults := compress_faults(self):
            raise ConfigError(faults, source="compress")
        if self.per_layer_fine_tune is not None and self.per_layer_fine_tune.epochs == 0:
            # One way of writing it, so that equal wishes have equal hashes.
            object.__setattr__(self, "per_layer_fine_tune", None)
        object.__setattr__(self, "keep_channels", sorted_channels(self.keep_channels))
        check_ratio(self.mac_ratio, what=f"mac_ratio of {self.method}")

    @property
    def name(self) -> str:
        """What the stage is called in results."""
        return self.method


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A stage that trains the model on.

    By default: stochastic gradient descent with Nesterov momentum and a cosine schedule after a linear
    warm-up, with knowledge distillation from the original model (Hinton et al. 2015).

    Attributes:
        epochs: Number of passes over the training data; 0 skips the stage.
        lr: Highest learning rate.
        optimiser: ``"sgd"`` (with Nesterov momentum) or ``"adamw"`` (Loshchilov & Hutter 2019).
        momentum: Nesterov momentum; with ``"adamw"`` the first of its two betas.
        weight_decay: L2 penalty; not applied to biases and batch normalisation.
        schedule: ``"cosine"``, ``"one_cycle"`` or ``"multi_step"``; see
            :mod:`compress_search.training.schedules`.
        warmup: Share of all steps in which the learning rate rises, in [0, 1).
        milestones: For ``"multi_step"``: shares of all steps, each in (0, 1), after which the rate falls.
        gamma: For ``"multi_step"``: what the rate is multiplied by at each milestone, in (0, 1).
        distillation: Weight of the distillation loss in [0, 1]; the task's loss has the rest. With 1 the
            training data needs no labels.
        temperature: Softening of both distributions in the distillation loss.
        label_smoothing: Share of each label that is spread over all classes, in [0, 1); for a task whose
            loss is ``torch.nn.CrossEntropyLoss``.
        gradient_clip: Largest norm of the gradient; ``None`` for any.
        ema: Decay of an exponential moving average of the weights, in [0, 1), which is then evaluated and
            kept in place of the weights themselves; 0 for none. 0.999 is usual.
        freeze_batch_norm: Whether batch normalisation keeps its running statistics as they are, and uses
            them in training too.
        precision: ``"float32"``; ``"bfloat16"`` or ``"float16"`` for automatic mixed precision; ``"auto"``
            is mixed precision on a GPU (bfloat16 where it has that) and float32 elsewhere.
        channels_last: Whether images are laid out with their channels last, if the model gives the same
            outputs on them. It is quicker, on CPUs as on GPUs.
        compile: Whether the model is compiled by ``torch.compile``.
        options: For a task with a training function of its own: whatever that wants to know, JSON-able.
    """

    epochs: int = 10
    lr: float = 0.02
    optimiser: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    distillation: float = 0.7
    temperature: float = 3.0
    label_smoothing: float = 0.0
    gradient_clip: float | None = 5.0
    ema: float = 0.0
    freeze_batch_norm: bool = False
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if faults := _fine_tune_faults(self):
            raise ConfigError(faults, source="fine_tune")
        # JSON has no tuples.
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))

    @property
    def name(self) -> str:
        """What the stage is called in results."""
        return "fine_tune"


Stage = Compress | FineTune


@dataclass(frozen=True)
class Recipe:
    """The ordered stages of one trial."""

    stages: tuple[Stage, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the recipe as JSON-able values."""
        return [stage_to_dict(stage) for stage in self.stages]

    @classmethod
    def from_dict(cls, value: list[Mapping[str, Any]]) -> Recipe:
        """Read what :meth:`to_dict` wrote."""
        return cls(tuple(map(_stage_from_dict, value)))


def stage_to_dict(stage: Stage) -> dict[str, Any]:
    """Return one stage as JSON-able values."""
    if isinstance(stage, FineTune):
        return {"stage": "fine_tune", **dataclasses.asdict(stage)}
    value = {"stage": "compress", **dataclasses.asdict(stage)}
    if stage.per_layer_fine_tune is None:
        # It is younger than the stages that workspaces hold under hashes of the rest.
        del value["per_layer_fine_tune"]
    return value


def _stage_from_dict(value: Mapping[str, Any]) -> Stage:
    settings = {name: value[name] for name in value if name != "stage"}
    if value["stage"] == "fine_tune":
        return FineTune(**settings)
    tuning = settings.pop("per_layer_fine_tune", None)
    return Compress(**settings, per_layer_fine_tune=None if tuning is None else FineTune(**tuning))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def compress_faults(settings: Any) -> list[str]:
    """Say what is wrong with the settings of :class:`Compress`, or of others that have the same names.

    Only the fields that ``settings`` has are looked at; model, methods and selectors are not.
    """
    s = settings
    checks = [
        ("samples", _is_count(s.samples), "0 (data-free) or more"),
        ("scoring_samples", _is_count(s.scoring_samples) and s.scoring_samples > 0, "1 or more"),
        ("probes", _is_count(s.probes) and s.probes > 0, "1 or more"),
        ("round_to", _is_count(s.round_to) and s.round_to > 0, "1 (no rounding) or more, for example 8"),
        ("least_share", _is_number(s.least_share) and 0 <= s.least_share < 1, "a number in [0, 1)"),
        ("sensitivity", s.sensitivity in SENSITIVITIES, _one_of(SENSITIVITIES)),
        ("on_cell_error", s.on_cell_error in ON_CELL_ERROR, _one_of(ON_CELL_ERROR)),
        ("cost", getattr(s, "cost", "macs") in COSTS, _one_of(COSTS)),
    ]
    wrong = [(name, what) for name, good, what in checks if not good]
    faults = [f"{name} is {getattr(s, name)!r}; it must be {what}." for name, what in wrong]
    if not isinstance(s.per_layer_fine_tune, FineTune | None):
        faults.append(
            f"per_layer_fine_tune is {s.per_layer_fine_tune!r}; it must be settings of fine-tuning, such as "
            "FineTune(epochs=1), or None."
        )
    return faults + _share_faults(s.shares) + kept_channels_faults(s.keep_channels)


def _fine_tune_faults(s: FineTune) -> list[str]:
    checks = (
        ("epochs", _is_count(s.epochs), "a whole number, 0 or more"),
        ("lr", _is_number(s.lr) and 0 < s.lr < math.inf, "a positive number"),
        ("optimiser", s.optimiser in OPTIMISERS, _one_of(OPTIMISERS)),
        ("momentum", _is_number(s.momentum) and 0 <= s.momentum < 1, "in [0, 1)"),
        ("weight_decay", _is_number(s.weight_decay) and 0 <= s.weight_decay < math.inf, "0 or more"),
        ("schedule", s.schedule in SCHEDULES, _one_of(SCHEDULES)),
        ("warmup", _is_number(s.warmup) and 0 <= s.warmup < 1, "in [0, 1)"),
        ("milestones", _are_shares(s.milestones), "shares of all steps in (0, 1), such as [0.5, 0.75]"),
        ("gamma", _is_number(s.gamma) and 0 < s.gamma < 1, "in (0, 1), for example 0.1"),
        ("distillation", _is_number(s.distillation) and 0 <= s.distillation <= 1, "in [0, 1]"),
        ("temperature", _is_number(s.temperature) and 0 < s.temperature < math.inf, "a positive number"),
        ("label_smoothing", _is_number(s.label_smoothing) and 0 <= s.label_smoothing < 1, "in [0, 1)"),
        (
            "gradient_clip",
            s.gradient_clip is None or (_is_number(s.gradient_clip) and 0 < s.gradient_clip < math.inf),
            "a positive number, or none",
        ),
        ("ema", _is_number(s.ema) and 0 <= s.ema < 1, "in [0, 1): 0 for none, 0.999 is usual"),
        ("freeze_batch_norm", isinstance(s.freeze_batch_norm, bool), "true or false"),
        ("precision", s.precision in PRECISIONS, _one_of(PRECISIONS)),
        ("channels_last", isinstance(s.channels_last, bool), "true or false"),
        ("compile", isinstance(s.compile, bool), "true or false"),
        ("options", _is_json_mapping(s.options), "a mapping of what JSON can hold"),
    )
    return [f"{name} is {getattr(s, name)!r}; it must be {what}." for name, good, what in checks if not good]


def _are_shares(value: Any) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and all(_is_number(share) and 0 < share < 1 for share in value)
    )


def _is_json_mapping(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return isinstance(value, Mapping)


def _share_faults(value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"shares is {value!r}; it must be a mapping, such as {{'layer1.*': 0.5}}."]
    return [
        f"shares[{name!r}] is {share!r}; it must be a number in (0, 1], what the layer keeps."
        for name, share in value.items()
        if not _is_number(share) or not 0 < share <= 1
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(names: Collection[str]) -> str:
    return f"one of: {', '.join(names)}"


def kept_channels_faults(value: Any) -> list[str]:
    """Say what of ``keep_channels`` is not a list of channel indices; the model is not looked at."""
    if not isinstance(value, Mapping):
        return [f"keep_channels is {value!r}; it must be a mapping, such as {{'layer1.conv': (0, 3)}}."]
    return [
        f"keep_channels[{name!r}] is {channels!r}; it must be a list of whole numbers, 0 or more."
        for name, channels in value.items()
        if not isinstance(channels, Collection)
        or isinstance(channels, str)
        or not all(map(_is_count, channels))
    ]


def sorted_channels(value: Mapping[str, Collection[int]]) -> dict[str, tuple[int, ...]]:
    """One way of writing ``keep_channels``, so that equal wishes have equal hashes."""
    return {name: tuple(sorted(set(value[name]))) for name in sorted(value)}


def check_ratio(value: Any, *, what: str) -> float:
    """Make sure that ``value`` is a ratio in (0, 1].

    Raises:
        RatioError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RatioError(
            f"{what} is {value!r}; it must be a number in (0, 1], the share of the MACs that is kept "
            "(0.5 keeps half of them)."
        )
    return float(value)
