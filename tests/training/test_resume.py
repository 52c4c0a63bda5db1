"""A training that is stopped or killed at any step ends with the bits of one that was not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from compress_search.exceptions import TrainingError
from compress_search.fingerprint import model_fingerprint
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune

EPOCHS, BATCHES = 3, 4

SETTINGS = {
    "default": {},
    "adamw": {"optimiser": "adamw", "lr": 1e-3, "schedule": "one_cycle"},
    "averaged": {"ema": 0.9, "schedule": "multi_step"},
    "frozen": {"freeze_batch_norm": True, "momentum": 0.0, "channels_last": False},
    "half": {"precision": "bfloat16", "label_smoothing": 0.1, "gradient_clip": None},
    "alone": {"distillation": 0.0},
}


def settings_of(name):
    return FineTune(**{"epochs": EPOCHS, "lr": 0.05} | SETTINGS[name])


@pytest.fixture
def make(tiny_task, tiny_net, crashing):
    """The parts of a training, made anew each time: a network that draws random numbers, and its teacher."""

    def parts(crash_at=-1, **changes):
        net = tiny_net()
        model = nn.Sequential(*net[:-1], nn.Dropout(0.3), net[-1])
        task = tiny_task(**changes)
        data = task.train.dataset
        sampler = RandomSampler(data, generator=torch.Generator())
        loader = DataLoader(data, batch_size=16, sampler=sampler)
        return model, tiny_net(seed=1), tiny_task(train=crashing(loader, crash_at), **changes)

    return parts


def train(parts, settings, folder=None, stop=None, *, seconds=1e-9):
    model, teacher, task = parts
    trained = fine_tune(
        model,
        teacher,
        task,
        settings,
        seed=7,
        progress=Progress(),
        checkpoints=None if folder is None else CheckpointFolder(folder, seconds),
        stop=stop,
    )
    return trained, model_fingerprint(model)


@pytest.mark.parametrize("name", SETTINGS)
def test_crashed_at_any_batch_and_resumed(make, tmp_path, name):
    settings = settings_of(name)
    undisturbed = train(make(), settings)
    for crash_at in range(EPOCHS * BATCHES):
        folder = tmp_path / str(crash_at)
        with pytest.raises(TrainingError, match=r"The training data raised CrashError at batch \d of epoch"):
            train(make(crash_at), settings, folder)
        assert train(make(), settings, folder) == undisturbed, crash_at


def test_every_epoch_is_told_of_and_the_last_one_again_after_a_crash(make, tmp_path):
    def told(*crash_at, folder=None):
        model, teacher, task = make(*crash_at)
        curves = []
        checkpoints = None if folder is None else CheckpointFolder(folder, 1e-9)
        with contextlib.suppress(TrainingError):
            fine_tune(
                model,
                teacher,
                task,
                settings_of("default"),
                seed=7,
                progress=Progress(),
                checkpoints=checkpoints,
                after_epoch=lambda curve: curves.append(tuple(curve)),
            )
        return curves

    undisturbed = told()
    assert [len(curve) for curve in undisturbed] == [2, 3, 4]
    assert all(curve == undisturbed[-1][: len(curve)] for curve in undisturbed)
    for crash_at in range(EPOCHS * BATCHES):
        folder = tmp_path / str(crash_at)
        before = told(crash_at, folder=folder)
        assert before == undisturbed[: crash_at // BATCHES]
        assert told(folder=folder) == undisturbed[max(0, len(before) - 1) :]


@pytest.mark.parametrize("name", ["default", "averaged"])
def test_crashed_again_and_again(make, tmp_path, name):
    settings = settings_of(name)
    undisturbed = train(make(), settings)
    crashes = 0
    while True:
        try:
            # Each process draws the batches before its checkpoint again, and does one more.
            found = train(make(crash_at=1 + crashes % BATCHES), settings, tmp_path)
            break
        except TrainingError:
            crashes += 1
            assert crashes < EPOCHS * BATCHES
    assert crashes == EPOCHS * BATCHES - 1
    assert found == undisturbed


@pytest.mark.parametrize("seconds", [1e-9, 3600.0])
def test_stopped_after_any_step_and_resumed(make, stop_at, tmp_path, seconds):
    settings = settings_of("default")
    undisturbed = train(make(), settings)
    # It looks after every batch, and after the end of every epoch.
    for looks in range(EPOCHS * (BATCHES + 1)):
        folder = tmp_path / str(looks)
        with pytest.raises(KeyboardInterrupt):
            train(make(), settings, folder, stop_at(looks), seconds=seconds)
        latest, _ = CheckpointFolder(folder).load()
        assert latest.step == looks + 1 - (looks + 1) // (BATCHES + 1)
        assert train(make(), settings, folder) == undisturbed, looks


def test_stopped_while_it_is_evaluated(make, tmp_path):
    settings = settings_of("default")
    undisturbed = train(make(), settings)
    scores = iter([0.5, 0.6])

    def evaluate(model, loader):
        score = next(scores, None)
        if score is None:
            raise KeyboardInterrupt
        return score

    with pytest.raises(KeyboardInterrupt):
        train(make(evaluate=evaluate), settings, tmp_path, seconds=3600)
    latest, end_of_epoch = CheckpointFolder(tmp_path).load()
    assert (latest.step, end_of_epoch.step) == (2 * BATCHES, BATCHES)
    # What the other evaluation said of the first epoch counts on; the weights at its end are the same.
    _, _, task = make()
    latest_only = train(make(), settings, tmp_path)
    assert latest_only[0].accuracy == max(0.6, undisturbed[0].accuracy)
    # Nor is it made again.
    assert latest_only[0].learning_curve == (0.5, 0.6, *undisturbed[0].learning_curve[2:])
    assert task.training is None


@pytest.mark.parametrize("damaged", [("step",), ("epoch",), ("step", "epoch")])
def test_truncated_checkpoints_cost_time_and_nothing_else(make, tmp_path, damaged, caplog):
    settings = settings_of("default")
    undisturbed = train(make(), settings)
    with pytest.raises(TrainingError):
        train(make(crash_at=BATCHES + 2), settings, tmp_path)
    for name in damaged:
        file = tmp_path / f"{name}.checkpoint"
        file.write_bytes(file.read_bytes()[: -10 if name == "step" else 100])
    assert train(make(), settings, tmp_path) == undisturbed
    assert caplog.text.count("is damaged") == len(damaged)


def test_where_it_goes_on_is_told(make, tmp_path, caplog):
    caplog.set_level("INFO", logger="compress_search")
    with pytest.raises(TrainingError):
        train(make(crash_at=BATCHES + 2), settings_of("default"), tmp_path)
    train(make(), settings_of("default"), tmp_path)
    assert "goes on from its checkpoint: epoch 2 of 3, batch 3 of 4" in caplog.text


def test_without_a_folder_nothing_is_written_and_stopping_still_works(make, stop_at):
    with pytest.raises(KeyboardInterrupt):
        train(make(), settings_of("default"), None, stop_at(3))


PROGRAM = """
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from safetensors.torch import save_file
from compress_search import FineTune, Task
from compress_search.progress import Progress
from compress_search.stopping import StopSwitch
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randn(256, 1, 8, 8), torch.arange(256) % 4
data = TensorDataset(images[:192], labels[:192])
def net():
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2),
                         nn.Flatten(), nn.Linear(12 * 64, 4))
model, teacher = net(), net()
task = Task(model=model, example_input=images[:1], train=DataLoader(data, batch_size=8, shuffle=True),
            validation=[(images[192:], labels[192:])])
stop, folder = StopSwitch(), Path(folder)
ready.set()
with stop.on_signals():
    fine_tune(model, teacher, task, FineTune(epochs=12, ema=0.9), seed=3, progress=Progress(), stop=stop,
              checkpoints=CheckpointFolder(folder / "checkpoints", 0.01))
save_file(model.state_dict(), folder / "done.safetensors")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("how", "times"),
    [
        ((signal.SIGKILL,), 20),
        ((signal.SIGINT,), 4),
        ((signal.SIGTERM,), 4),
        ((signal.SIGINT, signal.SIGINT), 4),
    ],
)
def test_real_processes_killed_at_random_moments(tmp_path, start_process, how, times):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def start(folder):
        folder.mkdir(exist_ok=True)
        return start_process(program, folder=str(folder))

    undisturbed = start(tmp_path / "undisturbed")
    began = time.monotonic()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    whole = time.monotonic() - began
    wanted = load_file(tmp_path / "undisturbed" / "done.safetensors")
    moments, kills = random.Random(times), 0
    for number in range(times):
        # Each of these trainings is killed once at least, at any instant from its beginning to its end.
        folder, killed = tmp_path / str(number), False
        while not killed:
            process = start(folder)
            process.join(timeout=moments.uniform(0, whole))
            if process.is_alive():
                for one in how:
                    # It may have ended meanwhile.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, one)
                    time.sleep(0.003)
                process.join()
                killed = process.exitcode != 0
                kills += killed
            else:
                for file in folder.rglob("*"):
                    file.unlink() if file.is_file() else None
        process = start(folder)
        process.join()
        assert process.exitcode == 0
        found = load_file(folder / "done.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert kills == times
