"""Truncated factorisation of a weight matrix, weighted by its inputs and by what its outputs are for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_search.linear_algebra import mean_energy, ridge_cholesky, top_eigenvectors
from compress_search.sampled_rows import SampledRows

_RIDGE = 1e-6
"""Added to the Gram matrix relative to its mean diagonal, so that directions the data does not excite still
count a little: at full rank the factorisation is then exact for every input."""

_EQUAL_SHARE = 0.3
"""Added to the sensitivity relative to its mean diagonal. It is measured on few examples, and at the present
weights; outputs to which it is deaf still count a little. Anything from 0.01 to 0.3 did as well."""

_ELEMENTS_AT_A_TIME = 2**24
"""How many elements of the matrix are converted to float64 at a time (128 MB)."""

_LEAST_ENERGY = 1e-6
"""Floor of the mean that the ridge is relative to, for inputs that are all zero."""


@dataclass(frozen=True)
class Factors:
    """``left @ right`` approximates a matrix, most important components first.

    Attributes:
        left: ``(..., p, rank)``.
        right: ``(..., rank, q)``.
        energy: ``(..., rank)``, the squared output error that leaving out each component costs.
        total: ``(...)``, the squared output error that leaving out all of the matrix costs.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    total: Tensor

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.left.shape[-1]

    def truncated(self, rank: int) -> Factors:
        """Keep the first ``rank`` components, the best approximation of that rank (Eckart and Young 1936)."""
        left, right = self.left[..., :rank], self.right[..., :rank, :]
        return Factors(left, right, self.energy[..., :rank], self.total)

    def error(self, rank: int) -> float:
        """Squared output error with the first ``rank`` components, relative to that without any."""
        unknown = (self.total - self.energy.sum(dim=-1)).clamp_min(0).sum()
        left_out = self.energy[..., rank:].sum() + unknown
        return float(left_out / self.total.sum().clamp_min(torch.finfo(self.total.dtype).tiny))


def factorise(
    matrix: Tensor,
    gram: Tensor | SampledRows | None = None,
    sensitivity: Tensor | None = None,
    *,
    rank: int | None = None,
) -> Factors:
    """Factorise a matrix so that each truncation has the least expected weighted squared output error.

    Minimises ``E |x (M - M_k) R|^2 = |L^T (M - M_k) R|^2`` with ``gram = E x^T x = L L^T`` and with
    ``sensitivity = R R^T``. With the singular vectors of ``L^T M R = U S V^T`` the answer is
    ``(M R V_k) (V_k^T R^-1)``, and as well ``(L^-T U_k) (U_k^T L^T M)``. Whichever of ``V`` and ``U`` is
    smaller is found as eigenvectors of the smaller product of ``L^T M R`` with itself, many times faster than
    all singular vectors. For ``V`` that is ``R^T M^T gram M R``, so that neither ``L`` nor, where rows are
    given in place of the Gram matrix, that matrix is ever needed. Each component's scale is shared evenly
    between its two factors, which keeps fine-tuning well conditioned.

    Args:
        matrix: ``(..., p, q)``, acting as ``x @ matrix``.
        gram: ``(..., p, p)``, second moments of the rows ``x``; or some of the rows, where ``q <= p``;
            ``None`` weighs all directions alike.
        sensitivity: ``(..., n, n)``, how much errors in the output's ``n`` channels matter, on any scale. The
            columns of the matrix are ``(n, q / n)``: taps of one channel lie together, and are weighed alike.
            ``None`` weighs all outputs alike; with neither it is plain SVD.
        rank: How many components are wanted, ``None`` for all. Fewer take less time and memory.

    Returns:
        The first ``rank`` of the ``min(p, q)`` components, in float64.
    """
    p, q = matrix.shape[-2:]
    wanted = min(p, q) if rank is None else min(rank, p, q)
    root = None if sensitivity is None else root_of_sensitivity(sensitivity)[0]
    if q <= p:
        product = _moments_of_outputs(matrix, gram)
        product = _weigh_columns(_weigh_columns(product, root).mT, root)
        energy, vectors = top_eigenvectors(product, wanted)
        weighed = vectors if root is None else _weigh_columns(vectors.mT, root.mT).mT
        left = weighed.new_empty(*matrix.shape[:-1], wanted)
        for own, rows in _pieces(matrix):
            left[..., own, :] = rows.double() @ weighed
        right = _weigh_columns(vectors.mT, None if root is None else _inverse_of_lower(root))
    else:
        assert not isinstance(gram, SampledRows), "they would not make the product any smaller"
        lower = None if gram is None else ridge_cholesky(gram, _RIDGE * mean_energy(gram))
        weighted = matrix.double() if lower is None else lower.mT @ matrix.double()
        both = _weigh_columns(weighted, root)
        product = both @ both.mT
        energy, vectors = top_eigenvectors(product, wanted)
        left = vectors if lower is None else torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        right = vectors.mT @ weighted
    tiny = torch.finfo(left.dtype).tiny
    # Of a component that is nothing, one factor is zero, and an infinite scale would make NaN of that.
    most = torch.finfo(left.dtype).max
    ratio = (left.norm(dim=-2).clamp_min(tiny) / right.norm(dim=-1).clamp_min(tiny)).clamp_max(most)
    scale = ratio.sqrt()
    total = product.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    # In place, since they can be the largest things in memory.
    return Factors(left.div_(scale[..., None, :]), right.mul_(scale[..., None]), energy.clamp_min(0), total)


def _moments_of_outputs(matrix: Tensor, gram: Tensor | SampledRows | None) -> Tensor:
    """``M^T (gram + ridge) M``, ``(..., q, q)``: second moments of the outputs ``x @ matrix``."""
    product = matrix.new_zeros(*matrix.shape[:-2], *matrix.shape[-1:] * 2, dtype=torch.float64)
    if isinstance(gram, Tensor):
        ridge = _RIDGE * mean_energy(gram).clamp_min(_LEAST_ENERGY)[..., None]
        whole = matrix.double()
        for own, rows in _pieces(whole):
            product += rows.mT @ (gram[..., own, :] @ whole + ridge[..., own, :] * rows)
        return product
    for _, rows in _pieces(matrix):
        rows = rows.double()
        product += rows.mT @ rows
    if gram is not None:
        outputs = sum(gram.values[..., own].double() @ rows.double() for own, rows in _pieces(matrix))
        assert isinstance(outputs, Tensor)
        product *= _RIDGE * gram.mean_energy.clamp_min(_LEAST_ENERGY)[:, None, None]
        product += outputs.mT @ outputs / outputs.shape[1]
    return product


def _pieces(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of ``(..., p, q)`` at a time, and which they are."""
    size = max(1, _ELEMENTS_AT_A_TIME // max(1, matrix[..., :1, :].numel()))
    for start in range(0, matrix.shape[-2], size):
        own = slice(start, start + size)
        yield own, matrix[..., own, :]


def root_of_sensitivity(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """Say how errors in a layer's outputs count, some of them only a little less than measured.

    Args:
        sensitivity: ``(..., n, n)``, see :func:`factorise`.

    Returns:
        ``R`` ``(..., n, n)``, lower triangular, with ``R R^T`` the sensitivity relative to its mean diagonal,
        mixed with the identity; and that mean, ``(...)``.
    """
    mean = mean_energy(sensitivity).clamp_min(torch.finfo(sensitivity.dtype).tiny)
    relative = sensitivity / mean[..., None]
    return ridge_cholesky(relative, torch.full_like(mean, _EQUAL_SHARE)), mean[..., 0]


def _weigh_columns(matrix: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply ``(..., p, n * taps)`` from the right by ``(..., n, n)``, each tap by itself."""
    if factor is None:
        return matrix
    channels = factor.shape[-1]
    by_tap = matrix.reshape(*matrix.shape[:-1], channels, -1).mT
    # One large product: as many small ones as there are rows would take ten times as long.
    weighed = by_tap.flatten(-3, -2) @ factor
    return weighed.view(by_tap.shape).mT.flatten(-2)


def _inverse_of_lower(factor: Tensor) -> Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse
