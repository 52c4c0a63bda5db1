"""What spatial SVD and weight SVD have in common: everything but which axes go where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from compress_search.calibration import gram_matrices
from compress_search.exceptions import ModelError
from compress_search.methods.kernel_split import KernelSplit
from compress_search.methods.low_rank import factorise
from compress_search.methods.method import Compressed, Sizes, Unit
from compress_search.patches import has_patches, input_patches
from compress_search.plan import CompressionPlan, FactoriseLayer, PlanStep, apply_plan
from compress_search.profile import LayerProfile, ModelProfile
from compress_search.reconstruction import Refit, refit_in_forward_order

SplitOf = Callable[[nn.Module], KernelSplit | str]
"""How a method splits a layer, or the reason why it does not."""


@dataclass(frozen=True)
class FactorisationAnalysis:
    """A factorising method's view of one model; see :class:`compress_search.methods.method.Analysis`.

    The first factor spans the truncated space that keeps the layer's output best, given the second moments
    of its inputs. The second factor is then refitted by least squares, in forward order, with the inputs of
    the already compressed net; so are the dense layers in between.

    Attributes:
        method: Name of the method.
        model: The model.
        profile: Its cost.
        ignore: Names of layers to leave alone.
        split_of: How the method splits a layer.
    """

    method: str
    model: nn.Module
    profile: ModelProfile
    ignore: frozenset[str]
    split_of: SplitOf

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One unit a layer; its size is the rank (in each group)."""
        return tuple(Unit(name, split.full_rank, (name,)) for name, split in self._splits.items())

    @cached_property
    def left_alone(self) -> Mapping[str, str]:
        """Counted layers that are not factorised, each with its reason."""
        return {name: found for name, found in self._found.items() if isinstance(found, str)}

    def size_at(self, unit: Unit, share: float) -> int | None:
        """The largest rank that costs at most ``share`` of the dense layer's MACs."""
        rank = int(share * self.profile.layer(unit.name).macs / self._macs_per_rank[unit.name])
        return min(max(rank, 1), unit.full_size)

    def predict_macs(self, sizes: Sizes) -> int:
        """MACs of the factorised model: linear in each rank."""
        return sum(
            sizes[layer.name] * self._macs_per_rank[layer.name] if layer.name in sizes else layer.macs
            for layer in self.profile.layers
        )

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
        grams = self._input_grams(splits, batches)
        for name, split in splits.items():
            factors = factorise(split.matrix(), grams.get(name)).truncated(sizes[name])
            split.write(model.get_submodule(name), factors)
        refit_in_forward_order(model, self.model, self._refits(model, splits), batches)
        return Compressed(model, step)

    @cached_property
    def _found(self) -> dict[str, KernelSplit | str]:
        return {layer.name: self._split_or_reason(layer) for layer in self.profile.layers}

    @cached_property
    def _splits(self) -> dict[str, KernelSplit]:
        """The splits of the layers that can be made cheaper, in forward order."""
        return {name: found for name, found in self._found.items() if isinstance(found, KernelSplit)}

    @cached_property
    def _macs_per_rank(self) -> dict[str, int]:
        return {name: split.macs_per_rank(self.profile.layer(name)) for name, split in self._splits.items()}

    def _split_or_reason(self, layer: LayerProfile) -> KernelSplit | str:
        if layer.name in self.ignore:
            return "you asked to leave it alone"
        split = self.split_of(self.model.get_submodule(layer.name))
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

    def _input_grams(self, splits: Mapping[str, KernelSplit], batches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Second moments ``(groups, rows, rows)`` of the patches that each layer's first factor sees."""
        if not batches or not splits:
            return {}
        views = {}
        for name, split in splits.items():
            first = split.parts(1)[0].build(split.weight)
            views[name] = lambda inputs, first=first: input_patches(first, inputs)
        return {name: gram[:, :-1, :-1] for name, gram in gram_matrices(self.model, views, batches).items()}

    def _refits(self, model: nn.Module, splits: Mapping[str, KernelSplit]) -> list[Refit]:
        """The second factors, and the dense layers after the first of them: they get other inputs now."""
        refits: list[Refit] = []
        for layer in self.profile.layers:
            if layer.name in splits:
                name = f"{layer.name}.{splits[layer.name].names[1]}"
            elif refits and layer.name not in self.ignore:
                name = layer.name
            else:
                continue
            if has_patches(model, name):
                refits.append(Refit(name, source=layer.name, calls=len(layer.calls)))
        return refits
