"""The data's random numbers depend on nothing but their seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from compress_search.fingerprint import seeded
from compress_search.training.random_streams import RandomState, batches_of


class Noisy(Dataset):
    """Draws from all three global sources for every item."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()])


def loaders():
    shuffled = DataLoader(Noisy(), batch_size=2, shuffle=True)
    own = torch.Generator().manual_seed(5)
    return [
        shuffled,
        DataLoader(Noisy(), batch_size=2, sampler=RandomSampler(Noisy(), generator=own)),
        DataLoader(Noisy(), batch_size=2, sampler=RandomSampler(Noisy(), replacement=True)),
        DataLoader(Noisy(), batch_size=2, shuffle=True, generator=own),
    ]


def drawn(loader, *, skip=0, between=lambda: None):
    found = []
    with seeded(3, loader):
        for batch in batches_of(loader, skip=skip):
            between()
            found.append(batch)
    return found


@pytest.mark.parametrize("loader", loaders())
def test_what_is_drawn_between_batches_changes_none(loader):
    def draw():
        torch.rand(3), np.random.rand(2), random.random()

    for one, other in zip(drawn(loader), drawn(loader, between=draw), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loader", loaders())
@pytest.mark.parametrize("skip", [1, 5, 6])
def test_skipped_batches_leave_the_others_as_they_are(loader, skip):
    rest = drawn(loader, skip=skip)
    assert len(rest) == 6 - skip
    for one, other in zip(drawn(loader)[skip:], rest, strict=True):
        assert torch.equal(one, other)


def test_more_than_there_is_cannot_be_skipped():
    with pytest.raises(IndexError, match="ended after 6 batches; it had 7 before"):
        drawn(loaders()[0], skip=7)


def test_the_state_outside_goes_on_as_if_no_batch_had_been_drawn():
    with seeded(3):
        alone = [torch.rand(()).item() for _ in range(6)]
    found = []
    drawn(loaders()[0], between=lambda: found.append(torch.rand(()).item()))
    assert found == alone


def test_a_state_can_be_restored_again_and_again():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random(), np.random.randn()

    with seeded(0):
        np.random.randn()  # leaves a second normal number waiting
        state = RandomState.now()
        first = draw()
        state.restore()
        assert draw() == first
        state.restore()
        assert draw() == first
