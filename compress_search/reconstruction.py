"""Reconstruction: refit a compressed model's layers by least squares, in forward order.

Each layer is given the weights with which its outputs, computed from the inputs that the *compressed* net
now feeds it, come nearest to what the *original* layer put out. Errors of earlier layers are so made good
by later ones instead of adding up (He et al. 2017, section 3.2; Zhang et al. 2016, section 3.3,
"asymmetric").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.calibration import WIDEST, check_finite, warn_of_few_rows
from compress_search.linear_algebra import mean_energy, ridge_cholesky
from compress_search.moments import Moments, MomentSums
from compress_search.patches import set_weights_from_rows
from compress_search.profile import inference_mode_of

_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the pull towards the present weights that are tried, relative to the mean input energy."""

_RIDGE_UNSEEN = 1e-2
"""The ridge where there are too few batches to hold any out."""

_HELD_OUT = 4
"""One batch in so many is held out to choose the ridge by."""


@dataclass(frozen=True)
class Refit:
    """One layer to be refitted.

    Attributes:
        layer: Its name in the compressed model.
        source: Name of the layer of the original model whose outputs it should reproduce.
        outputs: Indices of the original layer's output channels that it still has; ``None`` for all.
        calls: How often both layers run in one forward pass.
    """

    layer: str
    source: str
    outputs: tuple[int, ...] | None = None
    calls: int = 1


def refit_in_forward_order(
    model: nn.Module, original: nn.Module, refits: Sequence[Refit], batches: Sequence[Tensor]
) -> None:
    """Refit layers of ``model``, in place, one after the other in the order given.

    Args:
        model: The compressed model.
        original: The model before compression.
        refits: What to refit, in forward order.
        batches: Calibration inputs, each ``(batch, ...)``; none leaves the model as it is.

    Raises:
        ModelError: Inputs or outputs of a layer are not finite.
    """
    if not batches:
        return
    few = []
    for refit in refits:
        layer = model.get_submodule(refit.layer)
        assert isinstance(layer.weight, nn.Parameter)
        if layer.weight[0].numel() > WIDEST:
            # Its Gram matrix would not fit into a bounded memory.
            continue
        fitted, held_out = _moments(model, original, refit, batches)
        if fitted.rows < fitted.gram.shape[1]:
            few.append(refit.layer)
        correction = ridge_correction(fitted, held_out)
        _add_to_weights(model.get_submodule(refit.layer), correction)
    warn_of_few_rows(few)


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
    # No change at all is a candidate too: where nothing helps on held-out samples, nothing is changed.
    best_ridge, best_change = None, 0.0
    for ridge in _RIDGES:
        change = held_out.change_of_error(_solve(fitted, ridge))
        if change < best_change:
            best_ridge, best_change = ridge, change
    if best_ridge is None:
        return torch.zeros_like(fitted.cross)
    return _solve(fitted + held_out, best_ridge)


def _solve(moments: Moments, ridge: float) -> Tensor:
    gram = moments.gram
    if moments.has_bias:
        # The bias is hardly pulled; only kept solvable where some feature is constant.
        pull = torch.cat([ridge * mean_energy(gram[:, :-1, :-1]), 1e-6 * gram[:, -1:, -1]], dim=1)
    else:
        pull = ridge * mean_energy(gram)
    return torch.cholesky_solve(moments.cross, ridge_cholesky(gram, pull))


def _moments(
    model: nn.Module, original: nn.Module, refit: Refit, batches: Sequence[Tensor]
) -> tuple[Moments, Moments | None]:
    """Accumulate the regression of one layer, in two parts: to fit, and held out."""
    layer, source = model.get_submodule(refit.layer), original.get_submodule(refit.source)
    device = next(model.parameters()).device
    outputs = None if refit.outputs is None else torch.as_tensor(refit.outputs, device=device)
    parts: list[Moments | None] = [None, None]
    with inference_mode_of(model), inference_mode_of(original):
        for number, batch in enumerate(batches):
            pieces = batch.to(device)
            wanted = _calls(original, source, pieces, refit.calls)
            given = _calls(model, layer, pieces, refit.calls)
            part = int(number % _HELD_OUT == _HELD_OUT - 1)
            for (_, target), (inputs, output) in zip(wanted, given, strict=True):
                kept = (
                    target if outputs is None else target.index_select(_channel_axis(layer, target), outputs)
                )
                moments = _batch_moments(layer, inputs, kept - output)
                check_finite(moments.gram, layer=refit.layer)
                check_finite(moments.cross, layer=refit.layer)
                sofar = parts[part]
                parts[part] = moments if sofar is None else sofar + moments
    fitted, held_out = parts
    assert fitted is not None
    return fitted, held_out


def _batch_moments(layer: nn.Module, inputs: Tensor, residual: Tensor) -> Moments:
    sums = MomentSums(layer, has_bias=layer.bias is not None)
    sums.add(inputs, residual)
    return sums.moments()


class _Reached(Exception):
    """The layer of interest has run; what comes after it need not."""


def _calls(model: nn.Module, layer: nn.Module, batch: Tensor, calls: int) -> list[tuple[Tensor, Tensor]]:
    """Run the model as far as the last call of a layer; return the input and output of each call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        # A following in-place activation would overwrite the output.
        seen.append((inputs[0], output.clone()))
        if len(seen) == calls:
            raise _Reached

    hook = layer.register_forward_hook(record)
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen


def _channel_axis(layer: nn.Module, output: Tensor) -> int:
    return output.ndim - 1 if isinstance(layer, nn.Linear) else 1


def _add_to_weights(layer: nn.Module, correction: Tensor) -> None:
    """Add ``(groups, regressors, channels / groups)`` to a layer's weights and bias, in place."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    groups, _, width = correction.shape
    present = weight.detach().double().reshape(groups, width, -1).transpose(1, 2)
    features = present.shape[1]
    changed = None
    if isinstance(bias, nn.Parameter):
        changed = bias.detach().double() + correction[:, features].reshape(-1)
    set_weights_from_rows(layer, present + correction[:, :features], changed)
