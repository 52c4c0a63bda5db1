"""Compression methods, one technique a file, listed here."""

from __future__ import annotations

from collections.abc import Mapping

from compress_search.methods.channel_pruning import ChannelPruning
from compress_search.methods.method import Method
from compress_search.methods.spatial_svd import SpatialSVD
from compress_search.methods.weight_svd import WeightSVD

METHODS: Mapping[str, Method] = {
    method.name: method for method in (SpatialSVD(), WeightSVD(), ChannelPruning())
}
