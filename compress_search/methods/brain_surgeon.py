"""Structured optimal brain surgeon: which blocks of input channels a layer misses least.

Hassibi and Stork 1993, *Optimal brain surgeon*, equations 5 and 6, with a block of regressors in place of a
single weight and the Gram matrix of a linear layer's inputs as its Hessian (Frantar and Alistarh 2022,
*Optimal brain compression*, section 4). Deviation: a block may be consumed by several layers; their errors,
each relative to the energy of the layer's output, are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_search.linear_algebra import mean_energy, ridge_cholesky

_RIDGE = 1e-4
"""Added to the Gram matrix relative to its mean diagonal; keeps a rank-deficient one invertible."""


@dataclass(frozen=True)
class Consumer:
    """A layer that mixes the channels in question.

    Attributes:
        covariance: ``(features, features)`` in float64, of its input patches.
        weights: ``(features, channels)`` in float64.
        blocks: ``(number of blocks, features per block)``, the features that each block feeds.
    """

    covariance: Tensor
    weights: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Removal:
    """The order in which blocks are removed.

    Attributes:
        order: Indices of the removed blocks, the one that is missed least first.
        errors: For each step, the relative squared output error that it adds, summed over the consumers,
            with all remaining weights re-solved.
        kept: Indices of the blocks that stay, in ascending order.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]
    kept: tuple[int, ...]


def remove_blocks(consumers: Sequence[Consumer], *, keep: int = 0) -> Removal:
    """Remove blocks one by one, each time the one whose removal raises the output error least.

    Removing block ``b``, with the rest re-solved, costs ``tr(W_b^T [(G^-1)_bb]^-1 W_b)``; then ``G^-1`` and
    ``W`` are downdated.

    Args:
        consumers: At least one; all have the same number of blocks.
        keep: How many blocks stay. Each removal takes time, so stopping early is worth it.
    """
    states = [_State(consumer) for consumer in consumers]
    remaining = list(range(len(consumers[0].blocks)))
    order, errors = [], []
    while len(remaining) > keep:
        costs = torch.stack([state.costs(remaining) for state in states]).sum(dim=0)
        position = int(costs.argmin())
        block = remaining.pop(position)
        order.append(block)
        errors.append(float(costs[position]))
        for state in states if remaining else ():
            state.remove(block)
    return Removal(tuple(order), tuple(errors), tuple(remaining))


class _State:
    """A consumer while blocks are being removed from it."""

    def __init__(self, consumer: Consumer) -> None:
        covariance = consumer.covariance
        factor = ridge_cholesky(covariance, _RIDGE * mean_energy(covariance))
        self._inverse = torch.cholesky_inverse(factor)
        self._weights = consumer.weights.clone()
        self._blocks = consumer.blocks
        energy = (consumer.weights * (covariance @ consumer.weights)).sum()
        self._energy = energy.clamp_min(torch.finfo(covariance.dtype).tiny)

    def costs(self, remaining: Sequence[int]) -> Tensor:
        """Relative error that removing each of the remaining blocks would add, ``(len(remaining),)``."""
        features = self._blocks[list(remaining)]
        inverse = self._inverse[features[:, :, None], features[:, None, :]]
        weights = self._weights[features]
        errors: Tensor = (weights * torch.linalg.solve(inverse, weights)).sum(dim=(1, 2))
        return errors / self._energy

    def remove(self, block: int) -> None:
        """Take a block out and re-solve the weights of the rest."""
        features = self._blocks[block]
        columns = self._inverse[:, features]
        spread = torch.linalg.solve(self._inverse[features][:, features], columns.T)
        self._weights -= columns @ torch.linalg.solve(
            self._inverse[features][:, features], self._weights[features]
        )
        self._inverse -= columns @ spread
