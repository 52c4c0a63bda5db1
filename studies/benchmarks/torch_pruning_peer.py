"""Torch-Pruning's pruning by group importance, over all layers at once, until the budget of MACs is met.

This is the recipe of its own benchmarks: small steps of an iterative pruner, MACs counted after each.
Settings of a case: ``importance`` (``magnitude`` or ``taylor``; the latter looks at the labels of the
evaluation images) and ``batchnorm`` (re-estimate the statistics of batch normalisation afterwards, which is
no part of Torch-Pruning, and without which nothing is left of the accuracy).
"""

from __future__ import annotations

from importlib import metadata

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from benchmarks.cases import Request, asked_ratio
from benchmarks.layers import count_macs
from benchmarks.networks import INPUT_SHAPE, PEER_NETWORKS, Add
from benchmarks.peer import Compression, Images, run

STEPS = 400
"""Into so many steps Torch-Pruning's benchmarks divide the way to nothing."""

BATCHNORM_IMAGES = 512


def compress(request: Request, network: nn.Module, images: Images) -> Compression:
    """Prune to the budget of the request, or without one to the ratio that is asked for."""
    original = count_macs(network, INPUT_SHAPE)
    allowed = request.budget or asked_ratio(request.case) * original
    settings = request.case.settings
    kinds = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }
    pruner = tp.pruner.MetaPruner(
        network,
        torch.zeros(*INPUT_SHAPE),
        importance=kinds[settings["importance"]](),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[module for module in network.modules() if isinstance(module, nn.Linear)],
    )
    if settings["importance"] == "taylor":
        # Once: Torch-Pruning cuts the gradients together with the weights.
        loss = functional.cross_entropy(network(images.inputs), images.labels)
        loss.backward()  # type: ignore[no-untyped-call]
    for _ in range(STEPS):
        if count_macs(network, INPUT_SHAPE) <= allowed:
            break
        pruner.step()
    if settings["batchnorm"]:
        reestimate_batchnorm(network, images)
    return Compression(network, None, None)


def reestimate_batchnorm(network: nn.Module, images: Images) -> None:
    """Set the statistics of each batch normalisation to those of calibration images, all in one batch."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        network(images.calibration[:BATCHNORM_IMAGES])
    for layer, value in zip(layers, momentum, strict=True):
        layer.eval()
        layer.momentum = value


if __name__ == "__main__":
    run(compress, lambda name: PEER_NETWORKS[name](Add), f"torch-pruning {metadata.version('torch-pruning')}")
