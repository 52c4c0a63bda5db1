"""Workers under a supervisor: they share a machine, are restarted, and end the study with its exact total."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from compress_search.exceptions import StudyError
from compress_search.progress import Progress
from compress_search.search.history import ANCHOR, WORKER, current_trials, finished_trials, proposal_indices
from compress_search.search.study import load_study
from compress_search.search.supervisor import (
    _SupervisedWorker,
    memory_warning,
    supervise,
    worker_environments,
)

TASK = """
import torch
from torch import nn
from compress_search import Task

def make():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(256, 1, 8, 8), torch.arange(256) % 4
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 256, 32)]
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 64, 4),
    )
    return Task(name="killed", model=net, example_input=images[:1], train=batches[:6], validation=batches[6:])
"""

CONFIG = """
name: killed
task: killed_task.py:make
target: 0.5
tolerance: 0.05
samples: 32
fine_tune: {epochs: 2}
device: cpu
"""


def test_threads_and_gpus_are_divided():
    found = worker_environments({"HOME": "/"}, workers=3, cores=8, gpus=["4", "GPU-a"])
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["4", "GPU-a", "4"]
    for one in found:
        assert (one["OMP_NUM_THREADS"], one["MKL_NUM_THREADS"]) == ("2", "2")
        assert (one["HOME"], one["OMP_WAIT_POLICY"]) == ("/", "PASSIVE")


def test_a_worker_has_a_thread_at_least_and_not_more_than_the_user_allows():
    (one, _) = worker_environments({"OMP_NUM_THREADS": "3"}, workers=2, cores=1, gpus=[])
    assert one["OMP_NUM_THREADS"] == one["MKL_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in one
    (one,) = worker_environments({"OMP_NUM_THREADS": "3"}, workers=1, cores=8, gpus=[])
    assert (one["OMP_NUM_THREADS"], one["MKL_NUM_THREADS"]) == ("3", "8")


def test_workers_that_do_not_fit_into_memory_are_warned_of():
    gib = 2**30
    assert memory_warning(2 * gib, 4, 8 * gib) is None
    warning = memory_warning(2 * gib, 4, 7 * gib)
    assert "about 8.0 GiB" in warning and "7.0 GiB" in warning and "--workers 3" in warning


def watch(study, tmp_path, program, *, workers=1, restarts=3):
    """Supervise workers that are a line of Python; return what was said."""
    said = []
    progress = Progress(Console(file=io.StringIO()))
    progress.say = said.append
    try:
        supervise(
            study,
            n_trials=3,
            command=[sys.executable, "-c", program],
            environments=[os.environ] * workers,
            folder=tmp_path,
            restarts=restarts,
            progress=progress,
        )
    except (StudyError, KeyboardInterrupt) as error:
        said.append(repr(error))
    return said


def test_workers_that_turn_out_too_large_are_warned_of_while_they_run(
    new_study, tmp_path, monkeypatch, caplog
):
    study, start = new_study(), _SupervisedWorker.start

    def start_with_a_trial(worker):
        start(worker)
        told = {WORKER: {"pid": worker.process.pid}}
        study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=told))

    monkeypatch.setattr(_SupervisedWorker, "start", start_with_a_trial)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=-(2**24)))
    watch(study, tmp_path, "import time; time.sleep(2)", workers=2)
    assert caplog.text.count("2 workers need about") == 1
    assert "use fewer: --workers 1" in caplog.text


def test_a_worker_is_restarted_so_often_and_its_last_lines_are_told(new_study, tmp_path):
    program = "import os; print('life', os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    _, first, second, last, error = watch(new_study(), tmp_path, program, restarts=2)
    assert "Worker 1 died (SIGKILL); restart 1 of 2" in first and "restart 2 of 2" in second
    assert "not restarted again" in last
    log = tmp_path / "worker-1.log"
    lives = re.findall(r"life \d+", log.read_text())
    assert len(set(lives)) == 3
    for told, life in zip((first, second, last), lives, strict=True):
        assert str(log) in told
        assert re.findall(r"life \d+", told) == [life]
    assert "All workers ended with 0 of 3 trials finished" in error


def test_an_error_that_would_come_again_is_told_once(new_study, tmp_path):
    program = "import sys; print('error: no data', flush=True); sys.exit(2)"
    _, told, error = watch(new_study(), tmp_path, program)
    assert "ended with an error" in told and "error: no data" in told
    assert "All workers ended" in error


def test_nobody_is_restarted_once_a_worker_has_seen_the_end(new_study, tmp_path):
    program = (
        "import os, pathlib, sys, time\n"
        f"done = pathlib.Path({str(tmp_path / 'done')!r})\n"
        "try: done.touch(exist_ok=False)\n"
        "except FileExistsError: time.sleep(1); sys.exit(1)"
    )
    (started,) = watch(new_study(), tmp_path, program, workers=2)
    assert started.startswith("2 workers started")


def test_a_signal_is_passed_on_once_and_the_second_ends_at_once(new_study, tmp_path):
    program = (
        "import os, signal, time\n"
        "def arrived(*_):\n"
        "    print('asked to stop', flush=True)\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGTERM, arrived)\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while True: time.sleep(0.1)"
    )
    before = signal.getsignal(signal.SIGINT)
    said = watch(new_study(), tmp_path, program)
    assert "finish their step" in said[1] and "ended at once" in said[2]
    assert said[3] == "KeyboardInterrupt()"
    assert (tmp_path / "worker-1.log").read_text().count("asked to stop") == 2
    assert signal.getsignal(signal.SIGINT) is before


def run(folder, workspace, n_trials, *words, **environment):
    """Start ``compress-search run`` on the task."""
    (folder / "killed_task.py").write_text(TASK)
    (folder / "killed.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "compress_search", "run", "killed.yaml"]
    with (folder / f"{workspace}.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, f"workspace={workspace}", f"n_trials={n_trials}", *words],
            cwd=folder,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
        )


def outcome(workspace, n_trials):
    """Check that a study is whole, and return its anchors and how many trials were interrupted."""
    study = load_study("killed", workspace=workspace)
    trials = study.optuna_study.trials
    assert not [trial for trial in trials if not trial.state.is_finished()]
    assert len(finished_trials(trials)) == n_trials
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    # None that a retry stands in for was finished nevertheless, and no proposal twice.
    assert [trial.number for trial in current_trials(trials)] == [trial.number for trial in complete]
    indices = proposal_indices(trials)
    assert sorted(indices[trial.number] for trial in complete) == list(range(n_trials))
    anchors = {
        t.user_attrs[ANCHOR]: (t.params["c_ssvd"], t.params["c_cp"], t.values[0])
        for t in complete
        if ANCHOR in t.user_attrs
    }
    interrupted = study.status().n_interrupted
    study.storage.engine.dispose()
    return anchors, interrupted


def disturb(process, stages, moments, kills):
    """Kill one random worker after another at a random moment; return how many of them were killed.

    Each kill waits until there is a stage more: a worker takes seconds to start, so that if one were killed
    every second none would ever come to work.
    """
    killed = 0
    while killed < kills and process.poll() is None:
        before = count(stages)
        while process.poll() is None and count(stages) == before:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1))
        try:
            children = psutil.Process(process.pid).children()
            # The first child makes the study, and is no worker.
            workers = [child for child in children if "--supervised" in child.cmdline()]
            if not workers:
                continue
            moments.choice(workers).kill()
            killed += 1
        except (psutil.NoSuchProcess, IndexError):
            break
    return killed


def count(stages):
    # Leases lie there too.
    return sum(path.is_dir() and not path.name.startswith(".") for path in stages.glob("*"))


def one_round(folder, *, workers, n_trials, kills, seed):
    process = run(
        folder, f"round-{seed}", n_trials, "--workers", str(workers), "--restarts", str(kills), "seed=0"
    )
    killed = disturb(process, folder / f"round-{seed}" / "stages", random.Random(seed), kills)
    process.communicate()
    said = (folder / f"round-{seed}.txt").read_text()
    assert process.returncode == 0, said
    assert killed > 0
    assert "died (SIGKILL)" in said
    assert said.count("Chosen: trial") == 1
    return outcome(folder / f"round-{seed}", n_trials)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_workers_killed_at_random_end_as_one_that_is_left_alone(tmp_path):
    undisturbed = run(tmp_path, "undisturbed", 10)
    undisturbed.communicate()
    assert undisturbed.returncode == 0
    expected, _ = outcome(tmp_path / "undisturbed", 10)
    assert len(expected) == 4
    anchors, interrupted = one_round(tmp_path, workers=3, n_trials=10, kills=8, seed=0)
    assert anchors == expected
    assert interrupted > 0


QUICK = ("--workers", "2", "selection=uniform", "tolerance=0.2", "fine_tune.epochs=1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_end_at_what_is_enough_and_go_on_with_what_was_accepted(tmp_path):
    stopped = run(tmp_path, "runs", 9, *QUICK, "stop_when={max_drop: 1}")
    stopped.communicate()
    said = (tmp_path / "runs.txt").read_text()
    assert stopped.returncode == 0 and said.count("Chosen: trial") == 1, said
    study = load_study("killed", workspace=tmp_path / "runs")
    finished = len(finished_trials(study.optuna_study.trials))
    # When one has found it, the other one ends the trial that it is at.
    assert any(candidate.feasible for candidate in study.candidates()) and 1 <= finished <= 3
    assert not [trial for trial in study.optuna_study.trials if trial.state.name == "RUNNING"]
    logs = "".join(path.read_text() for path in (tmp_path / "runs/killed").glob("worker-*.log"))
    assert logs.count("No further trial is begun") == 2

    changed = ("stop_when=null", "fine_tune.epochs=2", "--accept-changed")
    accepted = run(tmp_path, "runs", finished + 2, *QUICK, *changed)
    accepted.communicate()
    assert accepted.returncode == 0, (tmp_path / "runs.txt").read_text()
    status = study.status()
    assert [(change.field, change.after) for change in status.changes] == [("fine_tune.epochs", 2)]
    assert status.finished == finished + 2
    study.storage.engine.dispose()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_tell_nobody_the_password_of_their_database(postgresql, tmp_path):
    secret = "open-sesame-7"
    postgresql.add_user("crew", secret)
    database = postgresql.new_database().split("/")[3].split("?")[0]
    postgresql.execute(f"ALTER DATABASE {database} OWNER TO crew")
    url = postgresql.url(database, "crew")
    process = run(tmp_path, "runs", 3, *QUICK, f"storage={url}", COMPRESS_SEARCH_DB_PASSWORD=secret)
    commands = set()
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            commands |= {" ".join(one.cmdline()) for one in family}
        time.sleep(0.05)
    said = (tmp_path / "runs.txt").read_text()
    assert process.returncode == 0 and "Chosen: trial" in said, said
    assert sum("--supervised" in command for command in commands) == 1
    assert not [command for command in commands if secret in command]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "worker-1.log", "study.log", "config.yaml"} <= {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]
