"""Real processes on real databases: killed, paused, cut off from the database, and out of room."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from compress_search.results import pareto_optimal
from compress_search.search.candidates import candidate_of
from compress_search.search.history import REASON, current_trials, finished_trials, proposal_indices
from compress_search.search.objective import STAGES
from compress_search.search.space import enqueue_anchors
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.stage_files import fault_of
from compress_search.workspace import Workspace

N_TRIALS = 10
AT_ONCE = 3
"""So many rounds run beside each other: the workers mostly sleep."""

on_both = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
slow = [pytest.mark.slow, pytest.mark.timeout(900)]


class Nursery:
    """Starts workers; see ``forked_workers.py``."""

    def __init__(self):
        self._program = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forked_workers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._lock = threading.Lock()
        assert self._program.stdout.readline() == "ready\n"

    def start(self, **options):
        with self._lock:
            self._program.stdin.write(json.dumps(options) + "\n")
            self._program.stdin.flush()
            return int(self._program.stdout.readline())

    def close(self):
        self._program.stdin.close()
        self._program.wait()
        self._program.stdout.close()


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


class Crowd:
    """Some workers on one study.

    Attributes:
        pids: Of those that live, as far as was looked.
    """

    def __init__(self, nursery, url, folder, make_settings, **options):
        self.url, self.folder, self._nursery = url, folder, nursery
        folder.mkdir(exist_ok=True)
        self._options = {
            "url": url,
            "workspace": str(folder),
            "study": "study",
            "n_trials": N_TRIALS,
            "stage_seconds": 0.15,
            "seconds": 1.0,
            "grace_seconds": 4.0,
            "patience_seconds": 90.0,
        } | options
        with self.study(self._options["study"]) as study:
            enqueue_anchors(study, make_settings())
        self.pids = []

    @contextlib.contextmanager
    def study(self, name="study"):
        storage = open_storage(self.url, Workspace(self.folder))
        with quiet_optuna():
            yield optuna.create_study(
                study_name=name,
                storage=storage,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        storage.engine.dispose()

    def start(self, workers=1):
        self.pids += [self._nursery.start(**self._options) for _ in range(workers)]

    def dead(self):
        """Forget those that ended, and return how many of them did not end by themselves."""
        gone = [pid for pid in self.pids if not is_alive(pid)]
        self.pids = [pid for pid in self.pids if pid not in gone]
        killed = 0
        for pid in gone:
            file = self.folder / "ended" / str(pid)
            if not file.exists():
                killed += 1
            else:
                assert file.read_text() == "the study is finished"
        return killed

    def wait(self, seconds=60):
        """Wait until all have ended by themselves."""
        deadline = time.monotonic() + seconds
        while self.pids:
            assert self.dead() == 0
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def wait_for(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def stages(self):
        """How many stages are stored."""
        return sum("." not in path.name for path in (self.folder / "stages").glob("*"))

    def log(self):
        return (self.folder / "worker.log").read_text()

    def outcome(self, name="study", n_trials=N_TRIALS):
        """Check that the study is whole, and return its proposals with their values, and its front."""
        with self.study(name) as study:
            trials = study.get_trials(deepcopy=False)
        states = Counter(trial.state.name for trial in trials)
        reasons = [trial.user_attrs.get(REASON) for trial in trials if trial.state.name == "FAIL"]
        assert states["RUNNING"] == 0
        assert states["COMPLETE"] == n_trials == len(finished_trials(trials)), (states, reasons)
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        indices = proposal_indices(trials)
        assert sorted(indices[trial.number] for trial in complete) == list(range(n_trials))
        ended = [t for t in current_trials(trials) if t.state.is_finished()]
        assert [trial.number for trial in ended] == [trial.number for trial in complete]
        keys = {stage["key"] for trial in complete for stage in trial.user_attrs[STAGES]}
        folder = self.folder / "stages"
        assert {path.name for path in folder.iterdir() if "." not in path.name} >= keys
        assert not [path.name for path in folder.iterdir() if fault_of(path) and path.name in keys]
        assert not list(folder.glob("*.damaged-*"))
        found = {indices[t.number]: (tuple(sorted(t.params.items())), tuple(t.values)) for t in complete}
        candidates = [candidate_of(trial, Workspace(self.folder), None) for trial in complete]
        return found, {
            (c.accuracy, c.mac_ratio) for c in pareto_optimal([c for c in candidates if c.feasible])
        }


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def crowd(nursery, database_url, tmp_path, make_settings):
    """Make a crowd on a database of its own."""
    crowds = []

    def make(name="study", **options):
        crowds.append(
            Crowd(nursery, database_url(name), tmp_path / f"files-{name}", make_settings, **options)
        )
        return crowds[-1]

    yield make
    for one in crowds:
        for pid in one.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def one_round(crowd, seed):
    """Kill one of three workers at a random moment of each second, until the study is finished.

    Where a machine is so busy that a second is too short for three stages, the next one is killed after them.

    Returns:
        How many were killed, and what was found.
    """
    moments, kills, second, stages = random.Random(seed), 0, time.monotonic(), 0
    crowd.start(3)
    moment = second + moments.random()
    while crowd.pids:
        for _ in range(crowd.dead()):
            kills += 1
            crowd.start()
        if time.monotonic() > moment and len(crowd.pids) == 3 and crowd.stages() >= stages:
            with contextlib.suppress(ProcessLookupError):
                os.kill(moments.choice(crowd.pids), signal.SIGKILL)
            # Not several at once where this process was late.
            second, stages = max(second + 1, time.monotonic()), crowd.stages() + 3
            moment = second + moments.random()
        assert time.monotonic() - second < 60, crowd.log()
        time.sleep(0.01)
    return kills, crowd.outcome()


@pytest.mark.parametrize(
    ("database", "rounds"),
    [
        ("sqlite", 2),
        ("postgresql", 2),
        pytest.param("sqlite", 50, marks=slow),
        pytest.param("postgresql", 50, marks=slow),
    ],
    indirect=["database"],
)
def test_three_workers_of_which_one_is_killed_each_second_end_as_one_that_is_left_alone(
    crowd, database, rounds
):
    undisturbed = crowd("undisturbed", stage_seconds=0.0)
    undisturbed.start()
    crowds = [crowd(f"round{seed}") for seed in range(rounds)]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        ends = list(pool.map(one_round, crowds, range(rounds)))
    undisturbed.wait()
    expected = undisturbed.outcome()
    assert [found for _, found in ends] == [expected] * rounds
    kills = [killed for killed, _ in ends]
    assert min(kills) > 0
    print(f"{rounds} rounds on {database}: {sum(kills)} workers killed, {min(kills)} to {max(kills)} a round")


def only_complete(crowd):
    """Whether nothing had to be run again."""
    with crowd.study() as study:
        return {trial.state.name for trial in study.trials} == {"COMPLETE"}


@pytest.mark.parametrize(
    ("database", "seconds"),
    [
        ("postgresql", 0),
        pytest.param("postgresql", 4, marks=slow),
        pytest.param("mariadb", 4, marks=slow),
        pytest.param("postgresql", 60, marks=slow),
    ],
    indirect=["database"],
)
def test_trials_go_on_while_the_server_is_away_and_report_afterwards(crowd, request, database, seconds):
    server = request.getfixturevalue(database)
    some = crowd(n_trials=4, stage_seconds=0.5, grace_seconds=3.0)
    some.start(2)
    some.wait_for(lambda: some.stages() >= 1)
    server.stop()
    try:
        before = some.stages()
        time.sleep(max(1, seconds))
        # Each had a stage to finish.
        assert some.stages() >= before + 2
        assert some.dead() == 0 and len(some.pids) == 2
    finally:
        server.start()
    some.wait()
    some.outcome(n_trials=4)
    # Longer than the grace, but nobody was taken for dead: nobody could have written a heartbeat.
    assert only_complete(some)
    assert "The trial goes on" in some.log() or "is tried again" in some.log()


@pytest.mark.slow
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_worker_that_was_paused_past_the_grace_drops_its_trial_and_lives_on(crowd):
    some = crowd(n_trials=6, stage_seconds=0.4, seconds=0.3, grace_seconds=1.5)
    some.start(2)
    some.wait_for(lambda: some.stages() >= 1)
    paused = some.pids[0]
    with some.study() as study:
        while True:
            running = [t for t in study.trials if t.state.name == "RUNNING"]
            own = [t for t in running if t.user_attrs["worker"]["pid"] == paused and STAGES in t.user_attrs]
            if own:
                break
        os.kill(paused, signal.SIGSTOP)
        some.wait_for(lambda: study.trials[own[0].number].state.name == "FAIL")
        os.kill(paused, signal.SIGCONT)
    some.wait()
    some.outcome(n_trials=6)
    assert f"Trial {own[0].number} was interrupted: its process on" in some.log()
    assert f"Trial {own[0].number} was taken over by another process" in some.log()


@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=slow)])
def test_a_database_file_that_another_process_locks_is_waited_for(crowd, tmp_path, seconds):
    some = crowd(n_trials=4, stage_seconds=0.2, grace_seconds=2.0)
    some.start(2)
    some.wait_for(lambda: some.stages() >= 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as other:
        other.execute("PRAGMA busy_timeout=10000")
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        other.execute("ROLLBACK")
    some.wait()
    some.outcome(n_trials=4)
    assert only_complete(some)


@on_both
def test_two_studies_of_one_database_do_not_disturb_each_other(
    nursery, database_url, tmp_path, make_settings
):
    options = {"n_trials": 5, "stage_seconds": 0.02}
    crowds = [
        Crowd(nursery, database_url(), tmp_path / "files", make_settings, study=name, **options)
        for name in ("study", "other")
    ]
    for one in crowds:
        one.start(2)
    for one in crowds:
        one.wait()
    assert crowds[0].outcome("study", 5) == crowds[1].outcome("other", 5)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_waited_for_by_the_database_and_the_stages(nursery, small_disk, make_settings):
    url = f"sqlite:///{small_disk / 'study.db'}"
    some = Crowd(nursery, url, small_disk / "files", make_settings, n_trials=4, stage_seconds=0.1)
    some.start(2)
    some.wait_for(lambda: some.stages() >= 1)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    time.sleep(2)
    assert some.dead() == 0 and len(some.pids) == 2
    ballast.unlink()
    some.wait()
    some.outcome(n_trials=4)
    assert only_complete(some)
