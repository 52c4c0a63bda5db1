"""Structured optimal brain surgeon: which blocks of input channels a layer misses least.

Hassibi and Stork 1993, *Optimal brain surgeon*, equations 5 and 6, with a block of regressors in place of a
single weight and the Gram matrix of a linear layer's inputs as its Hessian (Frantar and Alistarh 2022,
*Optimal brain compression*, section 4). Deviations: a block may be consumed by several layers, whose errors
are added; and errors count by how much the network's output cares for them, where that is known.

The greedy removal is a block Cholesky factorisation of the inverse Gram matrix whose pivot is the cheapest
block. Columns are computed when they are chosen, and what they take from the rest is brought up to date in
large products once in a while, so that all steps together cost about as much as one inversion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress_search.linear_algebra import mean_energy, ridge_cholesky
from compress_search.methods.brain_surgeon_on_rows import ConsumerOnRows, StateOnRows

_RIDGE = 1e-4
"""Added to the Gram matrix relative to its mean diagonal; keeps a rank-deficient one invertible."""

_PENDING = 256
"""How many features are removed before the rest of the inverse is brought up to date."""


@dataclass(frozen=True)
class Consumer:
    """A layer that mixes the channels in question.

    Attributes:
        covariance: ``(features, features)`` in float64, of its input patches; the second moments about zero
            where the layer has no bias that could make good a change of the mean.
        weights: ``(features, channels)`` in float64.
        blocks: ``(number of blocks, features per block)``, the features that each block feeds. Features of
            no block are never removed.
        root: ``(channels, channels)``, lower triangular. An error ``e`` of the outputs counts
            ``|e @ root|^2``; with ``None`` it counts ``|e|^2`` relative to the energy of the layer's output.
    """

    covariance: Tensor
    weights: Tensor
    blocks: Tensor
    root: Tensor | None = None


@dataclass(frozen=True)
class Removal:
    """The order in which blocks are removed.

    Attributes:
        order: Indices of the removed blocks, the one that is missed least first.
        errors: For each step, what the squared output errors that it adds count, summed over the consumers,
            with all remaining weights re-solved.
        kept: Indices of the blocks that stay, in ascending order.
        weights: For each number of blocks asked for, what gives each consumer's weights
            ``(features, channels)`` re-solved for that many blocks, with zeros for the features of the
            removed ones.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]
    kept: tuple[int, ...]
    weights: Mapping[int, tuple[Callable[[], Tensor], ...]] = field(default_factory=dict)

    def kept_at(self, size: int) -> tuple[int, ...]:
        """Indices of the blocks that are left when ``size`` of them are, in ascending order."""
        removed_later = len(self.order) + len(self.kept) - size
        return tuple(sorted((*self.order[removed_later:], *self.kept)))


def remove_blocks(
    consumers: Sequence[Consumer | ConsumerOnRows],
    *,
    keep: int = 0,
    protected: Collection[int] = (),
    snapshots: Collection[int] = (),
) -> Removal:
    """Remove blocks one by one, each time the one whose removal raises the output error least.

    Removing block ``b``, with the rest re-solved, costs ``tr(W_b^T [(G^-1)_bb]^-1 W_b)``; then ``G^-1`` and
    ``W`` are downdated.

    Args:
        consumers: At least one; all have the same number of blocks.
        keep: How many blocks stay. Each removal takes time, so stopping early is worth it.
        protected: Indices of blocks that stay in any case, even if they are more than ``keep``.
        snapshots: Numbers of blocks at which the re-solved weights are wanted. Those that are never
            reached, because more blocks stay, are missing from the answer.
    """
    states = [_state_of(consumer, resolve=bool(snapshots)) for consumer in consumers]
    remaining = list(range(len(consumers[0].blocks)))
    order: list[int] = []
    errors: list[float] = []
    weights: dict[int, tuple[Callable[[], Tensor], ...]] = {}
    free = set(remaining) - set(protected)
    while True:
        if len(remaining) in snapshots:
            weights[len(remaining)] = tuple(state.resolved() for state in states)
        if len(remaining) <= keep or not free:
            return Removal(tuple(order), tuple(errors), tuple(remaining), weights)
        costs = torch.stack([state.costs() for state in states]).sum(dim=0)
        candidates = [block for block in remaining if block in free]
        block = candidates[int(costs[candidates].argmin())]
        order.append(block)
        errors.append(float(costs[block]))
        remaining.remove(block)
        free.remove(block)
        for state in states if free or snapshots else ():
            state.remove(block)


def bias_that_follows(bias: Tensor, mean: Tensor, weights: Tensor, resolved: Tensor) -> Tensor:
    """Move a bias so that the layer's mean output stays what it was.

    It is what re-solving for the bias too would give, since the covariance is taken about the mean.

    Args:
        bias: ``(channels,)``.
        mean: ``(features,)``, of the layer's input patches.
        weights: ``(features, channels)``, before.
        resolved: ``(features, channels)``, after.
    """
    moved = mean.to(weights.dtype) @ weights - mean.to(resolved.dtype) @ resolved
    return bias + moved.to(bias.dtype)


def _state_of(consumer: Consumer | ConsumerOnRows, *, resolve: bool) -> _State | StateOnRows:
    if isinstance(consumer, ConsumerOnRows):
        return StateOnRows(consumer, ridge=_RIDGE)
    return _State(consumer, resolve=resolve)


class _State:
    """A consumer while blocks are being removed from it.

    The inverse of what remains of the Gram matrix is ``inverse - columns @ columns.T`` and the weights are
    ``weights - columns @ answers``, with the columns of the removals that are still pending. Rows are the
    features of the live blocks, block by block, then those of no block if the weights are wanted.
    """

    def __init__(self, consumer: Consumer, *, resolve: bool) -> None:
        covariance = consumer.covariance
        self._shape = consumer.weights.shape
        blocks, self._width = consumer.blocks.shape
        grouped = consumer.blocks.flatten()
        others = torch.ones(len(covariance), dtype=torch.bool, device=grouped.device)
        others[grouped] = False
        self._features = torch.cat([grouped, others.nonzero()[:, 0]]) if resolve else grouped
        """The feature that each row stands for."""
        # Neither the factor nor the inverse in another order outlives its line: each can be 170 MB.
        self._inverse = torch.cholesky_inverse(ridge_cholesky(covariance, _RIDGE * mean_energy(covariance)))
        self._inverse = self._inverse[self._features[:, None], grouped]
        # Re-solving is linear in each output, so mixing them before it is undone after it.
        self._root = consumer.root
        weights = consumer.weights if self._root is None else consumer.weights @ self._root
        self._weights = weights[self._features]
        self._energy = covariance.new_ones(())
        if self._root is None:
            energy = (weights * (covariance @ weights)).sum()
            self._energy = energy.clamp_min(torch.finfo(covariance.dtype).tiny)
        self._slots = torch.arange(blocks)
        """Where each block's rows begin, in blocks; -1 for those that are gone."""
        own = self._weights[: len(grouped)].reshape(blocks, self._width, -1)
        square = self._inverse[: len(grouped)].reshape(blocks, self._width, blocks, self._width)
        self._diagonal = square.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()
        self._energies = own @ own.mT
        self._live = torch.ones(blocks, dtype=torch.bool, device=grouped.device)
        self._forget_pending()

    def costs(self) -> Tensor:
        """What removing each block would add, ``(number of blocks,)``; infinite where gone."""
        solved = torch.linalg.solve(self._diagonal, self._energies)
        costs = solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / self._energy
        all_costs: Tensor = costs.new_full(self._slots.shape, torch.inf).cpu()
        present = self._slots >= 0
        all_costs[present] = costs.cpu()[self._slots[present]]
        return all_costs

    def remove(self, block: int) -> None:
        """Take a block out and re-solve the weights of the rest."""
        width, pending = self._width, self._pending
        slot = int(self._slots[block])
        own = slice(slot * width, (slot + 1) * width)
        columns, answers = self._columns[:, :pending], self._answers[:pending]
        factor = torch.linalg.cholesky(self._diagonal[slot])
        taken = torch.addmm(self._inverse[:, own], columns, columns[own].T, alpha=-1)
        column = torch.linalg.solve_triangular(factor, taken.T, upper=False).T
        weights = torch.addmm(self._weights[own], columns[own], answers, alpha=-1)
        answer = torch.linalg.solve_triangular(factor, weights, upper=False)

        # What the costs need is kept for all blocks: their part of the inverse, and their weights' products.
        blocks = len(self._diagonal)
        grouped = blocks * width
        crossed = torch.addmm(
            self._weights[:grouped] @ answer.T, columns[:grouped], answers @ answer.T, alpha=-1
        )
        by_block, crossed = column[:grouped].view(blocks, width, -1), crossed.view(blocks, width, -1)
        self._diagonal -= by_block @ by_block.mT
        change = crossed @ by_block.mT
        self._energies += by_block @ (answer @ answer.T) @ by_block.mT - change - change.mT

        self._columns[:, pending : pending + width] = column
        self._answers[pending : pending + width] = answer
        self._pending += width
        self._live[slot] = False
        self._slots[block] = -1
        # A place holder that can be inverted until the block's rows are dropped.
        self._diagonal[slot] = torch.eye(width, dtype=column.dtype, device=column.device)
        self._energies[slot] = 0.0
        if self._pending + width > self._columns.shape[1]:
            self._catch_up()

    def resolved(self) -> Callable[[], Tensor]:
        """What gives the weights as they are re-solved now, zeros for the features that are gone."""
        self._catch_up()
        every = self._weights.new_zeros(self._shape)
        every[self._features] = self._weights
        if self._root is not None:
            every = torch.linalg.solve_triangular(self._root, every, upper=False, left=False)
        return lambda: every

    def _catch_up(self) -> None:
        """Carry out what is pending, and drop the rows of blocks that are gone."""
        grouped = self._live.repeat_interleave(self._width)
        others = torch.ones(len(self._features) - len(grouped), dtype=torch.bool, device=grouped.device)
        kept = torch.cat([grouped, others]).nonzero()[:, 0]
        rows = self._columns[kept, : self._pending]
        self._inverse = self._inverse[kept[:, None], grouped.nonzero()[:, 0]]
        self._inverse.addmm_(rows, rows[: self._inverse.shape[1]].T, alpha=-1)
        self._weights = self._weights[kept]
        self._weights.addmm_(rows, self._answers[: self._pending], alpha=-1)
        self._features = self._features[kept]
        self._diagonal, self._energies = self._diagonal[self._live], self._energies[self._live]
        present = self._slots >= 0
        self._slots[present] = torch.arange(int(present.sum()))
        self._live = self._live[self._live]
        self._forget_pending()

    def _forget_pending(self) -> None:
        capacity = max(self._width, _PENDING // self._width * self._width)
        self._pending = 0
        self._columns = self._inverse.new_empty(len(self._features), capacity)
        self._answers = self._weights.new_empty(capacity, self._weights.shape[1])
