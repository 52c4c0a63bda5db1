"""Cholesky factors of Gram matrices, which are singular as often as not."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_cholesky(gram: Tensor, pull: Tensor) -> Tensor:
    """Factorise ``gram + diag(pull)``, with ten times the pull again until it is positive definite.

    Products summed in float32 leave a singular Gram matrix slightly indefinite, by an amount that is not
    known beforehand.

    Args:
        gram: ``(..., n, n)``, finite and positive semi-definite up to rounding.
        pull: ``(..., n)``, not negative; a floor of 1e-12 keeps a matrix of zeros solvable.

    Returns:
        The lower Cholesky factor, ``(..., n, n)``.
    """
    assert torch.isfinite(gram).all(), "else this would never end"
    pull = pull.clamp_min(1e-12)
    while True:
        factor: Tensor
        # One copy and no more: these matrices can be the largest things in memory.
        pulled = gram.clone()
        pulled.diagonal(dim1=-2, dim2=-1).add_(pull)
        factor, fault = torch.linalg.cholesky_ex(pulled)
        if not fault.any():
            return factor
        pull = 10 * pull


def mean_energy(gram: Tensor) -> Tensor:
    """Mean of the diagonal, the scale that ridges are relative to, as a vector like the diagonal.

    Args:
        gram: ``(..., n, n)``.

    Returns:
        ``(..., n)``, all entries of a matrix the same.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return diagonal.mean(dim=-1, keepdim=True).expand_as(diagonal)
