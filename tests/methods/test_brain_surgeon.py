"""The brain surgeon's closed form, against re-solving every least-squares problem from scratch."""

from __future__ import annotations

import pytest
import torch

from compress_search.linear_algebra import mean_energy
from compress_search.methods import brain_surgeon
from compress_search.methods.brain_surgeon import Consumer, bias_that_follows, remove_blocks


def _consumer(
    blocks: int, width: int, channels: int, seed: int, *, others: int = 0, weighed: bool = False
) -> Consumer:
    """A consumer whose blocks' features lie in a random order, with some features of no block."""
    generator = torch.Generator().manual_seed(seed)
    features = blocks * width + others
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(400, features, generator=generator, dtype=torch.float64) @ mixing
    order = torch.randperm(features, generator=generator)
    root = torch.randn(channels, channels, generator=generator, dtype=torch.float64).tril()
    root.diagonal().abs_().add_(0.5)
    return Consumer(
        covariance=rows.T @ rows / len(rows),
        weights=torch.randn(features, channels, generator=generator, dtype=torch.float64),
        blocks=order[: blocks * width].reshape(blocks, width),
        root=root if weighed else None,
    )


def _resolved(consumer: Consumer, kept: list[int]) -> torch.Tensor:
    """The best weights without the features of the blocks that are gone, from the normal equations."""
    gram, weights = consumer.covariance, consumer.weights
    gram = gram + torch.diag(brain_surgeon._RIDGE * mean_energy(gram))
    gone = consumer.blocks[[b for b in range(len(consumer.blocks)) if b not in kept]].flatten().tolist()
    features = [f for f in range(len(gram)) if f not in gone]
    best = torch.zeros_like(weights)
    if features:
        best[features] = torch.linalg.solve(gram[features][:, features], gram[features] @ weights)
    return best


def _least_error(consumer: Consumer, kept: list[int]) -> float:
    """What the error of the best weights on the kept blocks counts."""
    gram, weights = consumer.covariance, consumer.weights
    energy = float(torch.trace(weights.T @ gram @ weights))
    gram = gram + torch.diag(brain_surgeon._RIDGE * mean_energy(gram))
    difference = weights - _resolved(consumer, kept)
    if consumer.root is None:
        return float(torch.trace(difference.T @ gram @ difference)) / energy
    return float(torch.trace(difference.T @ gram @ difference @ consumer.root @ consumer.root.T))


@pytest.fixture(params=[1, 4, 256], autouse=True)
def pending(request, monkeypatch):
    """However often the inverse is brought up to date, nothing changes."""
    monkeypatch.setattr(brain_surgeon, "_PENDING", request.param)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("weighed", [False, True])
def test_every_step_removes_the_block_that_brute_force_would(width, consumers, others, weighed):
    group = [_consumer(6, width, 4, seed, others=others, weighed=weighed) for seed in range(consumers)]
    removal = remove_blocks(group)
    kept, error_before = list(range(6)), 0.0
    for block, added in zip(removal.order, removal.errors, strict=True):
        errors = {b: sum(_least_error(c, [k for k in kept if k != b]) for c in group) for b in kept}
        assert block == min(errors, key=errors.get)
        assert added == pytest.approx(errors[block] - error_before, rel=1e-7, abs=1e-10)
        error_before = errors[block]
        kept.remove(block)
    assert removal.kept == ()


@pytest.mark.parametrize("keep", [0, 2, 6])
def test_stopping_early_keeps_those_that_would_be_removed_last(keep):
    consumer = _consumer(6, 2, 4, seed=3)
    everything, some = remove_blocks([consumer]), remove_blocks([consumer], keep=keep)
    assert some.order == everything.order[: 6 - keep]
    assert some.errors == everything.errors[: 6 - keep]
    assert some.kept == tuple(sorted(everything.order[6 - keep :])) == everything.kept_at(keep)


def test_protected_blocks_stay_and_the_others_go_as_if_there_were_no_others():
    consumer = _consumer(6, 2, 4, seed=4)
    first = remove_blocks([consumer]).order[0]
    removal = remove_blocks([consumer], protected=[first, 3])
    assert removal.kept == tuple(sorted({first, 3}))
    kept = list(range(6))
    for block in removal.order:
        errors = {b: _least_error(consumer, [k for k in kept if k != b]) for b in kept if b not in (first, 3)}
        assert block == min(errors, key=errors.get)
        kept.remove(block)


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("weighed", [False, True])
def test_snapshots_are_the_weights_solved_from_scratch(others, weighed):
    group = [_consumer(7, width, 4, seed=width, others=others, weighed=weighed) for width in (1, 3)]
    removal = remove_blocks(group, keep=1, snapshots=[0, 1, 4, 7])
    assert set(removal.weights) == {1, 4, 7}, "fewer than one block are never left"
    for size, weights in removal.weights.items():
        kept = removal.kept_at(size)
        assert len(kept) == size
        for consumer, resolved in zip(group, weights, strict=True):
            torch.testing.assert_close(resolved(), _resolved(consumer, list(kept)), rtol=1e-7, atol=1e-10)
            gone = consumer.blocks[[b for b in range(7) if b not in kept]].flatten()
            assert not resolved()[gone].any()
    assert removal.order == remove_blocks(group, keep=1).order


def test_the_bias_that_follows_is_what_a_fit_with_a_bias_gives():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 5, generator=generator, dtype=torch.float64) + torch.arange(5)
    weights = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, generator=generator, dtype=torch.float64)
    mean = rows.mean(dim=0)
    centred = rows - mean
    consumer = Consumer(centred.T @ centred / 300, weights, torch.arange(5)[:, None])
    removal = remove_blocks([consumer], keep=3, snapshots=[3])
    regressors = torch.cat([rows[:, removal.kept], torch.ones(300, 1, dtype=torch.float64)], dim=1)
    best = torch.linalg.lstsq(regressors, rows @ weights + bias).solution
    follows = bias_that_follows(bias, mean, weights, removal.weights[3][0]())
    torch.testing.assert_close(follows, best[-1], rtol=0.0, atol=1e-3)


def test_a_copy_of_a_channel_costs_nothing():
    base = torch.randn(300, 4, dtype=torch.float64)
    rows = torch.cat([base, base[:, :1]], dim=1)
    consumer = Consumer(rows.T @ rows / 300, torch.randn(5, 3, dtype=torch.float64), torch.arange(5)[:, None])
    removal = remove_blocks([consumer])
    assert removal.order[0] in (0, 4)
    assert removal.errors[0] < 1e-3
