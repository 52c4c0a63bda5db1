"""Cholesky factors of Gram matrices, which are singular as often as not, and their largest eigenvectors."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

_LARGE = 1024
"""From this size on it saves time to compute only the eigenvectors that are wanted."""


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


def top_eigenvectors(matrix: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of symmetric matrices, and their eigenvectors.

    Of a large matrix on a CPU only those that are wanted are computed, in about half the time of all.

    Args:
        matrix: ``(..., n, n)``; the lower triangles are used.
        number: How many are wanted, at most ``n``.

    Returns:
        The eigenvalues ``(..., number)``, the largest first, and the eigenvectors ``(..., n, number)``.
    """
    size = matrix.shape[-1]
    if matrix.device.type != "cpu" or size < _LARGE or number > size // 2:
        values, vectors = torch.linalg.eigh(matrix)
        return values[..., size - number :].flip(-1), vectors[..., size - number :].flip(-1)
    found = [_top_of_one(one, number) for one in matrix.reshape(-1, size, size)]
    values, vectors = (torch.stack(parts) for parts in zip(*found, strict=True))
    shape = matrix.shape[:-2]
    return values.reshape(*shape, number), vectors.reshape(*shape, size, number)


def _top_of_one(matrix: Tensor, number: int) -> tuple[Tensor, Tensor]:
    size = len(matrix)
    # The transpose lies in memory as LAPACK wants it, which spares a copy; so what was lower is upper.
    values, vectors = scipy.linalg.eigh(
        matrix.numpy().T, lower=False, subset_by_index=(size - number, size - 1), check_finite=False
    )
    return torch.from_numpy(values).flip(-1), torch.from_numpy(vectors).flip(-1)
