"""Rows that stand for all: all of them while they fit, then a fair draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search.patches import input_patches
from compress_search.sampled_rows import RowSampling, most_rows


def _sample(layer, batches, **changes):
    sampling = RowSampling(layer, **changes)
    for batch in batches:
        sampling.add(batch)
    return sampling


def test_few_rows_are_all_kept():
    layer = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    batches = [torch.randn(number, 4, 5, 5) for number in (3, 1, 2)]
    sampling = _sample(layer, batches)
    assert sampling.seen == 6 * 25
    assert torch.equal(sampling.sample().values, input_patches(layer, torch.cat(batches)))


def test_half_precision_is_kept_in_float32():
    assert _sample(nn.Linear(4, 2), [torch.ones(3, 4).bfloat16()]).sample().values.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(50,), (7,) * 7 + (1,), (1,) * 50])
def test_of_many_rows_each_is_as_likely_to_stay(sizes, monkeypatch):
    monkeypatch.setattr("compress_search.sampled_rows._MOST_ROWS", 10)
    rows = torch.arange(50.0)[:, None].expand(50, 3)
    stayed = torch.zeros(50)
    draws = 400
    for seed in range(draws):
        sampling = _sample(nn.Linear(3, 1), torch.split(rows, sizes), seed=seed)
        (kept,) = sampling.sample().values
        numbers = kept[:, 0].long()
        assert sampling.seen == 50 and len(numbers) == 10
        assert torch.equal(kept, rows[numbers]), "a row stays whole"
        assert len(numbers.unique()) == 10, "and none stays twice"
        stayed[numbers] += 1
    # Each is binomial, with a standard deviation of 0.02.
    assert (stayed / draws - 10 / 50).abs().max() < 0.08


def test_wide_rows_are_fewer():
    assert most_rows(8193) == 4095 and most_rows(25088) == 1337 and most_rows(10**9) == 1
    assert most_rows(10) == 4096
