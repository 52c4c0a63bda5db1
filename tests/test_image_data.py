"""Batches cut out of memory, and Fashion-MNIST from either road."""

from __future__ import annotations

import gzip
import hashlib
import importlib
from pathlib import Path

import pytest
import torch

from compress_search.exceptions import CompressSearchError
from compress_search.fingerprint import seeded
from compress_search.training.random_streams import batches_of

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "studies")


@pytest.fixture
def in_memory():
    return importlib.import_module("image_data.in_memory")


@pytest.fixture
def images(in_memory):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return in_memory.Images(pixels, torch.arange(10, dtype=torch.uint8))


@pytest.mark.parametrize(("crop", "padding"), [(24, 0), (32, 2)])
def test_training_sees_parts_of_images_flipped_or_not(in_memory, images, crop, padding):
    torch.manual_seed(0)
    batches = list(in_memory.AugmentedBatches(images, batch=4, crop=crop, padding=padding))
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert len(batches) == 2
    assert len(set(labels)) == 8
    padded = torch.nn.functional.pad(images.pixels, [padding] * 4)
    flipped = 0
    for inputs, label in ((image, n) for batch in batches for image, n in zip(*batch, strict=True)):
        windows = in_memory.normalised(padded)[label].unfold(1, crop, 1).unfold(2, crop, 1)
        ways = (inputs[:, None, None], inputs.flip(-1)[:, None, None])
        alike = [bool((windows == way).all(dim=(0, 3, 4)).any()) for way in ways]
        assert sum(alike) == 1
        flipped += alike[1]
    assert 0 < flipped < 8


def test_nothing_is_flipped_where_that_is_not_wanted(in_memory, images):
    (inputs, labels), *_ = in_memory.AugmentedBatches(images, batch=10, crop=32, flip=False)
    assert torch.equal(inputs, in_memory.normalised(images.pixels)[labels])


def test_cutout_greys_a_square_that_may_stick_out_and_nothing_else(in_memory, images):
    with seeded(1):
        ((whole, _),) = in_memory.AugmentedBatches(images, batch=10, crop=32)
    with seeded(1):
        ((cut, _),) = in_memory.AugmentedBatches(images, batch=10, crop=32, cutout=8)
    for before, after in zip(whole, cut, strict=True):
        gone = (after == 0).all(dim=0)
        rows, columns = gone.any(dim=1).nonzero().flatten(), gone.any(dim=0).nonzero().flatten()
        assert 4 <= len(rows) <= 8
        assert 4 <= len(columns) <= 8
        assert gone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert torch.equal(after[:, ~gone], before[:, ~gone])


def test_batches_of_half_an_epoch_can_be_passed_over(in_memory, images):
    loader = in_memory.AugmentedBatches(images, batch=2, crop=24, cutout=4)
    with seeded(3):
        whole = list(batches_of(loader))
    with seeded(3):
        rest = list(batches_of(loader, skip=3))
    assert len(whole) == 5
    for (inputs, labels), (wanted, wanted_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(inputs, wanted)
        assert torch.equal(labels, wanted_labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_batches_are_the_same_on_every_device(in_memory, images):
    made = []
    for device in ("cpu", "cuda"):
        with seeded(0):
            made.append(next(iter(in_memory.AugmentedBatches(images, batch=4, cutout=4, device=device)))[0])
    torch.testing.assert_close(made[1].cpu(), made[0])


@pytest.mark.parametrize(
    ("settings", "message"), [({"batch": 11}, "batch is 11, of 10 images"), ({"crop": 33}, "crop is 33")]
)
def test_what_does_not_fit_the_images_is_refused(in_memory, images, settings, message):
    with pytest.raises(in_memory.DataError, match=message):
        in_memory.AugmentedBatches(images, **{"batch": 2} | settings)


@pytest.fixture
def fashion(monkeypatch, tmp_path):
    """The module, with a Debian package of two training images and one to test on; all they hold is 7."""
    module = importlib.import_module("image_data.fashion_mnist")
    sums = {}
    for name in module.CHECKSUMS:
        count = 2 if name.startswith("train") else 1
        lengths = [count, 28, 28] if "images" in name else [count]
        header = bytes([0, 0, 8, len(lengths)]) + b"".join(n.to_bytes(4, "big") for n in lengths)
        content = header + bytes([7]) * int(torch.tensor(lengths).prod())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        sums[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(module, "CHECKSUMS", sums)
    monkeypatch.setattr(module, "DEBIAN", tmp_path)
    return module


def test_fashion_mnist_comes_from_debians_package_and_is_kept(fashion, tmp_path, monkeypatch):
    train, test = fashion.load_fashion_mnist(tmp_path / "data")
    assert train.pixels.shape == (2, 1, 28, 28)
    assert test.labels.tolist() == [7]
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "nowhere")
    again, _ = fashion.load_fashion_mnist(tmp_path / "data")
    assert torch.equal(again.pixels, train.pixels)


def test_no_road_leads_to_fashion_mnist(fashion, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(fashion, "FashionMNIST", unreachable)
    with pytest.raises(
        CompressSearchError, match=r"no route to host.*Install Debian's dataset-fashion-mnist"
    ):
        fashion.load_fashion_mnist(tmp_path / "data")


def test_a_damaged_file_of_fashion_mnist_is_refused(fashion, tmp_path):
    fashion.load_fashion_mnist(tmp_path / "data")
    path = tmp_path / "data/fashion-mnist/t10k-images-idx3-ubyte"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CompressSearchError, match=r"t10k-images.* is not the official file.*Delete"):
        fashion.load_fashion_mnist(tmp_path / "data")
