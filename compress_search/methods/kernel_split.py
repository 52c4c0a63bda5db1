"""One layer split into two: the algebra that spatial SVD and weight SVD share.

The kernel's axes are divided between the two factors. A convolution ``(n, m, *kernel)`` in ``g`` groups is,
in each group, a matrix from ``(m / g, first axes)`` to ``(n / g, second axes)``. Of rank ``k`` it becomes
``(g k, m / g, first axes)`` followed by ``(n, k, second axes)``. Each factor keeps stride, padding and
dilation along its own axes. Spatial SVD gives the vertical axis to the first factor and the horizontal one
to the second; weight SVD gives the second factor all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.methods.low_rank import Factors
from compress_search.plan import Part
from compress_search.profile import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, LayerProfile, base_of


@dataclass(frozen=True)
class KernelSplit:
    """How one layer is split.

    Attributes:
        layer: A convolution, transposed convolution (whose first factor has no axes) or linear layer; a
            plain one, see :func:`compress_search.profile.is_plain`.
        first_axes: Kernel axes of the first factor; the second has the others.
        names: What the two factors are called in the compressed model.
    """

    layer: nn.Module
    first_axes: frozenset[int]
    names: tuple[str, str]

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight."""
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def full_rank(self) -> int:
        """Rank in each group at which nothing is lost."""
        first, second = self._weights_per_rank
        return min(first, second) // self._groups

    @property
    def has_fewer_columns(self) -> bool:
        """Whether :meth:`matrix` has no more columns than rows."""
        first, second = self._weights_per_rank
        return second <= first

    def matrix(self) -> Tensor:
        """The weight as ``(groups, m / groups * first axes, n / groups * second axes)``."""
        groups, (n, m), kernel = self._groups, self._channels, self._kernel
        weight = self.weight.detach()
        if isinstance(self.layer, TRANSPOSED_CONVOLUTIONS):
            by_group = weight.reshape(groups, m // groups, n // groups, *kernel).transpose(1, 2)
        else:
            by_group = weight.reshape(groups, n // groups, m // groups, *kernel)
        first = [3 + axis for axis in self._first]
        second = [3 + axis for axis in self._second]
        rows = m // groups * math.prod(kernel[axis] for axis in self._first)
        return by_group.permute(0, 2, *first, 1, *second).reshape(groups, rows, -1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`matrix`.

        Args:
            matrix: ``(groups, rows, columns)``.

        Returns:
            ``(*weight.shape)`` in the layer's own precision.
        """
        groups, (n, m), kernel = self._groups, self._channels, self._kernel
        order = [0, 2, *(3 + axis for axis in self._first), 1, *(3 + axis for axis in self._second)]
        first = [kernel[axis] for axis in self._first]
        second = [kernel[axis] for axis in self._second]
        shaped = matrix.reshape(groups, m // groups, *first, n // groups, *second)
        by_group = shaped.permute([order.index(axis) for axis in range(len(order))])
        if isinstance(self.layer, TRANSPOSED_CONVOLUTIONS):
            by_group = by_group.transpose(1, 2)
        return by_group.reshape(self.weight.shape).to(self.weight)

    def macs_per_rank(self, profile: LayerProfile) -> int:
        """MACs that each unit of rank costs, over all calls of the layer.

        ``m * first axes * positions between the factors + n * second axes * positions of the output``. Along
        an axis of the second factor the positions between the factors are those of the *input*.
        """
        first, second = self._weights_per_rank
        total = 0
        for before, after in profile.calls:
            if isinstance(self.layer, nn.Linear):
                total += (first + second) * math.prod(after[:-1])
            elif isinstance(self.layer, TRANSPOSED_CONVOLUTIONS):
                total += (first + second) * before[0] * math.prod(before[2:])
            else:
                between = [after[2 + a] if a in self._placed_first else before[2 + a] for a in self._axes]
                total += after[0] * (first * math.prod(between) + second * math.prod(after[2:]))
        return total

    def params_per_rank(self) -> int:
        """Weights that each unit of rank adds; the bias is the same at every rank."""
        return sum(self._weights_per_rank)

    def parts(self, rank: int) -> tuple[Part, Part]:
        """The two modules of a given rank, for the plan."""
        layer, (n, m) = self.layer, self._channels
        if isinstance(layer, nn.Linear):
            return (
                self._part(0, "Linear", in_features=m, out_features=rank, bias=False),
                self._part(1, "Linear", in_features=rank, out_features=n, bias=layer.bias is not None),
            )
        groups, kind = self._groups, base_of(layer).__name__
        middle = {"out_channels": groups * rank, "groups": groups, "bias": False}
        last = {"in_channels": groups * rank, "out_channels": n, "groups": groups}
        last["bias"] = layer.bias is not None
        if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
            first = {"in_channels": m, "kernel_size": (1,) * len(self._kernel)}
            return (
                self._part(0, kind.replace("ConvTranspose", "Conv"), **first, **middle),
                self._part(1, kind, **last, **self._whole_geometry()),
            )
        return (
            self._part(0, kind, in_channels=m, **middle, **self._geometry(self._placed_first)),
            self._part(1, kind, **last, **self._geometry(set(self._axes) - set(self._placed_first))),
        )

    def write(self, pair: nn.Module, factors: Factors) -> None:
        """Write factors into the two modules, and copy the bias.

        Args:
            pair: What the plan put in the layer's place.
            factors: ``left (groups, rows, k)`` and ``right (groups, k, columns)`` of :meth:`matrix`.
        """
        groups, (n, m), kernel = self._groups, self._channels, self._kernel
        first, second = (pair.get_submodule(name) for name in self.names)
        rank = factors.left.shape[-1]
        own_first = [kernel[a] if a in self._first else 1 for a in self._axes]
        own_second = [kernel[a] if a in self._second else 1 for a in self._axes]
        left = factors.left.transpose(1, 2).reshape(groups * rank, m // groups, *own_first)
        right = factors.right.reshape(groups, rank, n // groups, *own_second)
        if isinstance(self.layer, TRANSPOSED_CONVOLUTIONS):
            right = right.reshape(groups * rank, n // groups, *own_second)
        else:
            right = right.transpose(1, 2).reshape(n, rank, *own_second)
        assert isinstance(first.weight, nn.Parameter) and isinstance(second.weight, nn.Parameter)
        with torch.no_grad():
            first.weight.copy_(left)
            second.weight.copy_(right)
            if isinstance(self.layer.bias, nn.Parameter):
                assert isinstance(second.bias, nn.Parameter)
                second.bias.copy_(self.layer.bias)

    @property
    def _weights_per_rank(self) -> tuple[int, int]:
        """Weights of the first and of the second factor for each unit of rank (in every group)."""
        (n, m), kernel = self._channels, self._kernel
        first = m * math.prod(kernel[axis] for axis in self._first)
        return first, n * math.prod(kernel[axis] for axis in self._second)

    @property
    def _axes(self) -> range:
        return range(len(self._kernel))

    @property
    def _first(self) -> list[int]:
        return [axis for axis in self._axes if axis in self.first_axes]

    @property
    def _second(self) -> list[int]:
        return [axis for axis in self._axes if axis not in self.first_axes]

    @property
    def _placed_first(self) -> list[int]:
        """Axes whose stride and padding the first factor has.

        Its own, and those along which the kernel is 1: there the stride may come first, which is cheaper
        and the same.
        """
        return [axis for axis in self._axes if axis in self.first_axes or self._kernel[axis] == 1]

    @property
    def _kernel(self) -> tuple[int, ...]:
        return () if isinstance(self.layer, nn.Linear) else tuple(self.layer.kernel_size)  # type: ignore[arg-type]

    @property
    def _groups(self) -> int:
        return 1 if isinstance(self.layer, nn.Linear) else int(self.layer.groups)  # type: ignore[arg-type]

    @property
    def _channels(self) -> tuple[int, int]:
        """Output and input channels."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return layer.out_features, layer.in_features
        assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
        return layer.out_channels, layer.in_channels

    def _part(self, position: int, kind: str, **arguments: Any) -> Part:
        return Part(self.names[position], kind, arguments)

    def _geometry(self, axes: Collection[int]) -> dict[str, Any]:
        """Kernel, stride, padding and dilation along some axes; a kernel of 1 along the others."""
        layer = self.layer
        assert isinstance(layer, CONVOLUTIONS)

        def along(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
            return tuple(values[a] if a in axes else otherwise for a in self._axes)

        # "same" and "valid" mean the same along each axis by itself.
        padding = layer.padding
        return {
            "kernel_size": along(layer.kernel_size, 1),
            "stride": along(layer.stride, 1),
            "padding": padding if isinstance(padding, str) else along(padding, 0),
            "dilation": along(layer.dilation, 1),
            "padding_mode": layer.padding_mode,
        }

    def _whole_geometry(self) -> dict[str, Any]:
        layer = self.layer
        assert isinstance(layer, TRANSPOSED_CONVOLUTIONS)
        return {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "output_padding": layer.output_padding,
            "dilation": layer.dilation,
        }
