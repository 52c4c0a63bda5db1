"""Spatial SVD: a ``(h, w)`` convolution becomes a ``(h, 1)`` one followed by a ``(1, w)`` one.

Jaderberg et al. 2014, *Speeding up convolutional neural networks with low rank expansions*, scheme 2, with
the output-aware truncation and refit of Zhang et al. 2016, *Accelerating very deep convolutional networks
for classification and detection*. Deviations: the truncation is weighted by the second moments of the
layer's vertical input patches (in place of Zhang's response decomposition); of the two factors only the
second is refitted; and so are the dense layers that follow. A pointwise convolution has no axes to
separate: for it this is the weight SVD, and its factors are named accordingly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from compress_search.methods.factorisation import FactorisationAnalysis
from compress_search.methods.kept_channels import NO_CHANNELS, KeptChannels, channels_to_keep
from compress_search.methods.kernel_split import KernelSplit
from compress_search.methods.weight_svd import split_channels


@dataclass(frozen=True)
class SpatialSVD:
    """The method; see :class:`compress_search.methods.method.Method`."""

    name: str = "spatial_svd"
    ratio_name: str = "c_ssvd"

    def analyse(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        ignore: Collection[str] = (),
        keep_channels: KeptChannels = NO_CHANNELS,
    ) -> FactorisationAnalysis:
        """Find the convolutions that spatial SVD can make cheaper."""
        channels_to_keep(keep_channels, model)
        return FactorisationAnalysis.of(self.name, model, example_input, ignore=ignore, split_of=split_axes)


def split_axes(layer: nn.Module) -> KernelSplit | str:
    """Split a 2-D convolution between its vertical and its horizontal axis, or say why not."""
    if not isinstance(layer, nn.Conv2d):
        kind = type(layer).__name__
        return f"spatial SVD separates the two axes of a Conv2d; weight_svd can factorise a {kind}"
    if layer.kernel_size == (1, 1):
        return split_channels(layer)
    return KernelSplit(layer, frozenset({0}), ("vertical", "horizontal"))
