"""The surgeon on rows, against the surgeon on the Gram matrix of the same rows."""

from __future__ import annotations

import math

import pytest
import torch

from compress_search.methods.brain_surgeon import Consumer, remove_blocks
from compress_search.methods.brain_surgeon_on_rows import ConsumerOnRows


def _pair(*, rows: int, width: int, others: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    """The same layer of six blocks, described either way."""
    generator = torch.Generator().manual_seed(seed)
    features = 6 * width + others
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, features, generator=generator, dtype=torch.float64) @ mixing
    weights = torch.randn(features, 4, generator=generator, dtype=dtype)
    blocks = torch.randperm(features, generator=generator)[: 6 * width].reshape(6, width)
    dense = Consumer(values.T @ values / rows, weights.double(), blocks)
    return dense, ConsumerOnRows(values / math.sqrt(rows), weights, blocks)


@pytest.mark.parametrize("rows", [3, 12, 100])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("others", [0, 2])
def test_order_errors_and_weights_are_those_of_the_gram_matrix(rows, width, others, monkeypatch):
    monkeypatch.setattr("compress_search.methods.brain_surgeon_on_rows._FEATURES_AT_A_TIME", 4)
    dense, on_rows = _pair(rows=rows, width=width, others=others)
    asked = {"keep": 1, "protected": [2], "snapshots": [1, 3, 6]}
    expected, found = remove_blocks([dense], **asked), remove_blocks([on_rows], **asked)
    assert found.order == expected.order and found.kept == expected.kept
    assert found.errors == pytest.approx(expected.errors, rel=1e-5, abs=1e-9)
    assert set(found.weights) == set(expected.weights)
    for size, (wanted,) in expected.weights.items():
        (given,) = found.weights[size]
        torch.testing.assert_close(given(), wanted(), rtol=1e-5, atol=1e-6)
        gone = on_rows.blocks[[b for b in range(6) if b not in found.kept_at(size)]].flatten()
        assert not given()[gone].any()


def test_both_kinds_of_layers_decide_together():
    (dense, on_rows), (other, _) = (_pair(rows=40, width=w, others=0, seed=w) for w in (2, 3))
    expected, found = remove_blocks([dense, other]), remove_blocks([on_rows, other])
    assert found.order == expected.order
    assert found.errors == pytest.approx(expected.errors, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_weights_of_less_precision_give_the_same_answers(dtype, close):
    dense, on_rows = _pair(rows=100, width=2, others=0, dtype=dtype)
    expected, found = remove_blocks([dense], snapshots=[3]), remove_blocks([on_rows], snapshots=[3])
    assert found.order == expected.order
    assert found.errors == pytest.approx(expected.errors, rel=close)
    given, wanted = found.weights[3][0](), expected.weights[3][0]()
    assert given.dtype == dtype
    torch.testing.assert_close(given, wanted.to(dtype), rtol=1e-2, atol=1e-3)


def test_inputs_that_are_all_zero_do_no_harm():
    _, on_rows = _pair(rows=5, width=2, others=0)
    nothing = ConsumerOnRows(torch.zeros_like(on_rows.rows), on_rows.weights, on_rows.blocks)
    removal = remove_blocks([nothing], keep=2)
    assert len(removal.order) == 4 and all(map(math.isfinite, removal.errors))
