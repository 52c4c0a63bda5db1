"""Checkpoint files: whole, or found to be damaged."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
import torch

from compress_search import workspace
from compress_search.training.checkpoints import CheckpointFolder, Snapshot, copies

KINDS = {
    "model/weight": torch.randn(3, 2),
    "model/half": torch.randn(4).bfloat16(),
    "model/count": torch.tensor(7),
    "now/bytes": torch.arange(5, dtype=torch.uint8),
    "now/empty": torch.zeros(0),
}


def snapshot(step, **values):
    return Snapshot(dict(KINDS), {"step": step, "score": 0.1 + 0.2, **values})


def test_what_was_written_is_read(tmp_path):
    folder = CheckpointFolder(tmp_path / "here")
    assert folder.load() == (None, None)
    folder.save_epoch(snapshot(4))
    folder.save_step(snapshot(7, words=[1, "a", None]))
    latest, epoch = folder.load()
    assert latest.values == {"step": 7, "score": 0.1 + 0.2, "words": [1, "a", None]}
    assert epoch.step == 4
    for name, tensor in KINDS.items():
        assert latest.tensors[name].dtype == tensor.dtype
        assert torch.equal(latest.tensors[name], tensor)
    assert set(latest.part("now")) == {"bytes", "empty"}
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_later_of_the_two_is_the_latest(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save_step(snapshot(7))
    folder.save_epoch(snapshot(8))
    assert [found.step for found in folder.load()] == [8, 8]


@pytest.mark.parametrize("kept", [0, 1, 40, 64, 65, 70, 200, -1])
def test_a_truncated_file_is_set_aside_and_the_other_one_used(tmp_path, kept, caplog):
    folder = CheckpointFolder(tmp_path)
    folder.save_epoch(snapshot(4))
    folder.save_step(snapshot(7))
    file = tmp_path / "step.checkpoint"
    file.write_bytes(file.read_bytes()[:kept])
    latest, epoch = folder.load()
    assert (latest.step, epoch.step) == (4, 4)
    assert "is damaged" in caplog.text
    assert next(path.name for path in tmp_path.glob("step*")).startswith("step.checkpoint.damaged-")


def test_every_flipped_byte_is_found(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save_step(snapshot(7))
    file = tmp_path / "step.checkpoint"
    whole = file.read_bytes()
    # The line feed after the checksum carries nothing.
    for position in (p for p in range(0, len(whole), 7) if p != 64):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        assert folder.load() == (None, None), position


def test_one_is_due_so_long_after_the_last(tmp_path):
    ticks = itertools.count(0, 25)
    folder = CheckpointFolder(tmp_path, 60, clock=lambda: next(ticks))
    assert [folder.is_due, folder.is_due, folder.is_due] == [False, False, True]
    folder.save_step(snapshot(1))
    assert [folder.is_due, folder.is_due, folder.is_due] == [False, False, True]


def test_a_full_disk_leaves_the_last_checkpoint_and_the_training_alone(tmp_path, monkeypatch, caplog):
    folder = CheckpointFolder(tmp_path)
    folder.save_step(snapshot(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workspace.os, "fsync", full)
    folder.save_step(snapshot(2))
    assert "No space left on device" in caplog.text and "The training goes on" in caplog.text
    assert folder.load()[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step.checkpoint"]


def test_copies_share_nothing_and_are_contiguous():
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    (copy,) = copies({"w": weight}, prefix="model").values()
    assert copy.is_contiguous() and torch.equal(copy, weight)
    weight.zero_()
    assert copy.abs().sum() > 0
