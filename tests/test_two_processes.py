"""Two real processes want the same stage: one computes it, and the other has it or takes over."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import dataclasses, json, logging, pathlib, sys, time
import torch
from torch import nn
from compress_search import Compress, Task
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.stages import StageRunner
from compress_search.workspace import Workspace

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randn(16, 1, 6, 6), torch.arange(16) % 2
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
folder = pathlib.Path(sys.argv[1])

def evaluate(model, loader):
    if len(list(model.modules())) > len(list(net.modules())):
        print("computing", flush=True)
        while not (folder / "go").exists():
            time.sleep(0.01)
    return 0.5

task = Task(model=net, example_input=images[:1], train=[(images, labels)], validation=[(images, labels)],
            evaluate=evaluate)
workspace = Workspace(folder / "runs").prepare()
runner = StageRunner(task, workspace, seed=0, device=torch.device("cpu"), progress=Progress())
runner._leases = dataclasses.replace(runner._leases, grace_seconds=float(sys.argv[2]), renew_seconds=0.1)
stage = Compress(method="spatial_svd", mac_ratio=0.8, samples=0, selection="uniform")
print("results", json.dumps([dataclasses.asdict(r) for r in runner.run(Recipe((stage,)))]), flush=True)
"""


class Running:
    """A process of the program, and what it has said."""

    def __init__(self, folder, grace):
        (folder / "program.py").write_text(PROGRAM)
        command = [sys.executable, "-u", str(folder / "program.py"), str(folder), str(grace)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.said = []

    def hear(self, *texts):
        """Read until a line has one of these texts, and return the text."""
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            for text in texts:
                if text in line:
                    return text
        raise AssertionError(f"none of {texts} in {self.said}")

    def result(self):
        self.hear("results ")
        (result,) = json.loads(self.said[-1].removeprefix("results "))
        assert self.process.wait() == 0
        return result


@pytest.fixture
def start(tmp_path):
    """Start two processes, and return the one that computes and the one that waits for it."""
    started = []

    def both(*, grace):
        started.extend(Running(tmp_path, grace) for _ in range(2))
        # They may have waited for each other before, with the evaluation of the original.
        first = [one.hear("computing", "computes: spatial_svd, by process ") for one in started]
        assert sorted(first) == ["computes: spatial_svd, by process ", "computing"]
        holder, waiting = started if first[0] == "computing" else started[::-1]
        assert f"computes: spatial_svd, by process {holder.process.pid} on " in waiting.said[-1]
        return holder, waiting

    yield both
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()


def left(folder):
    """What lies in the store, the original's stage aside."""
    return sorted(path.name for path in (folder / "runs" / "stages").iterdir())


@pytest.mark.slow
def test_it_is_computed_once_and_both_have_it(start, tmp_path):
    holder, waiting = start(grace=60)
    (tmp_path / "go").touch()
    computed, found = holder.result(), waiting.result()
    assert (computed["reused"], found["reused"]) == (False, True)
    assert computed | {"reused": True} == found
    assert "computing" not in waiting.said
    assert computed["key"] in left(tmp_path) and len(left(tmp_path)) == 2


@pytest.mark.slow
def test_when_the_holder_is_killed_the_other_takes_over_within_seconds(start, tmp_path):
    holder, waiting = start(grace=1e6)
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    killed = time.monotonic()
    waiting.hear(f"is taken over: process {holder.process.pid} on ")
    assert time.monotonic() - killed < 5
    assert waiting.said[-1].endswith(" has ended.")
    waiting.hear("computing")
    (tmp_path / "go").touch()
    result = waiting.result()
    assert not result["reused"]
    assert result["key"] in left(tmp_path) and len(left(tmp_path)) == 2


@pytest.mark.slow
def test_when_the_holder_was_only_paused_one_result_stays(start, tmp_path):
    holder, waiting = start(grace=0.5)
    holder.process.send_signal(signal.SIGSTOP)
    waiting.hear("computing")
    (tmp_path / "go").touch()
    second = waiting.result()
    folder = tmp_path / "runs" / "stages" / second["key"]
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
    holder.process.send_signal(signal.SIGCONT)
    first = holder.result()
    assert (first["reused"], second["reused"]) == (False, False)
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()} == before
    assert folder.name in left(tmp_path) and len(left(tmp_path)) == 2
