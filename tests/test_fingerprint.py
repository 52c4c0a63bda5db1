"""Hashes that change with what they name and with nothing else, and seeds that leave no trace."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from compress_search.fingerprint import (
    begun,
    content_hash,
    data_fingerprint,
    is_repeatable,
    model_fingerprint,
    seeded,
)

DATA = TensorDataset(torch.arange(40.0).reshape(20, 2), torch.arange(20))


def test_content_hash_ignores_the_order_of_keys_only():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert content_hash({"a": 0.1}) != content_hash({"a": 0.1 + 1e-16})
    assert len(content_hash(None)) == 20


def test_what_json_cannot_hold_has_no_hash():
    with pytest.raises(ValueError, match="Out of range"):
        content_hash(float("nan"))


def test_equal_models_have_equal_fingerprints(tiny_net):
    model = tiny_net()
    assert (
        model_fingerprint(model) == model_fingerprint(copy.deepcopy(model)) == model_fingerprint(tiny_net())
    )
    assert model_fingerprint(model) == model_fingerprint(model.eval())


def flip_a_weight(model):
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    return model


def change_a_statistic(model):
    model[1].running_mean[0] += 1
    return model


def change_a_stride(model):
    model[3].stride = (1, 1)
    return model


def change_an_activation(model):
    model[2] = nn.SiLU()
    return model


@pytest.mark.parametrize(
    "change",
    [
        flip_a_weight,
        change_a_statistic,
        change_a_stride,
        change_an_activation,
        nn.Module.double,
        nn.Module.bfloat16,
        nn.Sequential,
    ],
)
def test_any_change_of_a_model_changes_its_fingerprint(tiny_net, change):
    assert model_fingerprint(change(tiny_net())) != model_fingerprint(tiny_net())


def shuffling():
    return DataLoader(DATA, batch_size=4, shuffle=True)


def with_generator():
    return DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator())


def with_samplers_generator():
    sampler = RandomSampler(DATA, generator=torch.Generator())
    return DataLoader(DATA, sampler=BatchSampler(sampler, 4, drop_last=False), batch_size=None)


def list_of_batches():
    return [(torch.zeros(2), torch.ones(2)), {"inputs": torch.zeros(3)}]


LOADERS = pytest.mark.parametrize(
    "make", [shuffling, with_generator, with_samplers_generator, list_of_batches]
)


@LOADERS
def test_a_loaders_fingerprint_is_stable(make):
    loader = make()
    first = data_fingerprint(loader)
    next(iter(loader))
    torch.rand(1)
    assert data_fingerprint(loader) == data_fingerprint(make()) == first


@LOADERS
def test_looking_at_a_loader_changes_no_random_state(make):
    loader, untouched = make(), make()
    torch.manual_seed(5)
    data_fingerprint(loader)
    drawn = list(loader)
    torch.manual_seed(5)
    assert str(drawn) == str(list(untouched))


def test_other_data_have_another_fingerprint():
    other = TensorDataset(DATA.tensors[0] + 1, DATA.tensors[1])
    shorter = TensorDataset(*DATA[:8])
    loaders = [DataLoader(data, batch_size=4) for data in (DATA, other, shorter)]
    assert len({data_fingerprint(loader) for loader in loaders}) == 3


class Numbered(Dataset):
    """Examples of a tensor and a label, that no tensor holds."""

    def __init__(self, *, changed=None):
        self.changed = changed

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((3,), float(index)), index % 4 + (index == self.changed)


def test_how_many_examples_are_drawn_matters():
    def fingerprint(**options):
        return data_fingerprint(DataLoader(DATA, **{"batch_size": 8} | options))

    prints = {
        fingerprint(),
        fingerprint(drop_last=True),
        fingerprint(sampler=range(18)),
        fingerprint(sampler=[*range(20), *range(20)]),
    }
    assert len(prints) == 4
    assert fingerprint(drop_last=True, batch_size=5) == fingerprint(batch_size=5)


def test_labels_of_examples_further_on_matter():
    late = [*DATA.tensors[1][:19], torch.tensor(0)]
    loaders = [
        DataLoader(TensorDataset(DATA.tensors[0], labels), batch_size=4)
        for labels in (DATA.tensors[1], torch.stack(late))
    ]
    loaders += [DataLoader(Numbered(changed=place), batch_size=4) for place in (None, 40)]
    loaders += [[*DataLoader(DATA, batch_size=4)], [*DataLoader(DATA, batch_size=4)][:4] * 2]
    assert len({data_fingerprint(loader) for loader in loaders}) == len(loaders)
    assert data_fingerprint(DataLoader(Numbered())) == data_fingerprint(DataLoader(Numbered()))


def test_a_data_set_with_workers_is_asked_in_a_worker():
    class Remembering(Numbered):
        asked = ()

        def __getitem__(self, index):
            self.asked = (*self.asked, index)
            return super().__getitem__(index)

    def fingerprint(data):
        return data_fingerprint(DataLoader(data, batch_size=4, num_workers=1))

    data = Remembering()
    assert fingerprint(data) == fingerprint(Numbered()) != fingerprint(Numbered(changed=40))
    assert data.asked == ()


def test_a_pass_by_workers_that_persist_is_seeded_like_any_other():
    loader = DataLoader(Noise(), batch_size=2, num_workers=1, persistent_workers=True)
    drawn = []
    for seed in (0, 1, 0):
        with seeded(seed, loader):
            drawn.append(torch.cat([*begun(loader)]))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert is_repeatable(loader)
    loader._iterator = None


class Noise(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(3)


class Unseedable(Dataset):
    """Noise of a generator that no seed reaches."""

    def __init__(self, length):
        self.length, self.noise = length, np.random.default_rng()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.as_tensor(self.noise.random(3)), 0


def test_a_loader_that_cannot_be_seeded_is_known_by_its_length():
    assert data_fingerprint(DataLoader(Unseedable(8))) == data_fingerprint(DataLoader(Unseedable(8)))
    assert data_fingerprint(DataLoader(Unseedable(8))) != data_fingerprint(DataLoader(Unseedable(9)))
    assert not is_repeatable(DataLoader(Unseedable(8))) and is_repeatable(shuffling())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(6.0))


def test_a_stream_without_length_has_a_fingerprint():
    assert data_fingerprint(DataLoader(Stream(), batch_size=2)) == data_fingerprint(
        DataLoader(Stream(), batch_size=2)
    )


def draw():
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_a_seed_fixes_every_random_source():
    with seeded(3):
        first = draw()
    with seeded(3):
        assert draw() == first
    with seeded(4):
        assert all(new != old for new, old in zip(draw(), first, strict=True))


def test_every_random_source_goes_on_as_if_nothing_had_been():
    loader = with_generator()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    own = loader.generator.get_state()

    def fail():
        with seeded(3, loader):
            draw()
            list(loader)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert torch.equal(loader.generator.get_state(), own)


@pytest.mark.parametrize("make", [shuffling, with_generator, with_samplers_generator])
def test_a_seed_fixes_the_order_of_a_loader(make):
    loader = make()

    def order(seed):
        with seeded(seed, loader):
            return torch.cat([labels for _, labels in loader]).tolist()

    assert order(3) == order(3) != order(4)


def test_a_large_seed_is_accepted_by_every_source():
    with seeded(2**40):
        assert len(set(draw())) == 3
