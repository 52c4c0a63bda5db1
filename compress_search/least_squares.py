"""The best change of one layer's weights, by least squares with a ridge chosen on held-out samples.

Two ways to the same answer. With more rows than features, normal equations over the features. With fewer,
or where a layer is so wide that its Gram matrix would not fit into memory, the dual: equations over the
rows (Saunders, Gammerman and Vovk 1998, *Ridge regression learning algorithm in dual variables*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from compress_search.calibration import WIDEST, check_finite
from compress_search.linear_algebra import mean_energy, ridge_cholesky
from compress_search.moments import Moments, MomentSums, examples_at_a_time, in_full_precision
from compress_search.patches import input_patches, output_rows
from compress_search.sampled_rows import FairDraw

_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the pull towards the present weights that are tried, relative to the mean input energy."""

_RIDGE_UNSEEN = 1e-2
"""The ridge where there are too few batches to hold any out."""

_RIDGE_OF_BIAS = 1e-6
"""The bias is hardly pulled; only kept solvable where some feature is constant."""

_MOST_ROWS = 2**12
"""How many rows the dual takes at most, in a kernel matrix of 128 MB."""

_MOST_ROW_ELEMENTS = 2**26
"""How many elements its rows have at most (256 MB in float32)."""

_FEATURES_AT_A_TIME = 2**11
"""How many features the dual converts to float64 at a time."""

Change = tuple[slice, Tensor]
"""Some regressors, and what is added to their weights, ``(groups, regressors, channels / groups)``."""


class Regression(Protocol):
    """Collects a layer's inputs and the residuals of its outputs, then says how its weights should change."""

    def add(self, inputs: Tensor, residual: Tensor, *, held_out: bool) -> None:
        """Add samples.

        Args:
            inputs: ``(batch, channels, *spatial)``, or ``(*, features)`` for a linear layer.
            residual: What the outputs lack, ``(batch, channels, *spatial)`` or ``(*, features)``.
            held_out: Use them to choose the ridge by, and only then to solve with.
        """

    @property
    def is_underdetermined(self) -> bool:
        """Whether there are fewer rows to solve with than regressors."""

    def changes(self) -> Iterator[Change]:
        """Yield the change of the weights in pieces; with a bias, the last regressor is that of the bias.

        Raises:
            ModelError: An input or a residual is not finite.
        """


def regression_of(layer: nn.Module, name: str, *, rows: int) -> Regression:
    """Choose the way that takes less memory.

    Args:
        layer: A convolution or a linear layer.
        name: What errors call it.
        rows: How many rows there will be, about.
    """
    assert isinstance(layer.weight, nn.Parameter)
    features = layer.weight[0].numel()
    if rows < features or features > WIDEST:
        return DualRegression(layer, name)
    return PrimalRegression(layer, name)


class PrimalRegression:
    """Normal equations over the features; the memory does not depend on the number of rows.

    Args:
        layer: A convolution or a linear layer.
        name: What errors call it.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._name = name
        self._parts = [MomentSums(layer, has_bias=layer.bias is not None) for _ in range(2)]

    def add(self, inputs: Tensor, residual: Tensor, *, held_out: bool) -> None:
        """See :meth:`Regression.add`."""
        self._parts[held_out].add(inputs, residual)

    def add_inputs(self, inputs: Tensor, *, held_out: bool) -> None:
        """Add samples whose residuals will be added afterwards."""
        self._parts[held_out].add(inputs)

    def forget_residuals(self) -> None:
        """Go on with the same inputs and no residuals."""
        for part in self._parts:
            part.forget_residuals()

    def add_residual(self, inputs: Tensor, residual: Tensor, *, held_out: bool) -> None:
        """Add residuals of inputs that were added before."""
        self._parts[held_out].add_residual(inputs, residual)

    @property
    def is_underdetermined(self) -> bool:
        """See :attr:`Regression.is_underdetermined`."""
        fitted = self._parts[0]
        return not fitted.rows or fitted.rows < fitted.gram().shape[-1]

    def changes(self) -> Iterator[Change]:
        """See :meth:`Regression.changes`; all in one piece."""
        parts = [part.moments() for part in self._parts if part.rows]
        for part in parts:
            check_finite(part.gram, layer=self._name)
            check_finite(part.cross, layer=self._name)
        correction = ridge_correction(parts[0], parts[1] if len(parts) > 1 else None)
        yield slice(0, correction.shape[1]), correction


def ridge_correction(fitted: Moments, held_out: Moments | None) -> Tensor:
    """Solve for the change of weights and bias that best explains the residuals.

    Minimises ``|X D - R|^2 + ridge |D|^2``. Since the residuals are those of the present weights, the ridge
    pulls towards the present weights, and a rank-deficient Gram matrix stays harmless. The ridge is the one
    whose solution on ``fitted`` is best on ``held_out``; the answer is then solved on both together.

    Args:
        fitted: Moments to solve with.
        held_out: Moments of other samples, or ``None`` to use a ridge of 1e-2.

    Returns:
        ``(groups, regressors, channels / groups)``; with a bias, the last row is its change.
    """
    if held_out is None:
        return _solve(fitted, _RIDGE_UNSEEN)
    ridge = _best_ridge(lambda ridge: held_out.change_of_error(_solve(fitted, ridge)))
    if ridge is None:
        return torch.zeros_like(fitted.cross)
    return _solve(fitted + held_out, ridge)


def _best_ridge(change_of_error: Callable[[float], float]) -> float | None:
    """The ridge that lowers the error on held-out samples most; ``None`` where none lowers it."""
    best_ridge, best_change = None, 0.0
    for ridge in _RIDGES:
        change = change_of_error(ridge)
        if change < best_change:
            best_ridge, best_change = ridge, change
    return best_ridge


def _solve(moments: Moments, ridge: float) -> Tensor:
    gram = moments.gram
    if moments.has_bias:
        pull = torch.cat([ridge * mean_energy(gram[:, :-1, :-1]), _RIDGE_OF_BIAS * gram[:, -1:, -1]], dim=1)
    else:
        pull = ridge * mean_energy(gram)
    return torch.cholesky_solve(moments.cross, ridge_cholesky(gram, pull))


class DualRegression:
    """Equations over the rows: the same answer as :class:`PrimalRegression`, for few rows of many features.

    With the kernel ``K = X X^T`` it is ``X^T (K + ridge)^-1 R``. Of more rows than fit into a bounded memory,
    some are drawn.

    Args:
        layer: A convolution or a linear layer.
        name: What errors call it.
        seed: Fixes which rows are drawn.
    """

    def __init__(self, layer: nn.Module, name: str, *, seed: int = 0) -> None:
        assert isinstance(layer.weight, nn.Parameter)
        self._layer = layer
        self._name = name
        self._most = min(_MOST_ROWS, max(1, _MOST_ROW_ELEMENTS // layer.weight.shape[1:].numel()))
        self._draw = FairDraw(self._most, seed=seed)
        self._inputs = self._residuals = self._held_out = torch.empty(0)

    def add(self, inputs: Tensor, residual: Tensor, *, held_out: bool) -> None:
        """See :meth:`Regression.add`."""
        size = examples_at_a_time(self._layer, inputs)
        for piece, left in zip(torch.split(inputs, size), torch.split(residual, size), strict=True):
            rows, lacks = input_patches(self._layer, piece), output_rows(self._layer, left)
            if not self._draw.kept:
                self._make_room(rows, lacks)
            places, taken = (chosen.to(rows.device) for chosen in self._draw.draw(rows.shape[1]))
            self._inputs[:, places] = in_full_precision(rows[:, taken])
            self._residuals[:, places] = in_full_precision(lacks[:, taken])
            self._held_out[places] = held_out

    def _make_room(self, rows: Tensor, lacks: Tensor) -> None:
        """Memory that nothing has been written to yet is not taken."""
        self._inputs, self._residuals = (
            in_full_precision(like[:, :0]).new_empty(len(like), self._most, like.shape[2])
            for like in (rows, lacks)
        )
        self._held_out = torch.empty(self._most, dtype=torch.bool, device=rows.device)

    @property
    def is_underdetermined(self) -> bool:
        """See :attr:`Regression.is_underdetermined`."""
        fitted = int((~self._held_out[: self._draw.kept]).sum())
        return fitted < self._features + self._has_bias

    def changes(self) -> Iterator[Change]:
        """See :meth:`Regression.changes`; the weights of some features at a time, then the bias."""
        kept = self._draw.kept
        residuals = check_finite(self._residuals[:, :kept].double(), layer=self._name)
        kernel = torch.zeros(1, dtype=residuals.dtype, device=residuals.device)
        for features in self._feature_slices():
            columns = self._columns(features)
            kernel = kernel + columns @ columns.mT
        check_finite(kernel, layer=self._name)
        held_out = self._held_out[:kept]
        duals = self._duals(kernel, residuals, held_out.nonzero()[:, 0], (~held_out).nonzero()[:, 0])
        if duals is None:
            return
        weights, bias = duals
        for features in self._feature_slices():
            yield features, self._columns(features).mT @ weights
        if self._has_bias:
            yield slice(self._features, self._features + 1), bias

    def _duals(
        self, kernel: Tensor, residuals: Tensor, held_out: Tensor, fitted: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Weights of the rows, and the change of the bias; ``None`` where no change is best."""
        if not len(held_out):
            return self._solve(kernel, residuals, _RIDGE_UNSEEN)
        own, own_residuals = kernel[:, fitted][:, :, fitted], residuals[:, fitted]
        across, others = kernel[:, held_out][:, :, fitted], residuals[:, held_out]

        def change_of_error(ridge: float) -> float:
            weights, bias = self._solve(own, own_residuals, ridge)
            explained = across @ weights + bias
            return float((explained * (explained - 2 * others)).sum())

        ridge = _best_ridge(change_of_error)
        return None if ridge is None else self._solve(kernel, residuals, ridge)

    def _solve(self, kernel: Tensor, residuals: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        rows = kernel.shape[-1]
        energy = kernel.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True) / self._features
        pull = (ridge * energy).clamp_min(1e-12)
        # The bias is a further feature, always 1, whose pull is another one.
        bias_share = (pull / (_RIDGE_OF_BIAS * rows) if self._has_bias else torch.zeros_like(pull))[..., None]
        factor = ridge_cholesky(kernel + bias_share, pull.expand(-1, rows))
        weights = torch.cholesky_solve(residuals, factor)
        return weights, bias_share * weights.sum(dim=1, keepdim=True)

    @property
    def _features(self) -> int:
        return self._inputs.shape[2]

    @property
    def _has_bias(self) -> bool:
        return self._layer.bias is not None

    def _feature_slices(self) -> Iterator[slice]:
        for start in range(0, self._features, _FEATURES_AT_A_TIME):
            yield slice(start, min(start + _FEATURES_AT_A_TIME, self._features))

    def _columns(self, features: slice) -> Tensor:
        return self._inputs[:, : self._draw.kept, features].double()
