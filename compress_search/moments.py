"""Second moments of a layer's input patches, without ever laying out all patches as rows.

The patches of a convolution overlap: two taps of the kernel that lie ``e`` steps apart on an axis see the
same pairs of values, wherever on that axis the first of them lies. So the products are computed once for
each distance in place of once for each pair of taps, on an input that is unfolded along the other axes
only. For a 3x3 kernel that is a third of the multiplications and of the memory traffic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search.patches import padded_inputs
from compress_search.profile import CONVOLUTIONS

_CHUNK_ELEMENTS = 2**24
"""Largest number of elements of unfolded inputs that are held at a time (64 MB in float32)."""


@dataclass
class Moments:
    """Accumulated moments of a regression of output residuals on inputs, per group.

    A regression with a bias has one regressor more than features, which is always 1.

    Attributes:
        gram: ``(groups, regressors, regressors)``, sum of outer products of the input rows.
        cross: ``(groups, regressors, channels / groups)``, sum of their outer products with the residuals.
        rows: Number of input rows.
        has_bias: Whether the last regressor is that of the bias.
    """

    gram: Tensor
    cross: Tensor
    rows: int
    has_bias: bool

    def __add__(self, other: Moments) -> Moments:
        rows = self.rows + other.rows
        return Moments(self.gram + other.gram, self.cross + other.cross, rows, self.has_bias)

    def change_of_error(self, correction: Tensor) -> float:
        """Change of the summed squared error if ``correction`` is added to the weights.

        Args:
            correction: ``(groups, regressors, channels / groups)``.
        """
        return float((correction * (self.gram @ correction - 2 * self.cross)).sum())


class MomentSums:
    """Moments summed up piece by piece, in float64.

    The products of each piece are in float32, or in float64 where the inputs are. Everything stays on the
    device of the inputs; it must have float64, which Apple's MPS has not.

    Args:
        layer: A convolution or a linear layer: how its inputs become rows, see
            :func:`compress_search.patches.input_patches`.
        has_bias: Add a regressor that is always 1.
    """

    def __init__(self, layer: nn.Module, *, has_bias: bool) -> None:
        self._layer = layer
        self._has_bias = has_bias
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self.rows = 0

    def add(self, inputs: Tensor, residual: Tensor | None = None) -> None:
        """Add the rows of some inputs.

        Args:
            inputs: ``(batch, channels, *spatial)``, or ``(*, features)`` for a linear layer.
            residual: ``(batch, channels, *spatial)``, or ``(*, features)``; with it in all calls or in none.
        """
        size = examples_at_a_time(self._layer, inputs)
        for start in range(0, len(inputs), size):
            unfolded = _unfold(self._layer, inputs[start : start + size])
            self.rows += unfolded.rows
            self._add_products(unfolded)
            if residual is not None:
                self._add_cross_products(unfolded, residual[start : start + size])

    def forget_residuals(self) -> None:
        """Go on with the same rows and no residuals."""
        self._cross = None

    def add_residual(self, inputs: Tensor, residual: Tensor) -> None:
        """Add residuals of rows that were added before; shapes as in :meth:`add`."""
        size = examples_at_a_time(self._layer, inputs)
        for start in range(0, len(inputs), size):
            unfolded = _unfold(self._layer, inputs[start : start + size])
            self._add_cross_products(unfolded, residual[start : start + size])

    def gram(self) -> Tensor:
        """Sum of outer products of the rows, ``(groups, regressors, regressors)``."""
        assert self._gram is not None
        return self._gram

    def moments(self) -> Moments:
        """All of them; residuals must have been given."""
        assert self._gram is not None and self._cross is not None
        return Moments(self._gram, self._cross, self.rows, self._has_bias)

    def _add_products(self, unfolded: _Unfolded) -> None:
        features = unfolded.features
        if self._gram is None:
            size = features + self._has_bias
            self._gram = unfolded.values.new_zeros(unfolded.groups, size, size, dtype=torch.float64)
        # Written in place, tap by tap: a Gram matrix can be the largest thing in memory.
        columns = unfolded.by_tap(self._gram[:, :features, :features], 2)
        for tap, other, product in unfolded.products():
            unfolded.by_tap(columns[other], 1)[tap].add_(unfolded.inner_axes(product))
            if tap != other:
                unfolded.by_tap(columns[tap], 1)[other].add_(unfolded.inner_axes(product.mT))
        if self._has_bias:
            last_column = unfolded.by_tap(self._gram[:, :features, features], 1)
            for tap in range(unfolded.taps):
                last_column[tap].add_(_split(unfolded.at(tap).sum(dim=1), 1, unfolded.inner))
            self._gram[:, features, :features] = self._gram[:, :features, features]
            self._gram[:, features, features] += unfolded.rows

    def _add_cross_products(self, unfolded: _Unfolded, residual: Tensor) -> None:
        rows = unfolded.rows_of_outputs(residual)
        features = unfolded.features
        if self._cross is None:
            shape = (unfolded.groups, features + self._has_bias, rows.shape[-1])
            self._cross = rows.new_zeros(shape, dtype=torch.float64)
        by_tap = unfolded.by_tap(self._cross[:, :features], 1)
        for tap in range(unfolded.taps):
            by_tap[tap].add_(_split(unfolded.at(tap).mT @ rows, 1, unfolded.inner))
        if self._has_bias:
            self._cross[:, features] += rows.sum(dim=1)


def examples_at_a_time(layer: nn.Module, inputs: Tensor) -> int:
    """How many examples of a batch can be unfolded at a time in bounded memory; at least one.

    Args:
        layer: A convolution or a linear layer.
        inputs: ``(batch, ...)``.
    """
    taps = math.prod(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 1
    return max(1, _CHUNK_ELEMENTS // max(1, inputs[:1].numel() * taps))


def in_full_precision(values: Tensor) -> Tensor:
    """Return half-precision values in float32, in which sums of products do not overflow; others as is."""
    if not values.is_floating_point():
        return values
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class _Unfolded:
    """Inputs unfolded along all axes of a kernel but one; along that axis the taps are shifts.

    Attributes:
        values: ``(groups, length, rows, inner features)``. ``length`` runs along the axis of the shifts,
            rows over the examples and the other output positions.
        axis: Which of the kernel's axes is that of the shifts; ``None`` where all are unfolded.
        kernel: Size of the kernel along every axis; empty for a linear layer.
        step: Distance from one tap to the next along the axis of the shifts.
        outputs: Number of outputs along the axis of the shifts.
        inner: What the inner features run over: the taps along each other axis, then the channels of one
            group.
    """

    values: Tensor
    axis: int | None
    kernel: tuple[int, ...]
    step: int
    outputs: int
    inner: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of groups of the layer."""
        return self.values.shape[0]

    @property
    def taps(self) -> int:
        """Number of taps along the axis of the shifts."""
        return 1 if self.axis is None else self.kernel[self.axis]

    @property
    def rows(self) -> int:
        """Number of rows that the layer's weights multiply."""
        return self.outputs * self.values.shape[2]

    @property
    def features(self) -> int:
        """Number of input features in each group."""
        return self.taps * self.values.shape[3]

    def at(self, tap: int) -> Tensor:
        """What one tap sees, ``(groups, rows, inner features)``."""
        return self._slice(tap * self.step, tap * self.step + self.outputs)

    def products(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield every pair of taps with its outer products, ``(groups, inner features, inner features)``.

        They are summed over the rows. The second tap is never before the first.
        """
        for distance in range(self.taps):
            ends = self.taps - 1 - distance
            # The taps of every pair at this distance see the rows of the core, and some rows at its ends.
            if ends * self.step < self.outputs:
                core = self._product(ends * self.step, self.outputs, distance)
                before = [self._product(self.step * i, self.step * (i + 1), distance) for i in range(ends)]
                after = [
                    self._product(self.outputs + self.step * i, self.outputs + self.step * (i + 1), distance)
                    for i in range(ends)
                ]
                for tap in range(ends + 1):
                    yield tap, tap + distance, sum([*before[tap:], *after[:tap]], start=core)
            else:
                for tap in range(ends + 1):
                    start = tap * self.step
                    yield tap, tap + distance, self._product(start, start + self.outputs, distance)

    def rows_of_outputs(self, outputs: Tensor) -> Tensor:
        """Arrange the layer's outputs like the rows, ``(groups, rows, channels / groups)``."""
        outputs = in_full_precision(outputs)
        if self.kernel:
            outputs = _channels_last(outputs, self.axis)
        by_group = _split(outputs, outputs.ndim - 1, (self.groups, -1)).movedim(-2, 0)
        return by_group.reshape(self.groups, self.rows, -1)

    def by_tap(self, matrix: Tensor, dim: int) -> Tensor:
        """View one dimension of a matrix, over all features in the layer's order, by tap.

        Args:
            matrix: ``(..., features, ...)``.
            dim: That dimension.

        Returns:
            ``(taps, ..., *inner, ...)``, sharing memory with the matrix.
        """
        whole = _split(matrix, dim, (self.inner[-1], *self.kernel))
        by_axis = whole.movedim(dim, dim + len(self.kernel))
        return by_axis[None] if self.axis is None else by_axis.movedim(dim + self.axis, 0)

    def inner_axes(self, product: Tensor) -> Tensor:
        """View ``(groups, inner features, inner features)`` as ``(groups, *inner, *inner)``."""
        return _split(_split(product, 2, self.inner), 1, self.inner)

    def _slice(self, start: int, end: int) -> Tensor:
        return self.values[:, start:end].flatten(1, 2)

    def _product(self, start: int, end: int, distance: int) -> Tensor:
        shift = distance * self.step
        return self._slice(start, end).mT @ self._slice(start + shift, end + shift)


def _unfold(layer: nn.Module, inputs: Tensor) -> _Unfolded:
    inputs = in_full_precision(inputs)
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(1, 1, -1, inputs.shape[-1])
        return _Unfolded(rows, None, (), 1, 1, (inputs.shape[-1],))
    padded = padded_inputs(layer, inputs)
    assert isinstance(layer, CONVOLUTIONS)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    axes = range(len(kernel))
    outputs = [(padded.shape[2 + a] - (kernel[a] - 1) * dilation[a] - 1) // stride[a] + 1 for a in axes]
    # With a stride, two taps at the same distance do not see the same pairs of values.
    shifting = [a for a in axes if stride[a] == 1 and kernel[a] > 1]
    axis = max(shifting, key=lambda a: kernel[a]) if shifting else None
    others = [a for a in axes if a != axis]
    # With the channels last, the copy for each tap runs through long stretches of memory.
    last = _channels_last(padded, axis).contiguous()
    views = []
    for offsets in itertools.product(*(range(kernel[a]) for a in others)):
        view = last
        for position, (a, offset) in enumerate(zip(others, offsets, strict=True)):
            start = offset * dilation[a]
            steps = slice(start, start + (outputs[a] - 1) * stride[a] + 1, stride[a])
            view = view[(slice(None),) * (position + 2) + (steps,)]
        views.append(_split(view, view.ndim - 1, (layer.groups, -1)))
    inner = (*(kernel[a] for a in others), layer.in_channels // layer.groups)
    stacked = torch.stack(views, dim=-2).movedim(-3, 0)
    values = stacked.reshape(layer.groups, len(last), -1, math.prod(inner))
    if axis is None:
        return _Unfolded(values, None, tuple(kernel), 1, 1, inner)
    return _Unfolded(values, axis, tuple(kernel), dilation[axis], outputs[axis], inner)


def _channels_last(values: Tensor, axis: int | None) -> Tensor:
    """View ``(batch, channels, *spatial)`` as ``(chosen axis or 1, batch, *other axes, channels)``."""
    values = values.movedim(1, -1)
    return values[None] if axis is None else values.movedim(axis + 1, 0)


def _split(values: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """View one dimension as several."""
    return values.view(*values.shape[:dim], *sizes, *values.shape[dim + 1 :])
