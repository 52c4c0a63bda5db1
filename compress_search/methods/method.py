"""What a compression method must do: the contract that every file of this folder fulfils.

A method looks at a model once (:meth:`Method.analyse`) and says which *units* it can size: layers whose
rank it chooses, or groups of coupled channels. A selector chooses the sizes; :meth:`Analysis.apply`
builds the compressed model. Two laws hold for every method:

* the MACs and parameters that :meth:`Analysis.cost` says are exactly those counted on the built model;
* every unit at its full size reproduces the dense model's output to float precision.

And units may be compressed one after the other (:meth:`Analysis.after`), which gives the same MACs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from compress_search.methods.cost import Cost
from compress_search.methods.kept_channels import NO_CHANNELS, KeptChannels
from compress_search.plan import PlanStep
from compress_search.profile import ModelProfile

Sizes = Mapping[str, int]
"""Size (rank, channels) of each unit by its name. A unit that is not named stays as it is."""


@dataclass(frozen=True)
class Unit:
    """What a method sizes as one.

    Attributes:
        name: The layer's name, or the name of the first layer that makes the coupled channels.
        full_size: The size (rank, channels) at which nothing is lost.
        layers: Names of the layers whose MACs depend on the size.
        widths: How many channels one step of the size is worth, in each place where it counts.
        least: The smallest allowed size. Channel pruning raises it to the number of blocks that hold
            channels to be kept.
    """

    name: str
    full_size: int
    layers: tuple[str, ...]
    widths: tuple[int, ...] = (1,)
    least: int = 1

    def step(self, round_to: int) -> int:
        """The smallest step of the size that keeps all channel counts multiples of ``round_to``."""
        return math.lcm(*(round_to // math.gcd(width, round_to) for width in self.widths))


DID_NOT_RUN = "it did not run on the example input"
"""Why a layer is left alone that the profile calls idle."""

UNBATCHED = "inputs without a batch axis"
"""What a convolution is given of which ``LayerProfile.is_batched`` does not hold."""


@dataclass(frozen=True)
class Compressed:
    """What applying a method gives.

    Attributes:
        model: A new model in evaluation mode.
        step: What was done, for the plan.
    """

    model: nn.Module
    step: PlanStep


@dataclass(frozen=True)
class Imitation:
    """One unit compressed alone, imitated on the dense model by other parameters.

    No model has to be built for it: the dense model with these parameters gives what the model would give
    in which that unit alone is compressed, its layers refitted.

    Attributes:
        unit: Name of the unit.
        parameters: For each size, the changed parameters by their names in ``model.named_parameters()``.
            At every size they belong to the same layers.
        errors: For each size, the squared error of the refitted layers' outputs relative to their energy, as
            far as calibration data tells it; it falls as the size grows.
    """

    unit: str
    parameters: Mapping[int, Mapping[str, Tensor]]
    errors: Mapping[int, float]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose parameters change."""
        changed = next(iter(self.parameters.values()))
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in changed))


class Analysis(Protocol):
    """A method's view of one model."""

    @property
    def model(self) -> nn.Module:
        """The model before compression. It is not to be changed."""

    @property
    def profile(self) -> ModelProfile:
        """The cost of the model before compression."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """What can be sized, in forward order."""

    @property
    def left_alone(self) -> Mapping[str, str]:
        """The layers of the counted kinds that cannot be compressed, each with its reason; idle ones too."""

    def size_at(self, unit: Unit, share: float) -> int | None:
        """The size at which a unit keeps ``share`` of what it costs, in the method's natural measure.

        Args:
            unit: One of :attr:`units`.
            share: In (0, 1].

        Returns:
            The largest size that keeps at most that share, at least ``unit.least``; ``None`` where the unit
            is cheaper untouched.
        """

    def cost(self, kind: str) -> Cost:
        """The cost of every choice of sizes.

        Args:
            kind: One of :data:`compress_search.methods.cost.COST_KINDS`.
        """

    def predict_macs(self, sizes: Sizes) -> int:
        """MACs of the model that :meth:`apply` would build, without building it."""

    def predict_params(self, sizes: Sizes) -> int:
        """Parameters of the model that :meth:`apply` would build, without building it."""

    def imitations(
        self, sizes: Mapping[str, Sequence[int]], batches: Sequence[Tensor]
    ) -> Iterator[Imitation]:
        """Imitate units one at a time, each at several sizes that share one factorisation.

        Args:
            sizes: The sizes to imitate by unit name.
            batches: Calibration inputs, each ``(batch, ...)``; empty for the data-free mode.

        Yields:
            One imitation a unit, in the order given.
        """

    def apply(self, sizes: Sizes, batches: Sequence[Tensor]) -> Compressed:
        """Build the compressed model. The analysed model is not changed.

        Args:
            sizes: Sizes by unit name.
            batches: Calibration inputs, each ``(batch, ...)``; empty for the data-free mode.

        Raises:
            ModelError: A size does not fit its unit, or weights or activations are not finite.
        """

    def after(self, compressed: Compressed, example_input: Tensor) -> Analysis:
        """The view of a model in which some units are compressed already, and the others are to be.

        All other units have the names, full sizes and least sizes that they had. Costs are not asked of it.

        Args:
            compressed: What :meth:`apply` made of this view's model; its weights may have changed since. The
                edits may be those of several applications, one after the other.
            example_input: ``(batch, ...)``.

        Raises:
            ModelError: Weights are not finite.
        """


class Method(Protocol):
    """One compression technique."""

    @property
    def name(self) -> str:
        """Its name in recipes, plans and the table of methods."""

    @property
    def ratio_name(self) -> str:
        """What its ratio is called as a search variable, for example ``"c_ssvd"``."""

    def analyse(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        ignore: Collection[str] = (),
        keep_channels: KeptChannels = NO_CHANNELS,
    ) -> Analysis:
        """Find what can be compressed.

        Args:
            model: The model. It is not changed.
            example_input: ``(batch, ...)``.
            ignore: Names of layers to leave alone, or patterns such as ``"head.*"``.
            keep_channels: Indices of output channels that must stay, by the name of the layer that makes
                them. A factorising method keeps all of them anyway.

        Raises:
            ModelError: A name matches no layer, or an index no channel; or the model does not run, cannot be
                traced, lies on several devices, or has weights that are not finite.
        """
