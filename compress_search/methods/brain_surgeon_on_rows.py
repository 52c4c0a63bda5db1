"""The optimal brain surgeon for a layer too wide for a Gram matrix, on rows of its inputs.

With the rows ``A``, scaled so that ``A^T A`` is their covariance, and the ridge ``r``, everything that
:mod:`compress_search.methods.brain_surgeon` wants of ``(A^T A + r)^-1`` follows from the small matrix
``K = A A^T + r`` (Woodbury 1950):

* the inverse itself is ``(1 - A^T K^-1 A) / r``;
* removing features ``b`` takes ``A_b A_b^T`` from ``K``;
* the re-solved weights are the old ones plus ``A^T Z``, where ``Z`` has a row for each row of ``A``.

So a removal costs a product of ``A`` and one of the weights with a few columns, and no memory. The answers
are those of the Gram matrix of the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_search.linear_algebra import ridge_cholesky
from compress_search.moments import in_full_precision

_FEATURES_AT_A_TIME = 2**11
"""Of how many features the weights are converted to another precision at a time."""


@dataclass(frozen=True)
class ConsumerOnRows:
    """A layer that mixes the channels in question.

    Attributes:
        rows: ``(rows, features)`` in float64, of its input patches, scaled so that ``rows^T rows`` is their
            covariance; their mean is taken off where the layer has a bias that could make good its change.
        weights: ``(features, channels)`` in their own precision.
        blocks: ``(number of blocks, features per block)``, the features that each block feeds. Features of
            no block are never removed.
    """

    rows: Tensor
    weights: Tensor
    blocks: Tensor


class StateOnRows:
    """Such a layer while blocks are being removed from it.

    Args:
        consumer: The layer.
        ridge: Added to the Gram matrix relative to its mean diagonal.
    """

    def __init__(self, consumer: ConsumerOnRows, *, ridge: float) -> None:
        self._blocks = consumer.blocks
        self._weights = consumer.weights
        self._rows = consumer.rows
        kernel = self._rows @ self._rows.T
        self._ridge = float((ridge * kernel.trace() / self._rows.shape[1]).clamp_min(1e-12))
        self._inverse = torch.cholesky_inverse(
            ridge_cholesky(kernel, torch.full_like(kernel[0], self._ridge))
        )
        outputs = sum(self._rows[:, own] @ weights.double() for own, weights in self._pieces())
        assert isinstance(outputs, Tensor)
        self._energy = outputs.square().sum().clamp_min(torch.finfo(outputs.dtype).tiny)
        self._moved = torch.zeros_like(outputs)
        """``Z``."""
        self._gone = torch.zeros(len(self._blocks), dtype=torch.bool)
        one = torch.eye(self._blocks.shape[1], dtype=torch.float64, device=kernel.device)
        diagonal, energies = [], []
        for block in self._blocks:
            rows, weights = self._rows[:, block], self._weights[block].double()
            diagonal.append((one - rows.T @ (self._inverse @ rows)) / self._ridge)
            energies.append(weights @ weights.T)
        # What the costs need: the blocks' own parts of the inverse, and their weights' products.
        self._diagonal, self._energies = torch.stack(diagonal), torch.stack(energies)

    def costs(self) -> Tensor:
        """Relative error that removing each block would add, ``(number of blocks,)``; infinite where gone."""
        solved = torch.linalg.solve(self._diagonal, self._energies)
        costs: Tensor = (solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / self._energy).cpu()
        costs[self._gone] = torch.inf
        return costs

    def remove(self, block: int) -> None:
        """Take a block out and re-solve the weights of the rest."""
        own = self._blocks[block]
        rows, root = self._rows[:, own], math.sqrt(self._ridge)
        factor = torch.linalg.cholesky(self._diagonal[block])
        taken = torch.linalg.solve_triangular(factor, (self._inverse @ rows).T, upper=False).T / root
        weights = self._weights[own].double() + rows.T @ self._moved
        answer = torch.linalg.solve_triangular(factor, weights, upper=False)

        by_block = (self._rows.T @ taken)[self._blocks] / root
        crossed = (self._times(answer.T) + self._rows.T @ (self._moved @ answer.T))[self._blocks]
        self._diagonal -= by_block @ by_block.mT
        change = crossed @ by_block.mT
        self._energies += by_block @ (answer @ answer.T) @ by_block.mT + change + change.mT

        self._moved.addmm_(taken, answer, alpha=1 / root)
        self._inverse.addmm_(taken, taken.T)
        self._gone[block] = True
        # A place holder that can be inverted.
        self._diagonal[block] = torch.eye(len(own), dtype=taken.dtype, device=taken.device)
        self._energies[block] = 0.0

    def resolved(self) -> Callable[[], Tensor]:
        """What gives the weights as they are re-solved now, zeros for the features that are gone.

        They are ``(features, channels)`` in the precision of the weights, and as large: whoever asks for
        them at several sizes would not want to hold all of them.
        """
        moved, gone = self._moved.clone(), self._blocks[self._gone.to(self._blocks.device)].flatten()

        def compute() -> Tensor:
            weights = self._weights.clone()
            for own, before in self._pieces():
                weights[own] = (before.double() + self._rows[:, own].T @ moved).to(weights.dtype)
            weights[gone] = 0.0
            return weights

        return compute

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The weights of some features at a time."""
        for start in range(0, len(self._weights), _FEATURES_AT_A_TIME):
            own = slice(start, start + _FEATURES_AT_A_TIME)
            yield own, in_full_precision(self._weights[own])

    def _times(self, columns: Tensor) -> Tensor:
        """The old weights times a few columns: most of the work, and so in the weights' own precision."""
        return torch.cat([weights @ columns.to(weights.dtype) for _, weights in self._pieces()]).double()
