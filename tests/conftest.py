"""A small network and a task that it can learn, for tests that train or evaluate."""

from __future__ import annotations

import importlib.util
import multiprocessing
import runpy
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress_search.stopping import StopSwitch
from compress_search.task import Task

torch.set_num_threads(1)


def _beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic = _beside("synthetic_study")
pretending = _beside("pretend_device")


@pytest.fixture(scope="session")
def tiny_net():
    """Make ``(batch, 1, 6, 6) -> (batch, classes)``: two convolutions with batch normalisation."""

    def make(*, seed=0, classes=3, width=4):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 9, classes),
        )

    return make


@pytest.fixture
def tiny_task(tiny_net):
    """Make a task of three classes that differ in their mean image; ``changes`` replace its fields."""

    def make(**changes):
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(3, 1, 6, 6, generator=generator)
        labels = torch.arange(96) % 3
        images = means[labels] + torch.randn(96, 1, 6, 6, generator=generator)
        train = DataLoader(TensorDataset(images[:64], labels[:64]), batch_size=16, shuffle=True)
        validation = DataLoader(TensorDataset(images[64:], labels[64:]), batch_size=32)
        fields = {"example_input": images[:1], "train": train, "validation": validation} | changes
        return Task(**{"model": tiny_net()} | fields)

    return make


@pytest.fixture(scope="session")
def pretended_gpus():
    """Let so many GPUs be there in a block, see ``pretend_device.py``."""
    return pretending.pretended_gpus


@pytest.fixture
def gpus(pretended_gpus):
    """Two such GPUs in the whole test."""
    with pretended_gpus(2) as pretended:
        yield pretended


class CrashError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def crashing():
    """Make a loader fail at one of the batches it is asked for, counted over all epochs."""

    class Crashing:
        def __init__(self, loader, crash_at):
            self.loader, self.left = loader, crash_at
            self.sampler = loader.sampler

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for batch in self.loader:
                if self.left == 0:
                    raise CrashError
                self.left -= 1
                yield batch

    return Crashing


@pytest.fixture
def stop_at():
    """Make a switch that is found requested when it is looked at after so many times, and from then on."""

    class StopAt(StopSwitch):
        def __init__(self, looks):
            self.left = looks
            super().__init__()

        @property
        def requested(self):
            self.left -= 1
            return self.left < 0

        @requested.setter
        def requested(self, value):
            pass

    return StopAt


@pytest.fixture(scope="session")
def start_process():
    """Start programs in processes of their own, to be killed.

    They are forked from a process that has imported what they import: dozens of them would import PyTorch
    for most of their lives. A program finds what it is given, and ``ready`` to be set when it begins, among
    its variables. Returned is a ``multiprocessing.Process`` that is ready.
    """
    forking = multiprocessing.get_context("forkserver")
    # The optimisers import PyTorch's compiler when they first step.
    forking.set_forkserver_preload(["torch._dynamo", "compress_search.search.study"])

    def start(program, **given):
        ready = forking.Event()
        variables = {"ready": ready, **given}
        process = forking.Process(target=runpy.run_path, args=(str(program), variables, "__main__"))
        process.start()
        assert ready.wait(120)
        return process

    return start


@pytest.fixture(scope="session")
def synthetic_study(tiny_net):
    """Make studies that were never run, see ``synthetic_study.py``; their databases are closed at the end."""
    made = []

    def make(folder, **arguments):
        made.append(synthetic.make_synthetic_study(folder, tiny_net(), **arguments))
        return made[-1]

    yield make
    for study in made:
        study.storage.engine.dispose()


@pytest.fixture(scope="session")
def serving():
    """Serve the dashboard of a study in a thread within a block; its server has its address as ``root``."""

    @contextmanager
    def serve(study, **arguments):
        from compress_search.search.dashboard import DashboardServer

        server = DashboardServer(study.storage, study.name, workspace=study.workspace, port=0, **arguments)
        with server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            server.root = server.url.partition("/dashboard")[0]
            try:
                yield server
            finally:
                server.shutdown()
                thread.join()

    return serve


@pytest.fixture
def serve(serving):
    """Serve dashboards until the end of a test."""
    with ExitStack() as stack:
        yield lambda study, **arguments: stack.enter_context(serving(study, **arguments))
