"""A compressed network as the shapes of its layers, so that no tool is needed to build it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_ARGUMENTS = {
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Linear": ("in_features", "out_features"),
    "BatchNorm2d": ("num_features", "eps", "momentum"),
}


@dataclass(frozen=True)
class Layer:
    """A module with parameters.

    Attributes:
        name: Its name in the network.
        kind: Its class in :mod:`torch.nn`.
        arguments: What its constructor takes.
    """

    name: str
    kind: str
    arguments: dict[str, Any]

    def build(self) -> nn.Module:
        """Construct it, with PyTorch's initial weights."""
        module: nn.Module = getattr(nn, self.kind)(**self.arguments)
        return module


def layers_of(network: nn.Module) -> list[Layer]:
    """The modules with parameters, in order.

    Raises:
        TypeError: One is not among the kinds that can be described.
    """
    layers = []
    for name, module in network.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        kind = next((kind for kind in _ARGUMENTS if isinstance(module, getattr(nn, kind))), None)
        if kind is None:
            raise TypeError(
                f"{name} is a {type(module).__name__}; only {', '.join(_ARGUMENTS)} are described."
            )
        arguments = {argument: getattr(module, argument) for argument in _ARGUMENTS[kind]}
        if kind != "BatchNorm2d":
            arguments["bias"] = module.bias is not None
        layers.append(Layer(name, kind, arguments))
    return layers


def rebuild(network: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """Give ``network`` these layers, in place; a layer that became several is a sequence of them.

    Args:
        network: The original architecture.
        layers: What :func:`layers_of` said of the compressed network.
    """
    for layer in layers:
        *parents, last = layer.name.split(".")
        module = network
        for parent in parents:
            child = dict(module.named_children()).get(parent)
            if child is None or not list(child.children()):
                child = nn.Sequential()
                module.add_module(parent, child)
            module = child
        module.add_module(last, layer.build())
    return network.eval()


def count_macs(network: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of one pass, by PyTorch's own counter: neither ours nor a peer's."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(*shape))
    return int(counter.get_total_flops()) // 2
