"""Starts workers on studies by forking, so that each is there in milliseconds: PyTorch is imported once.

Run as a program. Every line of its standard input is the JSON of one worker's options; it answers with the
worker's process id. A worker that ends writes how into ``ended/<pid>`` of its folder; one that is killed
writes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import optuna
from rich.console import Console
from torch import nn

from compress_search.fingerprint import content_hash
from compress_search.leases import Leases
from compress_search.plan import CompressionPlan
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, stage_to_dict
from compress_search.results import Reference, StageResult
from compress_search.search import recovery
from compress_search.search.heartbeats import Heartbeat
from compress_search.search.objective import run_trial
from compress_search.search.sampler import SAMPLERS, ReproducibleSampler
from compress_search.search.settings import SearchSettings
from compress_search.search.storage import open_storage
from compress_search.search.worker import run_trials
from compress_search.stage_store import StageStore
from compress_search.stopping import StopSwitch
from compress_search.workspace import Workspace

# What is imported when a server is connected to first: each worker would do so by itself.
for _name in (
    "psycopg",
    "pymysql",
    "sqlalchemy.dialects.mysql.pymysql",
    "sqlalchemy.dialects.postgresql.psycopg",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

# Who kills at random hits one trial four times at one stage now and then (once in some hundred rounds).
# It would be given up, as it should be: ``test_worker.py`` sees to that.
recovery.MOST_RETRIES = 1_000

REFERENCE = Reference(accuracy=0.9, macs=1_000_000, params=1000)
SETTINGS = SearchSettings(target=0.5, fine_tune=FineTune(epochs=1))


class WaitingRunner:
    """Stages with numbers of closed form that take a while, and are stored and leased as real ones are."""

    def __init__(self, workspace, stage_seconds):
        self._store = StageStore(workspace)
        self._leases = Leases(workspace.stages, lambda text: None, poll_seconds=0.1)
        self._seconds = stage_seconds

    def achieved_ratio(self, stages):
        ratio = 1.0
        for stage in stages:
            if isinstance(stage, Compress):
                ratio *= 0.999 * stage.mac_ratio
        return ratio

    def run(self, recipe, *, after_stage=None, after_epoch=None):
        results, key, accuracy = [], "original", REFERENCE.accuracy
        for position, stage in enumerate(recipe.stages):
            key = content_hash([key, stage_to_dict(stage)])
            lost = (1 - stage.mac_ratio) ** 2 if isinstance(stage, Compress) else 0.75 * (accuracy - 0.9)
            accuracy -= lost
            ratio = self.achieved_ratio(recipe.stages[: position + 1])
            result = StageResult(key, stage.name, accuracy, int(1e6 * ratio), 1, ratio, self._seconds)
            with self._leases.computing(key, stage.name, lambda key=key: self._store.find(key)) as stored:
                if stored is None:
                    time.sleep(self._seconds)
                    if after_epoch is not None:
                        after_epoch([accuracy + lost, accuracy])
                    self._store.save(result, CompressionPlan(), nn.Linear(2, 2), say=print)
            results.append(stored or result)
            if after_stage is not None:
                after_stage(stage, results[-1])
        return tuple(results)


def work(*, url, workspace, study, n_trials, stage_seconds, seconds, grace_seconds, patience_seconds):
    """Run trials of a study as a worker does."""
    logger = logging.getLogger("compress_search")
    logger.setLevel(logging.INFO)
    handler = logging.FileHandler(Path(workspace) / "worker.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger.addHandler(handler)
    place = Workspace(Path(workspace)).prepare()
    storage = open_storage(
        url,
        place,
        heartbeat=Heartbeat(seconds, grace_seconds),
        patience_seconds=patience_seconds,
        opening_seconds=patience_seconds,
    )
    runner = WaitingRunner(place, stage_seconds)
    run_trials(
        optuna.load_study(
            study_name=study,
            storage=storage,
            sampler=ReproducibleSampler(SAMPLERS[SETTINGS.sampler], SETTINGS.seed),
        ),
        lambda trial: run_trial(trial, settings=SETTINGS, runner=runner, reference=REFERENCE),
        n_trials=n_trials,
        progress=Progress(Console(file=io.StringIO())),
        stop=StopSwitch(),
    )


def main():
    # Who ends is no zombie.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        # The first database that a process opens takes most of a second.
        open_storage(None, Workspace(Path(folder))).engine.dispose()
    print("ready", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        ended = "the study is finished"
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            work(**options)
        except BaseException:
            ended = traceback.format_exc()
        with contextlib.suppress(OSError):
            folder = Path(options["workspace"]) / "ended"
            folder.mkdir(exist_ok=True)
            (folder / str(os.getpid())).write_text(ended)
        os._exit(0)


if __name__ == "__main__":
    main()
