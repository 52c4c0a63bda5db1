"""What the original says of a batch is asked once, and changes no bit of any fine-tuning."""

from __future__ import annotations

import errno
import itertools
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from compress_search.exceptions import TrainingError
from compress_search.fingerprint import model_fingerprint
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.training import teacher_outputs
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.teacher_outputs import TeacherOutputs

EPOCHS, BATCHES = 2, 4
SETTINGS = FineTune(epochs=EPOCHS, lr=0.05)


class Counting(nn.Module):
    """A teacher that counts the examples that it is asked about."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.asked = teacher, 0

    def forward(self, inputs):
        self.asked += len(inputs)
        return self.teacher(inputs)


@pytest.fixture
def train(tiny_task, tiny_net, tmp_path):
    """Train a network; return its fingerprint, and of how many batches its teacher was asked."""

    def run(
        kept=True,
        *,
        seed=0,
        settings=SETTINGS,
        largest=2**30,
        lesson="lesson",
        checkpoints=None,
        teacher=None,
        **changes,
    ):
        task = tiny_task(**changes)
        net = tiny_net(seed=seed)
        model = nn.Sequential(*net[:-1], nn.Dropout(0.3), net[-1])
        teacher = Counting(tiny_net(seed=9) if teacher is None else teacher)
        fine_tune(
            model,
            teacher,
            task,
            settings,
            seed=seed,
            data_seed=5,
            teacher_outputs=TeacherOutputs(tmp_path / "teacher", lesson, largest) if kept else None,
            progress=Progress(),
            checkpoints=checkpoints,
        )
        return model_fingerprint(model), teacher.asked // 16

    return run


def files(tmp_path):
    return sorted((tmp_path / "teacher").glob("*"))


def test_the_original_is_asked_once_for_all_that_see_the_same_data(train, tmp_path):
    alone = [train(kept=False, seed=seed) for seed in range(3)]
    assert [asked for _, asked in alone] == [EPOCHS * BATCHES] * 3
    together = [train(seed=seed) for seed in range(3)]
    assert [asked for _, asked in together] == [EPOCHS * BATCHES, 0, 0]
    assert [model for model, _ in together] == [model for model, _ in alone]
    assert len({model for model, _ in alone}) == 3
    assert len(files(tmp_path)) == EPOCHS


def test_more_epochs_ask_about_the_new_ones_alone(train):
    train()
    longer = FineTune(**vars(SETTINGS) | {"epochs": EPOCHS + 3})
    expected, _ = train(kept=False, settings=longer)
    assert train(settings=longer) == (expected, 3 * BATCHES)


@pytest.mark.parametrize(
    "other",
    [{"lesson": "other"}, {"settings": FineTune(**vars(SETTINGS) | {"precision": "bfloat16"})}],
    ids=["lesson", "precision"],
)
def test_another_lesson_or_precision_is_asked_about_anew(train, other):
    train()
    expected, asked = train(kept=False, **other)
    assert train(**other) == (expected, asked)


def test_without_distillation_nothing_is_kept(train, tmp_path):
    assert train(settings=FineTune(**vars(SETTINGS) | {"distillation": 0.0}))[1] == 0
    assert files(tmp_path) == []


class Drifting(IterableDataset):
    """Examples whose random numbers no seed reaches: one is the first of its batch, and always another."""

    drawn = itertools.count()

    def __iter__(self):
        torch.manual_seed(0)
        for number in range(BATCHES * 16):
            image = torch.randn(1, 6, 6)
            if number == 16:
                image += next(self.drawn)
            yield image, number % 3


def test_a_batch_that_is_another_is_asked_about(train, tmp_path):
    def run(kept):
        Drifting.drawn = itertools.count(start=20)
        return train(kept, train=DataLoader(Drifting(), batch_size=16))

    train(train=DataLoader(Drifting(), batch_size=16))
    written = [file.read_bytes() for file in files(tmp_path)]
    expected, _ = run(kept=False)
    assert run(kept=True) == (expected, EPOCHS)
    # What the others agree about stays.
    assert [file.read_bytes() for file in files(tmp_path)] == written


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_file_is_never_used(train, tmp_path, caplog, damage):
    expected, _ = train()
    file = files(tmp_path)[0]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"empty": b"", "cut": content[:-9], "flipped": bytes(content)}[damage])
    assert train() == (expected, BATCHES)
    assert f"The original's outputs in {file} are damaged" in caplog.text
    assert train() == (expected, 0)


def test_what_would_be_too_large_is_not_kept(train, tmp_path):
    # Three classes in float32, for each of 64 examples and two epochs.
    size = 3 * 4 * BATCHES * 16 * EPOCHS
    train(largest=size - 1)
    assert files(tmp_path) == []
    train(largest=size)
    assert len(files(tmp_path)) == EPOCHS


def test_a_full_disk_is_of_no_harm(train, tmp_path, monkeypatch, caplog):
    expected, _ = train(kept=False)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_outputs, "write_bytes_atomically", full)
    assert train() == (expected, EPOCHS * BATCHES)
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("crash_at", range(1, EPOCHS * BATCHES))
def test_a_training_that_was_killed_comes_to_the_same(train, tiny_task, crashing, tmp_path, crash_at):
    expected, _ = train(kept=False)
    loader = tiny_task().train
    folder = CheckpointFolder(tmp_path / "checkpoints", 1e-9)
    with pytest.raises(TrainingError, match="raised CrashError"):
        train(train=crashing(loader, crash_at), checkpoints=folder)
    assert train(checkpoints=folder) == (expected, EPOCHS * BATCHES - crash_at)
    # Of an epoch that two processes were at, neither knows the whole.
    assert len(files(tmp_path)) == EPOCHS - bool(crash_at % BATCHES)
    assert train() == (expected, BATCHES * bool(crash_at % BATCHES))


def test_parts_of_a_batch_share_what_was_said_of_it(train, monkeypatch):
    # To the bit: of a network, other parts might round other bits.
    pixels = nn.Sequential(nn.Flatten(), nn.AdaptiveMaxPool1d(3))
    whole, _ = train(teacher=pixels)
    forward = nn.Dropout.forward

    def too_large(self, inputs):
        if self.training and len(inputs) > 8:
            raise MemoryError
        return forward(self, inputs)

    monkeypatch.setattr(nn.Dropout, "forward", too_large)
    in_parts, _ = train(kept=False, teacher=pixels)
    assert in_parts != whole
    assert train(teacher=pixels) == (in_parts, 0)


def test_images_of_several_sizes_are_asked_about_each_time(tiny_task, tmp_path):
    batches = [
        (torch.randn(4, 1, side, side), torch.zeros(4, side, side, dtype=torch.long)) for side in (6, 8)
    ]
    task = tiny_task(train=batches, evaluate=lambda *_: 0.0)
    for _ in range(2):
        teacher = Counting(nn.Conv2d(1, 3, 1))
        kept = TeacherOutputs(tmp_path / "teacher", "lesson")
        model = nn.Sequential(nn.Conv2d(1, 3, 1))
        fine_tune(model, teacher, task, SETTINGS, seed=0, teacher_outputs=kept, progress=Progress())
        assert teacher.asked == EPOCHS * 8
    assert files(tmp_path) == []


class Slow(nn.Module):
    """A teacher that takes its time."""

    def __init__(self, teacher, seconds):
        super().__init__()
        self.teacher, self.seconds = teacher, seconds

    def forward(self, inputs):
        time.sleep(self.seconds)
        return self.teacher(inputs)


def test_it_is_told_what_that_saved(tiny_task, tiny_net, tmp_path):
    def train(kept=True, epochs=EPOCHS):
        settings = FineTune(**vars(SETTINGS) | {"epochs": epochs})
        outputs = TeacherOutputs(tmp_path / "teacher", "lesson") if kept else None
        teacher = Slow(tiny_net(seed=9), 0.02)
        progress = Progress()
        return fine_tune(
            tiny_net(), teacher, tiny_task(), settings, seed=0, teacher_outputs=outputs, progress=progress
        ).teacher_seconds_saved

    assert train(kept=False) == train() == 0.0
    saved = train()
    assert 0.02 * EPOCHS * BATCHES <= saved < 3 * 0.02 * EPOCHS * BATCHES
    # What it has to ask about itself it has not saved.
    assert train(epochs=EPOCHS + 1) == pytest.approx(saved)
