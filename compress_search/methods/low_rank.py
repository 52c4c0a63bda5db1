"""Truncated factorisation of a weight matrix, weighted by its inputs and by what its outputs are for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_search.linear_algebra import mean_energy, ridge_cholesky

_RIDGE = 1e-6
"""Added to the Gram matrix relative to its mean diagonal, so that directions the data does not excite still
count a little: at full rank the factorisation is then exact for every input."""

_EQUAL_SHARE = 0.3
"""Added to the sensitivity relative to its mean diagonal. It is measured on few examples, and at the present
weights; outputs to which it is deaf still count a little. Anything from 0.01 to 0.3 did as well."""


@dataclass(frozen=True)
class Factors:
    """``left @ right`` approximates a matrix, most important components first.

    Attributes:
        left: ``(..., p, rank)``.
        right: ``(..., rank, q)``.
        energy: ``(..., rank)``, the squared output error that leaving out each component costs.
    """

    left: Tensor
    right: Tensor
    energy: Tensor

    def truncated(self, rank: int) -> Factors:
        """Keep the first ``rank`` components, the best approximation of that rank (Eckart and Young 1936)."""
        return Factors(self.left[..., :rank], self.right[..., :rank, :], self.energy[..., :rank])


def factorise(matrix: Tensor, gram: Tensor | None = None, sensitivity: Tensor | None = None) -> Factors:
    """Factorise a matrix so that each truncation has the least expected weighted squared output error.

    Minimises ``E |x (M - M_k) R|^2 = |L^T (M - M_k) R|^2`` with ``gram = E x^T x = L L^T`` and with
    ``sensitivity = R R^T``. With the singular vectors of ``L^T M R = U S V^T`` the answer is
    ``(M R V_k) (V_k^T R^-1)``, and as well ``(L^-T U_k) (U_k^T L^T M)``. Whichever of ``V`` and ``U`` is
    smaller is found as eigenvectors of the smaller product of ``L^T M R`` with itself, many times faster than
    all singular vectors. Each component's scale is shared evenly between its two factors, which keeps
    fine-tuning well conditioned.

    Args:
        matrix: ``(..., p, q)`` in float64, acting as ``x @ matrix``.
        gram: ``(..., p, p)``, second moments of the rows ``x``; ``None`` weighs all directions alike.
        sensitivity: ``(..., n, n)``, how much errors in the output's ``n`` channels matter, on any scale. The
            columns of the matrix are ``(n, q / n)``: taps of one channel lie together, and are weighed alike.
            ``None`` weighs all outputs alike; with neither it is plain SVD.

    Returns:
        All ``min(p, q)`` components.
    """
    p, q = matrix.shape[-2:]
    lower = None if gram is None else ridge_cholesky(gram, _RIDGE * mean_energy(gram))
    root = None if sensitivity is None else _root_of_sensitivity(sensitivity)
    weighted = matrix if lower is None else lower.mT @ matrix
    both = _weigh_columns(weighted, root)
    product = both.mT @ both if q <= p else both @ both.mT
    energy, vectors = torch.linalg.eigh(product)
    energy, vectors = energy.flip(-1).clamp_min(0), vectors.flip(-1)
    if q <= p:
        left = _weigh_columns(matrix, root) @ vectors
        right = _weigh_columns(vectors.mT, None if root is None else _inverse_of_lower(root))
    else:
        left = vectors if lower is None else torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        right = vectors.mT @ weighted
    tiny = torch.finfo(left.dtype).tiny
    scale = (left.norm(dim=-2).clamp_min(tiny) / right.norm(dim=-1).clamp_min(tiny)).sqrt()
    return Factors(left / scale[..., None, :], right * scale[..., None], energy)


def _root_of_sensitivity(sensitivity: Tensor) -> Tensor:
    """``R`` with ``R R^T`` the sensitivity relative to its mean, mixed with the identity."""
    mean = mean_energy(sensitivity).clamp_min(torch.finfo(sensitivity.dtype).tiny)
    relative = sensitivity / mean[..., None]
    return ridge_cholesky(relative, torch.full_like(mean, _EQUAL_SHARE))


def _weigh_columns(matrix: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply ``(..., p, n * taps)`` from the right by ``(..., n, n)``, each tap by itself."""
    if factor is None:
        return matrix
    by_tap = matrix.reshape(*matrix.shape[:-1], factor.shape[-1], -1).mT
    weighed: Tensor = (by_tap @ factor[..., None, :, :]).mT.flatten(-2)
    return weighed


def _inverse_of_lower(factor: Tensor) -> Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse
