"""Several real processes share a study, and end it with exactly the trials that were asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compress_search.search.history import finished_trials

N_TRIALS = 3
N_PROCESSES = 4

PROGRAM = """
import io, os, pathlib, sys, time
import optuna
from rich.console import Console
from compress_search.progress import Progress
from compress_search.search import worker
from compress_search.search.storage import open_storage
from compress_search.stopping import StopSwitch
from compress_search.workspace import Workspace

folder, url = pathlib.Path(sys.argv[1]), sys.argv[3]
n_trials, n_processes = int(sys.argv[2]), int(sys.argv[4])
# One imports for all: each by itself would take longer than all that is tested.
children = []
while len(children) < n_processes and 0 not in children:
    children.append(os.fork())
if 0 not in children:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(statuses))

study = optuna.load_study(study_name="study", storage=open_storage(url, Workspace(folder)))
os.write(1, b"ready\\n")
while not (folder / "go").exists():
    time.sleep(0.001)
claim = worker._claim

def claim_late(*args, **options):
    # Without a lock the others count at the same time, before this one has claimed; then all would claim.
    (folder / f"claims-{os.getpid()}").touch()
    deadline = time.monotonic() + 0.7
    while len(list(folder.glob("claims-*"))) < n_processes and time.monotonic() < deadline:
        time.sleep(0.01)
    return claim(*args, **options)

worker._claim = claim_late
# Who has nothing to claim looks again soon.
worker._WAITING_SECONDS = 0.1

def objective(trial):
    # So long that another one comes to claim meanwhile.
    time.sleep(0.3)
    return trial.suggest_float("x", 0, 1), 0.5

progress = Progress(Console(file=io.StringIO()))
worker.run_trials(study, objective, n_trials=n_trials, progress=progress, stop=StopSwitch())
"""


@pytest.mark.parametrize(
    "database",
    ["sqlite", *(pytest.param(name, marks=pytest.mark.slow) for name in ("postgresql", "mariadb"))],
    indirect=True,
)
def test_processes_that_claim_at_the_same_time_do_not_overshoot_the_total(new_study, database_url, tmp_path):
    study = new_study()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(N_TRIALS), database_url(), str(N_PROCESSES)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    for _ in range(N_PROCESSES):
        assert process.stdout.readline() == b"ready\n"
    (tmp_path / "go").touch()
    process.communicate()
    assert process.returncode == 0
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * N_TRIALS
    assert len(finished_trials(study.trials)) == N_TRIALS
    assert len({trial.user_attrs["worker"]["pid"] for trial in study.trials}) > 1
