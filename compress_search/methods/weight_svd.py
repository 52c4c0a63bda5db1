"""Weight SVD: a layer becomes one that mixes its channels into fewer, followed by one with the kernel.

A convolution ``(n, m, h, w)`` becomes ``(k, m, 1, 1)`` and ``(n, k, h, w)``, a linear layer ``(n, m)``
becomes ``(k, m)`` and ``(n, k)``. Denton et al. 2014, *Exploiting linear structure within convolutional
networks for efficient evaluation*; Xue et al. 2013, *Restructuring of deep neural network acoustic models
with singular value decomposition*. Truncation and refit are as in :mod:`compress_search.methods.spatial_svd`.
Transposed convolutions are factorised likewise, without the refit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from compress_search.methods.factorisation import FactorisationAnalysis
from compress_search.methods.kept_channels import NO_CHANNELS, KeptChannels, channels_to_keep
from compress_search.methods.kernel_split import KernelSplit
from compress_search.profile import COUNTED_LAYERS


@dataclass(frozen=True)
class WeightSVD:
    """The method; see :class:`compress_search.methods.method.Method`."""

    name: str = "weight_svd"
    ratio_name: str = "c_wsvd"

    def analyse(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        ignore: Collection[str] = (),
        keep_channels: KeptChannels = NO_CHANNELS,
    ) -> FactorisationAnalysis:
        """Find the layers that weight SVD can make cheaper."""
        channels_to_keep(keep_channels, model)
        return FactorisationAnalysis.of(
            self.name, model, example_input, ignore=ignore, split_of=split_channels
        )


def split_channels(layer: nn.Module) -> KernelSplit | str:
    """Split any counted layer between its channels and its kernel."""
    assert isinstance(layer, COUNTED_LAYERS)
    return KernelSplit(layer, frozenset(), ("reduce", "expand"))
