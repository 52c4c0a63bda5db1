"""Memory layout: images lie as a model runs quickest on them, where nothing else comes out of that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search.compression import compress, measure_sensitivity
from compress_search.divergence import divergence_of
from compress_search.memory_layout import can_train_channels_last, in_quickest_layout
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune
from compress_search.training.fine_tuning import fine_tune

LAST = torch.channels_last


class Views(nn.Module):
    """Views images as vectors, which images with their channels last do not allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, images):
        return self.head(self.conv(images).view(len(images), -1))


class LooksAtMemory(nn.Conv2d):
    """Takes values as they lie in memory, so that another layout gives other outputs."""

    def forward(self, images):
        return super().forward(images).as_strided((len(images), 4), (144, 1))


def pictures():
    return list(torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(4))


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 5),
    ).eval()


def test_images_are_laid_out_with_their_channels_last():
    model, batches = small().train(), pictures()
    laid_out = in_quickest_layout(model, batches)
    for batch, before in zip(laid_out, batches, strict=True):
        assert batch.is_contiguous(memory_format=LAST) and torch.equal(batch, before)
    assert all(batch.is_contiguous() for batch in batches)
    assert model.training
    # What is laid out already is recognised by what remembers batches.
    assert all(a is b for a, b in zip(in_quickest_layout(model, laid_out), laid_out, strict=True))


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Views(), pictures()),
        (LooksAtMemory(3, 4, 3), pictures()),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), pictures()),
        (nn.Linear(6, 5), [torch.randn(4, 6)]),
        (nn.Conv2d(3, 4, 3).to("meta"), pictures()),
        (small(), []),
    ],
    ids=["views", "looks_at_memory", "no_convolution", "no_images", "other_device", "no_data"],
)
def test_batches_stay_as_they_are_where_that_would_not_help_or_not_be_right(model, batches):
    unchanged = in_quickest_layout(model, batches)
    assert len(unchanged) == len(batches)
    assert all(a is b for a, b in zip(unchanged, batches, strict=True))


@pytest.mark.parametrize("method", ["spatial_svd", "channel_pruning"])
def test_the_outcome_is_that_of_the_usual_layout(method, monkeypatch):
    model, batches = small(), pictures()
    stage = Compress(method=method, mac_ratio=0.6, samples=10, scoring_samples=10)
    seen = []
    model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=LAST))
    )
    table = measure_sensitivity(model, batches[0][:1], batches, stage)
    one = compress(model, batches[0][:1], batches, stage)
    assert any(seen)
    monkeypatch.setattr("compress_search.compression.in_quickest_layout", lambda model, batches: batches)
    usual = measure_sensitivity(model, batches[0][:1], batches, stage)
    other = compress(model, batches[0][:1], batches, stage)
    for cell, same in zip(table.cells, usual.cells, strict=True):
        assert (cell.unit, cell.size) == (same.unit, same.size)
        assert cell.loss == pytest.approx(same.loss, rel=1e-3, abs=1e-9)
    assert one.step == other.step
    with torch.no_grad():
        assert divergence_of(one.model(batches[0]), other.model(batches[0])).mean < 1e-6


@pytest.mark.parametrize(
    ("convolution", "can"),
    [
        (nn.Conv2d(5, 4, 1, stride=2), False),
        (nn.Conv2d(7, 4, 1, stride=(1, 2)), False),
        (nn.Conv2d(16, 4, 1, stride=2, groups=4), False),
        (nn.Conv2d(8, 4, 1, stride=2), True),
        (nn.Conv2d(5, 4, 1), True),
        (nn.Conv2d(5, 4, (3, 1), stride=2), True),
    ],
)
def test_what_onednn_writes_past_its_memory_for_is_trained_with_channels_first(convolution, can):
    example = torch.randn(1, convolution.in_channels, 6, 6)
    assert can_train_channels_last(nn.Sequential(convolution, nn.ReLU()), example) == can
    # Nothing is wrong with its outputs.
    assert in_quickest_layout(convolution, [example])[0].is_contiguous(memory_format=LAST)


def test_a_narrow_shortcut_that_strides_can_be_trained(tiny_task):
    """Where the kernel at fault is used, this ends the process."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.Conv2d(5, 12, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    trained = fine_tune(
        model, None, tiny_task(), FineTune(epochs=20, distillation=0.0), seed=0, progress=Progress()
    )
    assert len(trained.learning_curve) == 21
    assert all(parameter.isfinite().all() for parameter in model.parameters())
