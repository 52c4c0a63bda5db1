"""The option ``--workers`` of `run` and `resume`: several processes on one study, and then its answer."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_search.exceptions import StudyError

if TYPE_CHECKING:
    import optuna

    from compress_search.config import StudyConfig

_RESTARTS = 3


def add_workers_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="run trials in N processes, one per GPU if there are any, which share the CPU threads",
    )
    parser.add_argument(
        "--restarts",
        type=_not_negative,
        default=_RESTARTS,
        metavar="K",
        help=f"restart each of them K times at most if it dies; default: {_RESTARTS}",
    )
    # What the supervisor starts first: it makes the study, and says there how to go on.
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)


def prepare(config: StudyConfig, file: Path, *, accept_changed: bool) -> int:
    """Make or check the study of a configuration, save that, and write what a supervisor has to know."""
    from compress_search.cli.log import logging_to_terminal
    from compress_search.cli.session import open_study
    from compress_search.search.claims import claiming
    from compress_search.search.space import enqueue_anchors

    with logging_to_terminal():
        study = open_study(config, accept_changed=accept_changed)
    with claiming(study.optuna_study):
        enqueue_anchors(study.optuna_study, study.settings)
    import torch

    # A certain GPU that the configuration names is everybody's.
    chooses = config.device in (None, "cuda")
    told = {
        "name": config.name,
        "folder": str(study.folder),
        "storage": config.storage,
        "n_trials": config.n_trials,
        "gpus": torch.cuda.device_count() if chooses else 0,
    }
    file.write_text(json.dumps(told), encoding="utf-8")
    return 0


def run_workers(words: Sequence[str], *, workers: int, restarts: int, accept_changed: bool) -> int:
    """Make the study in a process of its own, run workers on it, and answer.

    Args:
        words: The command line that makes or finds the study, without ``--workers``.
        workers: Number of processes.
        restarts: How often each one is restarted.
        accept_changed: Whether they go on with a study although something has changed.

    Returns:
        The exit status.
    """
    program = [sys.executable, "-m", "compress_search"]
    accepting = ["--accept-changed"] if accept_changed else []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "study.json"
        made = subprocess.run([*program, *words, *accepting, "--prepare", str(file)], check=False)
        if made.returncode < 0:
            raise StudyError(
                f"The process that makes the study was killed (signal {-made.returncode}), before any worker "
                "was started. Run the same command again."
            )
        if made.returncode:
            # It has said why.
            return made.returncode
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    from compress_search.cli.log import logging_to_file, logging_to_terminal
    from compress_search.progress import Progress
    from compress_search.search.database_url import hand_on_password
    from compress_search.search.supervisor import supervise, worker_environments

    # The workers read config.yaml, which has none.
    hand_on_password(told["storage"])
    folder = Path(told["folder"])
    study = _look_at(told["name"], told["storage"], folder.parent)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environments = worker_environments(
        os.environ, workers=workers, cores=cores, gpus=visible_gpus(os.environ, told["gpus"])
    )
    command = [*program, "worker", str(folder), "--supervised", *accepting]
    try:
        with logging_to_terminal() as console, logging_to_file(folder / "study.log"):
            supervise(
                study,
                n_trials=told["n_trials"],
                command=command,
                environments=environments,
                folder=folder,
                restarts=restarts,
                progress=Progress(console),
            )
    except KeyboardInterrupt:
        from compress_search.cli.answer import shorten

        print(
            f"\nInterrupted. What is finished is kept. Go on with: compress-search resume {shorten(folder)} "
            f"--workers {workers}",
            file=sys.stderr,
        )
        return 130
    from compress_search.cli.session import work_and_answer
    from compress_search.config import StudyConfig

    config = StudyConfig.load(folder / "config.yaml")
    return work_and_answer(config, lambda study, progress: None, accept_changed=accept_changed)


def visible_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """Name the GPUs that this process may use as ``CUDA_VISIBLE_DEVICES`` does.

    Args:
        environment: Of this process.
        count: How many PyTorch sees.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if named is None else named.split(",")
    return [name.strip() for name in names[:count]]


def _look_at(name: str, storage: str | None, workspace: Path) -> optuna.Study:
    """Open the study in its database alone; what it is made of is not needed, and PyTorch neither."""
    import optuna

    from compress_search.search.storage import open_storage
    from compress_search.workspace import Workspace

    # Who looks after the workers does not wait for the database.
    database = open_storage(storage, Workspace(workspace), must_exist=True, patience_seconds=0)
    return optuna.load_study(study_name=name, storage=database)


def _positive(text: str) -> int:
    return _whole_number(text, least=1)


def _not_negative(text: str) -> int:
    return _whole_number(text, least=0)


def _whole_number(text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return number
