"""Truncated factorisation of a weight matrix, optionally weighted by what its inputs look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_search.linear_algebra import mean_energy, ridge_cholesky

_RIDGE = 1e-6
"""Added to the Gram matrix relative to its mean diagonal, so that directions the data does not excite still
count a little: at full rank the factorisation is then exact for every input."""


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


def factorise(matrix: Tensor, gram: Tensor | None = None) -> Factors:
    """Factorise a matrix so that each truncation has the least expected squared output error.

    Minimises ``E |x (M - M_k)|^2 = |L^T (M - M_k)|^2`` with ``gram = E x^T x = L L^T``. With the singular
    vectors of ``L^T M = U S V^T`` the answer is ``(M V_k) V_k^T``, and as well ``(L^-T U_k) (U_k^T L^T M)``.
    Whichever of ``V`` and ``U`` is smaller is found as eigenvectors of the smaller product of ``L^T M`` with
    itself, many times faster than all singular vectors. Each component's scale is shared evenly between its
    two factors, which keeps fine-tuning well conditioned.

    Args:
        matrix: ``(..., p, q)`` in float64, acting as ``x @ matrix``.
        gram: ``(..., p, p)``, second moments of the rows ``x``; ``None`` is plain SVD.

    Returns:
        All ``min(p, q)`` components.
    """
    p, q = matrix.shape[-2:]
    lower = None if gram is None else ridge_cholesky(gram, _RIDGE * mean_energy(gram))
    weighted = matrix if lower is None else lower.mT @ matrix
    product = weighted.mT @ weighted if q <= p else weighted @ weighted.mT
    energy, vectors = torch.linalg.eigh(product)
    energy, vectors = energy.flip(-1).clamp_min(0), vectors.flip(-1)
    if q <= p:
        left, right = matrix @ vectors, vectors.mT
    else:
        left = vectors if lower is None else torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        right = vectors.mT @ weighted
    tiny = torch.finfo(left.dtype).tiny
    scale = (left.norm(dim=-2).clamp_min(tiny) / right.norm(dim=-1).clamp_min(tiny)).sqrt()
    return Factors(left / scale[..., None, :], right * scale[..., None], energy)
