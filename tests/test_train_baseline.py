"""The script that trains the baselines: resumed, never overwriting, and saying what made the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.fixture
def baseline(monkeypatch):
    """The script, with a preset of two short epochs, and few images held out."""
    monkeypatch.syspath_prepend(STUDIES)
    module = importlib.import_module("train_baseline")
    tiny = dataclasses.replace(module.PRESETS["smoke"], epochs={"vgg": 2}, images=256, crop=8)
    monkeypatch.setattr(module, "PRESETS", {"hour": tiny})
    monkeypatch.setattr(module, "VALIDATION_IMAGES", 64)
    return module


@pytest.fixture
def train(baseline):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (320, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return baseline.Images(pixels, torch.arange(320).remainder(10).to(torch.uint8))


def test_an_interrupted_training_goes_on_to_the_same_bits(baseline, train, tmp_path, monkeypatch):
    plan = baseline.Plan("vgg")
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    baseline.train_baseline(plan, train, whole)

    def stop(curve):
        raise KeyboardInterrupt

    real = baseline.fine_tune
    monkeypatch.setattr(baseline, "fine_tune", lambda *a, **k: real(*a, **k, after_epoch=stop))
    with pytest.raises(KeyboardInterrupt):
        baseline.train_baseline(plan, train, resumed)
    assert not resumed.exists()
    done = []
    monkeypatch.setattr(
        baseline,
        "fine_tune",
        lambda *a, **k: real(*a, **k, after_epoch=lambda curve: done.append(len(curve) - 1)),
    )
    baseline.train_baseline(plan, train, resumed)
    # Of the first one it is told again.
    assert done == [1, 2]
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*.checkpoint")) == []


def test_what_is_there_already_is_neither_trained_again_nor_replaced(baseline, train, tmp_path):
    plan, weights = baseline.Plan("vgg"), tmp_path / "weights.safetensors"
    assert baseline.check_free(plan, weights)
    validation = baseline.train_baseline(plan, train, weights)
    about = baseline.describe(plan, weights, train.part(64), validation=validation)
    assert about["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert 0 <= about["test_accuracy"] <= 1
    weights.with_suffix(".json").write_text(json.dumps(about))
    assert not baseline.check_free(plan, weights)
    other = dataclasses.replace(plan, seed=1)
    with pytest.raises(baseline.CompressSearchError, match=r"--seed 0 .*not replaced.*--output"):
        baseline.check_free(other, weights)


def test_held_out_images_are_the_last_ones(baseline, train):
    seen, unseen = baseline.held_out(train)
    assert (len(seen.labels), len(unseen.labels)) == (256, 64)
    assert torch.equal(unseen.pixels[0], train.pixels[256])


def test_the_shipped_weights_are_those_of_their_readme(baseline):
    readme = (baseline.SHIPPED / "README.md").read_text()
    shipped = sorted(baseline.SHIPPED.glob("*.safetensors"))
    assert baseline.weights_of("resnet20") in shipped
    for weights in shipped:
        name = weights.stem.removeprefix("cifar10-")
        assert hashlib.sha256(weights.read_bytes()).hexdigest() in readme
        model = baseline.trained(name, None)
        assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in readme
