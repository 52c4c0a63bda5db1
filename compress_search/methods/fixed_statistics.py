"""Normalisation across channels with the statistics of another run, so that both can be compared.

Without some of its channels, a layer or group normalisation gives other values for those that stay, and
rightly so. With the means and variances of the whole network it gives the same ones, if all else is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm)

_Moments = tuple[Tensor, Tensor]


class FixedStatistics:
    """The means and variances of all layer and group normalisations in one run of a network."""

    def __init__(self) -> None:
        self._noted: dict[str, list[_Moments]] = {}

    @property
    def are_noted(self) -> bool:
        """Whether there were any."""
        return bool(self._noted)

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Note down the statistics of a run of ``model`` within the block."""

        def note(name: str, own: _Moments) -> _Moments:
            self._noted.setdefault(name, []).append(own)
            return own

        with _normalising_with(model, note):
            yield

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Let a run of ``model`` within the block, a network with the same modules, use what was noted."""
        calls = {name: iter(found) for name, found in self._noted.items()}
        with _normalising_with(model, lambda name, own: next(calls.get(name, iter(())), own)):
            yield


@contextmanager
def _normalising_with(model: nn.Module, choose: Callable[[str, _Moments], _Moments]) -> Iterator[None]:
    """Normalise with the statistics that are chosen, given a module's name and the statistics as they are."""
    with ExitStack() as stack:
        # Transformer layers would pass over the modules.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for name, module in model.named_modules():
            if isinstance(module, ACROSS_CHANNELS):
                stack.enter_context(_running_under(module, _Normalisations(partial(choose, name))))
        yield


@contextmanager
def _running_under(module: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    forward, own = module.forward, vars(module).get("forward")

    def within(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    vars(module)["forward"] = within
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


class _Normalisations(TorchFunctionMode):
    """Takes over PyTorch's normalising functions: subclasses may turn inputs round before calling them."""

    def __init__(self, choose: Callable[[_Moments], _Moments]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # First as it is, for the errors that it raises where shapes do not fit.
        result = func(*args, **(kwargs or {}))
        if func in (functional.layer_norm, torch.layer_norm):
            return self._layer_norm(*args, **(kwargs or {})).to(result.dtype)
        if func in (functional.group_norm, torch.group_norm):
            return self._group_norm(*args, **(kwargs or {})).to(result.dtype)
        return result

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        return _scaled(self._normalised(input, len(normalized_shape), eps), weight, bias)

    def _group_norm(
        self, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        normalised = self._normalised(input.reshape(len(input), num_groups, -1), 1, eps).reshape(input.shape)
        axes = (-1, *[1] * (input.ndim - 2))
        return _scaled(normalised, *(None if own is None else own.reshape(axes) for own in (weight, bias)))

    def _normalised(self, values: Tensor, axes: int, eps: float) -> Tensor:
        """Normalise over the last axes."""
        last = tuple(range(-axes, 0))
        variance, mean = self._choose(torch.var_mean(values, last, correction=0, keepdim=True))
        return (values - mean) * (variance + eps).rsqrt()


def _scaled(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    values = values if weight is None else values * weight
    return values if bias is None else values + bias
