"""The judge: builds what a tool left and measures it, the same way for every tool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.layers import Layer, count_macs, rebuild
from benchmarks.networks import INPUT_SHAPE, PEER_NETWORKS, Add
from benchmarks.peer import PROBE, PROBES
from compress_search.task import accuracy

Batches = Sequence[tuple[Tensor, Tensor]]
"""Inputs ``(batch, 3, 32, 32)`` and labels ``(batch,)``."""

_TOLERANCE = 1e-3
"""Of logits, whose size is about ten: versions of PyTorch add in different orders."""


class RebuildError(RuntimeError):
    """What was built again is not what the tool had."""


def measured(network: nn.Module, test: Batches) -> tuple[float, int]:
    """The accuracy of a network and its MACs for one image."""
    return accuracy(network, test), count_macs(network, INPUT_SHAPE)


def rebuilt(name: str, folder: Path, inputs: Tensor) -> nn.Module:
    """Build the compressed network that a tool wrote to a folder.

    Args:
        name: The original network's name.
        folder: Of the case.
        inputs: ``(images, 3, 32, 32)``, the evaluation images that the tool had.

    Raises:
        RebuildError: It does not put out what it put out in the tool's process.
    """
    layers = [Layer(**layer) for layer in json.loads((folder / "layers.json").read_text())]
    network = rebuild(PEER_NETWORKS[name](Add), layers)
    weights = load_file(folder / "model.safetensors")
    probe = weights.pop(PROBE)
    network.load_state_dict(weights)
    with torch.no_grad():
        apart = float((network(inputs[:PROBES]) - probe).abs().max())
    if not apart <= _TOLERANCE:
        raise RebuildError(
            f"The network in {folder} does not put out what it did in the tool's process: logits differ by "
            f"up to {apart:.2g}. It has a change that is not in the shapes of its layers."
        )
    return network
