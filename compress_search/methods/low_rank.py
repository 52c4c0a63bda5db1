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

    Minimises ``E |x (M - M_k)|^2 = |L^T (M - M_k)|^2`` with ``gram = E x^T x = L L^T``. The right singular
    vectors ``V`` of ``L^T M`` give ``M_k = (M V_k) V_k^T`` without inverting ``L``. Each component's scale is
    shared evenly between its two factors, which keeps fine-tuning well conditioned.

    Args:
        matrix: ``(..., p, q)`` in float64, acting as ``x @ matrix``.
        gram: ``(..., p, p)``, second moments of the rows ``x``; ``None`` is plain SVD.

    Returns:
        All ``min(p, q)`` components.
    """
    weighted = matrix
    if gram is not None:
        weighted = ridge_cholesky(gram, _RIDGE * mean_energy(gram)).mT @ matrix
    _, singular, right = torch.linalg.svd(weighted, full_matrices=False)
    left = matrix @ right.mT
    scale = left.norm(dim=-2).clamp_min(torch.finfo(left.dtype).tiny).sqrt()
    return Factors(left / scale[..., None, :], right * scale[..., None], singular.square())
