"""The brain surgeon's closed form, against re-solving every least-squares problem from scratch."""

from __future__ import annotations

import pytest
import torch

from compress_search.methods.brain_surgeon import Consumer, remove_blocks


def _consumer(blocks: int, width: int, channels: int, seed: int) -> Consumer:
    generator = torch.Generator().manual_seed(seed)
    features = blocks * width
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(400, features, generator=generator, dtype=torch.float64) @ mixing
    return Consumer(
        covariance=rows.T @ rows / len(rows),
        weights=torch.randn(features, channels, generator=generator, dtype=torch.float64),
        blocks=torch.arange(features).reshape(blocks, width),
    )


def _least_error(consumer: Consumer, kept: list[int]) -> float:
    """Relative error of the best weights on the kept blocks, from the normal equations."""
    gram, weights = consumer.covariance, consumer.weights
    energy = float(torch.trace(weights.T @ gram @ weights))
    if not kept:
        return 1.0
    features = consumer.blocks[kept].flatten()
    best = torch.linalg.solve(gram[features][:, features], gram[features] @ weights)
    difference = weights.clone()
    difference[features] -= best
    return float(torch.trace(difference.T @ gram @ difference)) / energy


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("consumers", [1, 2])
def test_every_step_removes_the_block_that_brute_force_would(width, consumers, monkeypatch):
    monkeypatch.setattr("compress_search.methods.brain_surgeon._RIDGE", 1e-12)
    group = [_consumer(6, width, 4, seed) for seed in range(consumers)]
    removal = remove_blocks(group)
    kept, error_before = list(range(6)), 0.0
    for block, added in zip(removal.order, removal.errors, strict=True):
        errors = {b: sum(_least_error(c, [k for k in kept if k != b]) for c in group) for b in kept}
        assert block == min(errors, key=errors.get)
        assert added == pytest.approx(errors[block] - error_before, rel=1e-5, abs=1e-9)
        error_before = errors[block]
        kept.remove(block)
    assert error_before == pytest.approx(consumers)


@pytest.mark.parametrize("keep", [0, 2, 6])
def test_stopping_early_keeps_those_that_would_be_removed_last(keep):
    consumer = _consumer(6, 2, 4, seed=3)
    everything, some = remove_blocks([consumer]), remove_blocks([consumer], keep=keep)
    assert some.order == everything.order[: 6 - keep]
    assert some.errors == everything.errors[: 6 - keep]
    assert some.kept == tuple(sorted(everything.order[6 - keep :]))


def test_a_copy_of_a_channel_costs_nothing():
    base = torch.randn(300, 4, dtype=torch.float64)
    rows = torch.cat([base, base[:, :1]], dim=1)
    consumer = Consumer(rows.T @ rows / 300, torch.randn(5, 3, dtype=torch.float64), torch.arange(5)[:, None])
    removal = remove_blocks([consumer])
    assert removal.order[0] in (0, 4)
    assert removal.errors[0] < 1e-3
