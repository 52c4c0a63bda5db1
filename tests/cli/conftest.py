"""A project of a user: a task file and a configuration, so small that a study takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress_search import Task


def make(width=4):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    images, labels = torch.randn(48, 1, 8, 8), torch.arange(48) % 2
    loaders = [DataLoader(TensorDataset(images[i::3], labels[i::3]), batch_size=8) for i in range(3)]
    train, validation, test = loaders
    example = images[:1]
    return Task(name="tiny", model=net, example_input=example, train=train, validation=validation, test=test)
"""

CONFIG = """
name: tiny
task: tiny_task.py:make
target: 0.6
tolerance: 0.3
n_trials: 2
samples: 8
fine_tune: {epochs: 1}
"""


def write_project(folder: Path) -> Path:
    """Write the task and the configuration, and return the configuration."""
    (folder / "tiny_task.py").write_text(TASK)
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder / "tiny.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's folder, which is the current one."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMPRESS_SEARCH_WORKSPACE", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which the study was run, never to be changed; what it printed on stdout and stderr."""
    folder = tmp_path_factory.mktemp("finished")
    ran = subprocess.run(
        [sys.executable, "-m", "compress_search", "run", write_project(folder).name],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, ran.stdout, ran.stderr
