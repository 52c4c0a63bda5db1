"""Real processes, killed at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest

from compress_search.search.history import current_trials
from compress_search.search.study import load_study

N_TRIALS = 7

PROGRAM = f"""
import torch
from torch import nn
from compress_search import FineTune, Task, create_study

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randn(256, 1, 8, 8), torch.arange(256) % 4
batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 256, 32)]
net = nn.Sequential(
    nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(24 * 64, 4),
)
task = Task(model=net, example_input=images[:1], train=batches[:6], validation=batches[6:])
ready.set()
study = create_study(
    "killed", task, target=0.5, workspace=workspace, samples=32, fine_tune=FineTune(epochs=2),
    tolerance=0.05, device="cpu",
)
study.optimize({N_TRIALS})
"""


@pytest.fixture
def start(tmp_path, start_process):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return lambda workspace: start_process(program, workspace=str(tmp_path / workspace))


def outcome(workspace):
    study = load_study("killed", workspace=workspace)
    trials = study.optuna_study.trials
    assert {trial.state.name for trial in current_trials(trials)} == {"COMPLETE"}
    found = sorted(
        (c.params["c_ssvd"], c.params["c_cp"], c.accuracy, c.mac_ratio) for c in study.candidates()
    )
    study.storage.engine.dispose()
    return found, study.status().n_interrupted


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_study_killed_at_random_moments_ends_as_the_undisturbed_one(start, tmp_path, how):
    undisturbed = start("undisturbed")
    undisturbed.join()
    moments = random.Random(0)
    stages = tmp_path / "disturbed" / "stages"
    kills = 0
    while True:
        process = start("disturbed")
        # Each process may finish one stage more: a trial that dies four times at the same one is given up.
        before = count(stages)
        while process.is_alive() and count(stages) == before:
            time.sleep(0.01)
        process.join(timeout=moments.uniform(0, 1))
        if not process.is_alive():
            break
        # It may have ended meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, how)
        process.join()
        kills += 1
    assert (undisturbed.exitcode, process.exitcode) == (0, 0)
    found, interrupted = outcome(tmp_path / "disturbed")
    assert len(found) == N_TRIALS
    assert found == outcome(tmp_path / "undisturbed")[0]
    assert 0 < interrupted <= kills


def count(stages):
    if not stages.is_dir():
        return 0
    # Leases lie there too.
    return sum(path.is_dir() and not path.name.startswith(".") for path in stages.iterdir())
