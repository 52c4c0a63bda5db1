"""What spatial SVD and weight SVD have in common: everything but which axes go where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor, nn

from compress_search.calibration import InputMoments, check_weights, gram_matrices, is_wide
from compress_search.exceptions import ModelError
from compress_search.methods.cost import Cost, CostTerm, LinearForm, Tie, ties_of
from compress_search.methods.factorisation_trial import faults_of_factorising
from compress_search.methods.ignored_layers import layers_matching
from compress_search.methods.kernel_split import KernelSplit
from compress_search.methods.low_rank import Factors, factorise
from compress_search.methods.method import DID_NOT_RUN, UNBATCHED, Compressed, Imitation, Sizes, Unit
from compress_search.methods.on_demand import OnDemand
from compress_search.methods.output_sensitivity import output_sensitivities
from compress_search.methods.remembered import Remembered
from compress_search.patches import has_patches
from compress_search.plan import CompressionPlan, FactoriseLayer, PlanStep, apply_plan
from compress_search.profile import LayerProfile, ModelProfile, oddity_of, profile_model
from compress_search.reconstruction import Refit, refit_in_forward_order

logger = logging.getLogger("compress_search")

_REMEMBERED = 2**26
"""How many elements of components are kept between choosing sizes and applying them (512 MB in float64)."""

SplitOf = Callable[[nn.Module], KernelSplit | str]
"""How a method splits a layer, or the reason why it does not."""


@dataclass(frozen=True)
class FactorisationAnalysis:
    """A factorising method's view of one model; see :class:`compress_search.methods.method.Analysis`.

    The first factor spans the truncated space that keeps the layer's output best, given the second moments
    of its inputs and how much the network's output cares for each of its channels. The second factor is then
    refitted by least squares, in forward order, with the inputs of the already compressed net; so are the
    dense layers in between.

    Attributes:
        method: Name of the method.
        model: The model.
        profile: Its cost.
        ignore: Names of layers to leave alone.
        split_of: How the method splits a layer.
        faults: Of the layers that the network cannot do without, why, see
            :func:`compress_search.methods.factorisation_trial.faults_of_factorising`.
        known_factors: Components that were found on some batches before.
    """

    method: str
    model: nn.Module
    profile: ModelProfile
    ignore: frozenset[str]
    split_of: SplitOf
    faults: Mapping[str, str] = field(default_factory=dict)
    known_factors: Remembered[Factors] = field(default_factory=Remembered, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        method: str,
        model: nn.Module,
        example_input: Tensor,
        *,
        ignore: Collection[str],
        split_of: SplitOf,
    ) -> FactorisationAnalysis:
        """Find the layers that can be made cheaper, and try whether the network lets them be replaced.

        Args:
            method: Name of the method.
            model: The model. It is not changed.
            example_input: ``(batch, ...)``.
            ignore: Names of layers to leave alone, or patterns.
            split_of: How the method splits a layer.

        Raises:
            ModelError: See :meth:`compress_search.methods.method.Method.analyse`.
        """
        check_weights(model)
        profile = profile_model(model, example_input)
        untried = cls(method, model, profile, layers_matching(ignore, profile), split_of)
        edits = [FactoriseLayer(name, 1, split.parts(1)) for name, split in untried._splits.items()]
        return replace(untried, faults=faults_of_factorising(model, example_input, edits))

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One unit a layer; its size is the rank (in each group)."""
        return tuple(Unit(name, split.full_rank, (name,)) for name, split in self._splits.items())

    @cached_property
    def left_alone(self) -> Mapping[str, str]:
        """Layers that are not factorised, each with its reason."""
        reasons = {name: found for name, found in self._found.items() if isinstance(found, str)}
        return reasons | {layer.name: DID_NOT_RUN for layer in self.profile.idle}

    def size_at(self, unit: Unit, share: float) -> int | None:
        """The largest rank that costs at most ``share`` of the dense layer's MACs."""
        return self._macs.size_at(unit.name, share)

    def cost(self, kind: str) -> Cost:
        """MACs or parameters: linear in each rank, and another constant for a layer left dense."""
        return {"macs": self._macs, "params": self._params}[kind]

    def predict_macs(self, sizes: Sizes) -> int:
        """MACs of the factorised model."""
        return self._macs.of(sizes)

    def predict_params(self, sizes: Sizes) -> int:
        """Parameters of the factorised model."""
        return self._params.of(sizes)

    def apply(self, sizes: Sizes, batches: Sequence[Tensor]) -> Compressed:
        """Factorise the layers named in ``sizes`` at the given ranks, and refit in forward order."""
        for name, rank in sizes.items():
            self._check_rank(name, rank)
        splits = {name: split for name, split in self._splits.items() if name in sizes}
        step = PlanStep(
            method=self.method,
            mac_ratio=self.predict_macs(sizes) / self.profile.macs,
            edits=tuple(FactoriseLayer(n, sizes[n], split.parts(sizes[n])) for n, split in splits.items()),
            left_alone=self.left_alone,
        )
        model = apply_plan(self.model, CompressionPlan((step,))).eval()
        for name, factors in self._factors(splits, sizes, batches):
            splits[name].write(model.get_submodule(name), factors.truncated(sizes[name]))
        refit_in_forward_order(model, self.model, self._refits(model, splits), batches)
        return Compressed(model, step)

    def after(self, compressed: Compressed, example_input: Tensor) -> FactorisationAnalysis:
        """The model as it is now: layers that are not factorised yet have kept their names and shapes."""
        model = compressed.model
        check_weights(model)
        profile = profile_model(model, example_input)
        return FactorisationAnalysis(
            self.method, model, profile, self.ignore, self.split_of, faults=self.faults
        )

    def imitations(
        self, sizes: Mapping[str, Sequence[int]], batches: Sequence[Tensor]
    ) -> Iterator[Imitation]:
        """Imitate each factorised layer by its own weight, truncated to the rank."""
        splits = {name: self._splits[name] for name in sizes}
        largest = {name: max(ranks) for name, ranks in sizes.items()}
        for name, factors in self._factors(splits, largest, batches):
            parameters = OnDemand(sizes[name], partial(_imitated, name, splits[name], factors))
            yield Imitation(name, parameters, {rank: factors.error(rank) for rank in sizes[name]})

    @cached_property
    def _found(self) -> dict[str, KernelSplit | str]:
        return {layer.name: self._split_or_reason(layer) for layer in self.profile.layers}

    @cached_property
    def _splits(self) -> dict[str, KernelSplit]:
        """The splits of the layers that can be made cheaper, in forward order."""
        return {name: found for name, found in self._found.items() if isinstance(found, KernelSplit)}

    @cached_property
    def _macs(self) -> Cost:
        rates = {name: split.macs_per_rank(self.profile.layer(name)) for name, split in self._splits.items()}
        dense = {name: self.profile.layer(name).macs for name in self._splits}
        return self._cost(rates, dense, total=self.profile.macs)

    @cached_property
    def _params(self) -> Cost:
        rates = {name: split.params_per_rank() for name, split in self._splits.items()}
        dense = {}
        for name in self._splits:
            bias = self.model.get_submodule(name).bias
            kept = bias.numel() if isinstance(bias, nn.Parameter) else 0
            dense[name] = self.profile.layer(name).params - kept
        ties = ties_of(self.model, lambda layer, _: frozenset({layer}) & self._splits.keys())
        # The terms count a shared tensor once a layer; the ties take that back.
        again = sum(tie.cost * (len(tie.holders) - 1) for tie in ties)
        return self._cost(rates, dense, total=self.profile.params + again, ties=ties)

    def _cost(
        self, rates: Mapping[str, int], dense: Mapping[str, int], *, total: int, ties: tuple[Tie, ...] = ()
    ) -> Cost:
        """The cost of the layers that are not factorised, and a rate for each that is."""
        untouched = CostTerm(total - sum(dense.values()))
        factorised = (CostTerm(rate, forms=(LinearForm(0, {name: 1}),)) for name, rate in rates.items())
        full = {unit.name: unit.full_size for unit in self.units}
        return Cost((untouched, *factorised), full, dense, ties)

    def _split_or_reason(self, layer: LayerProfile) -> KernelSplit | str:
        if layer.name in self.ignore:
            return "you asked to leave it alone"
        if layer.name in self.faults:
            return self.faults[layer.name]
        module = self.model.get_submodule(layer.name)
        oddity = oddity_of(module)
        if oddity:
            return f"it is {oddity}"
        if not layer.is_batched:
            return f"it is given {UNBATCHED}"
        split = self.split_of(module)
        if isinstance(split, KernelSplit) and split.macs_per_rank(layer) >= layer.macs:
            return "rank 1 already costs as many MACs as the layer itself"
        return split

    def _check_rank(self, name: str, rank: int) -> None:
        if name not in self._splits:
            reason = self.left_alone.get(name, "the model has no such counted layer")
            raise ModelError(f"Layer {name!r} cannot be factorised at rank {rank}: {reason}.")
        if not 1 <= rank <= self._splits[name].full_rank:
            raise ModelError(
                f"Layer {name!r} cannot be factorised at rank {rank}; its rank must be in "
                f"[1, {self._splits[name].full_rank}]."
            )

    def _factors(
        self, splits: Mapping[str, KernelSplit], ranks: Mapping[str, int], batches: Sequence[Tensor]
    ) -> Iterator[tuple[str, Factors]]:
        """Components of each layer, as many as its rank or more.

        They are weighed by what the data says of its inputs and of its outputs.
        """
        known = self.known_factors.of(batches)
        for name in [name for name, rank in ranks.items() if name in known and known[name].rank < rank]:
            del known[name]
        missing = {name: split for name, split in splits.items() if name not in known}
        grams = self._input_moments(missing, batches)
        sensitivities = output_sensitivities(self.model, list(missing), batches)
        room = _REMEMBERED - sum(factors.left.numel() + factors.right.numel() for factors in known.values())
        for name, split in splits.items():
            if name in known:
                yield name, known[name]
                continue
            gram, sensitivity = grams.pop(name, None), sensitivities.pop(name, None)
            factors = factorise(split.matrix(), gram, sensitivity, rank=ranks[name])
            del gram, sensitivity
            room -= factors.left.numel() + factors.right.numel()
            if room >= 0:
                known[name] = factors
            yield name, factors

    def _input_moments(
        self, splits: Mapping[str, KernelSplit], batches: Sequence[Tensor]
    ) -> dict[str, InputMoments]:
        """Second moments ``(groups, rows, rows)`` of the patches that each layer's first factor sees."""
        if not batches or not splits:
            return {}
        views = {name: split.parts(1)[0].build(split.weight) for name, split in splits.items()}
        # With even more outputs, what has to be decomposed would be as large as the Gram matrix.
        hopeless = [n for n, view in views.items() if is_wide(view) and not splits[n].has_fewer_columns]
        if hopeless:
            names = ", ".join(hopeless)
            logger.warning("Of a layer so wide its inputs have no say in its rank: %s.", names)
        moments = gram_matrices(self.model, {n: v for n, v in views.items() if n not in hopeless}, batches)
        return {n: m[:, :-1, :-1] if isinstance(m, Tensor) else m for n, m in moments.items()}

    def _refits(self, model: nn.Module, splits: Mapping[str, KernelSplit]) -> list[Refit]:
        """The second factors, and the dense layers after the first of them: they get other inputs now."""
        refits: list[Refit] = []
        # Not the same as having refits: a transposed convolution changes what follows, and has none itself.
        changed = False
        for layer in self.profile.layers:
            if layer.name in splits:
                name, changed = f"{layer.name}.{splits[layer.name].names[1]}", True
            elif changed and layer.name not in self.ignore:
                name = layer.name
            else:
                continue
            if layer.is_batched and has_patches(model, name):
                refits.append(Refit(name, source=layer.name, calls=len(layer.calls)))
        return refits


def _imitated(name: str, split: KernelSplit, factors: Factors, rank: int) -> dict[str, Tensor]:
    truncated = factors.truncated(rank)
    return {f"{name}.weight": split.as_weight(truncated.left @ truncated.right)}
