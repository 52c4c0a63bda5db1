"""Spatial SVD: a ``(h, w)`` convolution becomes a ``(h, 1)`` one followed by a ``(1, w)`` one.

Jaderberg et al. 2014, *Speeding up convolutional neural networks with low rank expansions*, scheme 2, with
the output-aware truncation and refit of Zhang et al. 2016, *Accelerating very deep convolutional networks
for classification and detection*. Deviations: the truncation is weighted by the second moments of the
layer's vertical input patches (in place of Zhang's response decomposition); of the two factors only
the horizontal one is refitted; and so are the dense layers that follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from compress_search.calibration import gram_matrices
from compress_search.exceptions import ModelError
from compress_search.methods.low_rank import Factors, factorise
from compress_search.methods.method import Compressed, Sizes, Unit
from compress_search.patches import has_patches, input_patches
from compress_search.plan import CompressionPlan, FactoriseLayer, Part, PlanStep, apply_plan
from compress_search.profile import LayerProfile, ModelProfile, profile_model
from compress_search.reconstruction import Refit, refit_in_forward_order

VERTICAL, HORIZONTAL = "vertical", "horizontal"


@dataclass(frozen=True)
class SpatialSVD:
    """The method; see :class:`compress_search.methods.method.Method`."""

    name: str = "spatial_svd"
    ratio_name: str = "c_ssvd"

    def analyse(
        self, model: nn.Module, example_input: Tensor, *, ignore: Collection[str] = ()
    ) -> SpatialSVDAnalysis:
        """Find the convolutions that spatial SVD can make cheaper."""
        return SpatialSVDAnalysis(model, profile_model(model, example_input), frozenset(ignore))


@dataclass(frozen=True)
class SpatialSVDAnalysis:
    """Spatial SVD's view of one model; see :class:`compress_search.methods.method.Analysis`."""

    model: nn.Module
    profile: ModelProfile
    ignore: frozenset[str]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One unit a layer; its size is the rank."""
        layers = [layer for layer in self.profile.layers if layer.name not in self.left_alone]
        return tuple(Unit(layer.name, full_rank(layer.weight_shape), (layer.name,)) for layer in layers)

    @cached_property
    def left_alone(self) -> Mapping[str, str]:
        """Counted layers that are not factorised, each with its reason."""
        reasons = {layer.name: self._reason_against(layer) for layer in self.profile.layers}
        return {name: reason for name, reason in reasons.items() if reason}

    def size_at(self, unit: Unit, share: float) -> int | None:
        """The largest rank that costs at most ``share`` of the dense layer's MACs."""
        layer = self.profile.layer(unit.name)
        rank = int(share * layer.macs / macs_per_rank(self._convolution(unit.name), layer))
        return min(max(rank, 1), unit.full_size)

    def predict_macs(self, sizes: Sizes) -> int:
        """MACs of the factorised model: ``k (m h H_out W_in + n w H_out W_out)`` a factorised layer."""
        return sum(
            sizes[layer.name] * macs_per_rank(self._convolution(layer.name), layer)
            if layer.name in sizes
            else layer.macs
            for layer in self.profile.layers
        )

    def apply(self, sizes: Sizes, batches: Sequence[Tensor]) -> Compressed:
        """Factorise the layers named in ``sizes`` at the given ranks, and refit them in forward order."""
        names = [layer.name for layer in self.profile.layers if layer.name in sizes]
        for name in names:
            self._check_rank(name, sizes[name])
        edits = tuple(
            FactoriseLayer(name, sizes[name], _parts(self._convolution(name), sizes[name])) for name in names
        )
        step = PlanStep(
            method="spatial_svd",
            mac_ratio=self.predict_macs(sizes) / self.profile.macs,
            edits=edits,
            left_alone=self.left_alone,
        )
        model = apply_plan(self.model, CompressionPlan((step,))).eval()
        grams = self._vertical_grams(names, batches)
        for name in names:
            convolution = self._convolution(name)
            factors = factorise(_as_matrix(convolution.weight), grams.get(name)).truncated(sizes[name])
            _write_factors(model.get_submodule(name), convolution, factors)
        refit_in_forward_order(model, self.model, self._refits(names), batches)
        return Compressed(model, step)

    def _refits(self, names: Sequence[str]) -> list[Refit]:
        """The horizontal factors, and the dense layers after the first of them: they get other inputs now."""
        refits: list[Refit] = []
        for layer in self.profile.layers:
            if layer.name in names:
                name = f"{layer.name}.{HORIZONTAL}"
            elif refits and layer.name not in self.ignore and has_patches(self.model, layer.name):
                name = layer.name
            else:
                continue
            refits.append(Refit(name, source=layer.name, calls=len(layer.calls)))
        return refits

    def _vertical_grams(self, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Second moments ``(m h, m h)`` of the patches that each layer's vertical factor sees."""
        if not batches or not names:
            return {}
        views = {}
        for name in names:
            convolution = self._convolution(name)
            vertical = _parts(convolution, 1)[0].build(convolution.weight)
            views[name] = lambda inputs, layer=vertical: input_patches(layer, inputs)
        return {name: gram[0, :-1, :-1] for name, gram in gram_matrices(self.model, views, batches).items()}

    def _reason_against(self, layer: LayerProfile) -> str:
        module = self.model.get_submodule(layer.name)
        if layer.name in self.ignore:
            return "you asked to leave it alone"
        if not isinstance(module, nn.Conv2d):
            return f"spatial SVD factorises Conv2d, not {layer.kind}"
        if module.groups != 1:
            return f"a grouped convolution ({module.groups} groups)"
        if macs_per_rank(module, layer) > layer.macs:
            return "rank 1 already costs more MACs than the layer itself"
        return ""

    def _convolution(self, name: str) -> nn.Conv2d:
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Conv2d)
        return module

    def _check_rank(self, name: str, rank: int) -> None:
        largest = {unit.name: unit.full_size for unit in self.units}
        if name not in largest or not 1 <= rank <= largest[name]:
            raise ModelError(
                f"Layer {name!r} cannot be factorised at rank {rank}; its rank must be in "
                f"[1, {largest.get(name, 'nothing: ' + self.left_alone.get(name, 'unknown layer'))}]."
            )


def full_rank(weight_shape: Sequence[int]) -> int:
    """Rank at which a kernel ``(n, m, h, w)`` is factorised without loss: ``min(m h, n w)``."""
    n, m, h, w = weight_shape
    return min(m * h, n * w)


def macs_per_rank(convolution: nn.Conv2d, layer: LayerProfile) -> int:
    """MACs that each unit of rank costs in all calls: ``m h H_out W_in + n w H_out W_out`` a call.

    ``W_in`` is the width of the vertical factor's output, which keeps the layer's input width.
    """
    n, m, h, w = convolution.weight.shape
    return sum(
        before[0] * after[-2] * (m * h * before[-1] + n * w * after[-1]) for before, after in layer.calls
    )


def _parts(convolution: nn.Conv2d, rank: int) -> tuple[Part, Part]:
    (h, w), padding = convolution.kernel_size, convolution.padding
    # "same" and "valid" mean the same along each axis by itself.
    rows, columns = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
    vertical = {
        "in_channels": convolution.in_channels,
        "out_channels": rank,
        "kernel_size": (h, 1),
        "stride": (convolution.stride[0], 1),
        "padding": rows,
        "dilation": (convolution.dilation[0], 1),
        "bias": False,
        "padding_mode": convolution.padding_mode,
    }
    horizontal = {
        "in_channels": rank,
        "out_channels": convolution.out_channels,
        "kernel_size": (1, w),
        "stride": (1, convolution.stride[1]),
        "padding": columns,
        "dilation": (1, convolution.dilation[1]),
        "bias": convolution.bias is not None,
        "padding_mode": convolution.padding_mode,
    }
    return Part(VERTICAL, "Conv2d", vertical), Part(HORIZONTAL, "Conv2d", horizontal)


def _as_matrix(weight: Tensor) -> Tensor:
    """Arrange a kernel ``(n, m, h, w)`` as ``(m h, n w)``: vertical patch to outputs of every column."""
    n, m, h, w = weight.shape
    return weight.detach().double().permute(1, 2, 0, 3).reshape(m * h, n * w)


def _write_factors(pair: nn.Module, convolution: nn.Conv2d, factors: Factors) -> None:
    """Write ``left (m h, k)`` and ``right (k, n w)`` into the two convolutions, and copy the bias."""
    n, m, h, w = convolution.weight.shape
    vertical, horizontal = pair.get_submodule(VERTICAL), pair.get_submodule(HORIZONTAL)
    assert isinstance(vertical, nn.Conv2d) and isinstance(horizontal, nn.Conv2d)
    rank = factors.left.shape[1]
    with torch.no_grad():
        vertical.weight.copy_(factors.left.T.reshape(rank, m, h, 1))
        horizontal.weight.copy_(factors.right.reshape(rank, n, w).permute(1, 0, 2).unsqueeze(2))
        if convolution.bias is not None:
            assert horizontal.bias is not None
            horizontal.bias.copy_(convolution.bias)
