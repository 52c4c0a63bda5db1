"""Several worker processes on one study: started, restarted when they die, stopped together.

Who supervises computes nothing, and does not import PyTorch before its workers have: the GPUs that a worker
sees are decided by its environment, and what this process does not hold is theirs.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from compress_search.exceptions import DatabaseError, StudyError
from compress_search.progress import Advance, Progress
from compress_search.search.history import WORKER, finished_trials

logger = logging.getLogger("compress_search")

ERROR_STATUS = 2
"""A worker that ends with this exit status has met an error that would come again: it is not restarted."""

_LOOK_SECONDS = 0.2
_COUNT_SECONDS = 1.0
_KILL_SECONDS = 5.0
_LAST_LINES = 8


def worker_environments(
    base: Mapping[str, str], *, workers: int, cores: int, gpus: Sequence[str]
) -> list[dict[str, str]]:
    """Divide a machine among workers: each has its share of the threads, and one GPU if there are any.

    Args:
        base: The environment that they inherit. Threads that it limits further stay limited.
        workers: How many there are.
        cores: Number of CPU cores.
        gpus: The GPUs as ``CUDA_VISIBLE_DEVICES`` names them. More workers than GPUs share them in turn.

    Returns:
        The environment of each worker.
    """
    environments = []
    for index in range(workers):
        environment = dict(base)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            share, limit = max(1, cores // workers), base.get(name, "")
            environment[name] = str(min(share, int(limit)) if limit.isdecimal() and int(limit) else share)
        # Idle threads that spin take the cores from the other workers.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        environments.append(environment)
    return environments


def supervise(
    study: optuna.Study,
    *,
    n_trials: int,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    restarts: int,
    progress: Progress,
) -> None:
    """Start workers on a study, one for each environment, and wait until they have finished it.

    Args:
        study: The study.
        n_trials: Its total of finished trials.
        command: Starts a worker. Its standard input ends when this process does, however that ends; its
            output goes to a log file.
        environments: The environment of each worker.
        folder: Where ``worker-<n>.log`` lie.
        restarts: How often each worker is started again if it dies.
        progress: Shows the finished trials, whoever ran them.

    Raises:
        StudyError: All workers have ended, and the study has not.
        KeyboardInterrupt: Ctrl-C or SIGTERM. The workers have finished their step and left checkpoints; a
            second signal ends them at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workers = [
        _SupervisedWorker(number, tuple(command), environment, folder / f"worker-{number}.log")
        for number, environment in enumerate(environments, start=1)
    ]
    with _counted_signals() as signals:
        try:
            for worker in workers:
                worker.start()
            progress.say(
                f"{len(workers)} workers started, whose lines are in {folder}/worker-<n>.log; one that dies "
                f"is restarted, at most {_times(restarts)}."
            )
            _watch(_View(study, n_trials, progress), workers, restarts, signals)
        finally:
            for worker in workers:
                worker.kill()


@dataclass
class _SupervisedWorker:
    """One worker, through all its lives.

    Attributes:
        number: From 1.
        command: Starts it.
        environment: Its environment.
        log: Its log file.
        process: The life that it is in; ``None`` before the first one.
        restarts: How often it was started again.
        log_start: Where in its log file this life begins.
        ended: Whether it is not started again.
    """

    number: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    log_start: int = 0
    ended: bool = False

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C on the terminal is for the supervisor, which passes it on once.
                start_new_session=True,
            )

    def status(self) -> int | None:
        """The exit status of this life; ``None`` while it lasts."""
        assert self.process is not None
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to finish its step; the second time, to end at once."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def last_lines(self) -> str:
        """What this life said last, indented."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        return "".join(f"\n  {line}" for line in lines[-_LAST_LINES:]) or "\n  (it said nothing)"


class _Signals:
    """How often this process was asked to stop."""

    def __init__(self) -> None:
        self.count = 0

    def arrived(self, *_: object) -> None:
        self.count += 1


@contextmanager
def _counted_signals() -> Iterator[_Signals]:
    signals = _Signals()
    # A terminal that is closed sends SIGHUP; the workers, in sessions of their own, do not get it.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        # What `nohup` ignores stays ignored. The others are asked for, also where a shell ignores them.
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:
            signal.signal(number, signals.arrived)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _View:
    """The study as its database tells it, and the bar that shows it."""

    def __init__(self, study: optuna.Study, n_trials: int, progress: Progress) -> None:
        self._study = study
        self._failed = False
        self.progress = progress
        self.trials = self._load() or []
        self._shown = {trial.number for trial in finished_trials(self.trials)}
        self.done = len(self._shown)
        self.total = max(n_trials, self.done)

    def update(self, advance: Advance) -> None:
        trials = self._load()
        if trials is None:
            return
        self.trials = trials
        for trial in finished_trials(trials):
            # A trial that was interrupted counts for the moment until it is queued again, but no longer.
            if trial.number not in self._shown and self.done < self.total:
                self._shown.add(trial.number)
                self.done += 1
                advance(_note_of(trial))

    def _load(self) -> list[FrozenTrial] | None:
        try:
            trials = self._study.get_trials(deepcopy=False)
        except (StorageInternalError, DatabaseError) as error:
            if not self._failed:
                logger.warning("The database does not answer; the workers go on: %s", error)
            self._failed = True
            return None
        self._failed = False
        return trials


def _watch(view: _View, workers: Sequence[_SupervisedWorker], restarts: int, signals: _Signals) -> None:
    """Look after the workers until all have ended."""
    next_count, measured, passed_on, deadline = 0.0, False, 0, float("inf")
    with view.progress.bar("trials", view.total, done=view.done) as advance:
        while not all(worker.ended for worker in workers):
            for worker in workers:
                if not worker.ended and worker.status() is not None:
                    _after_end(worker, workers, restarts, stopping=signals.count > 0, progress=view.progress)
            if signals.count > passed_on and passed_on < 2:
                passed_on += 1
                _stop(workers, again=passed_on > 1, progress=view.progress)
                deadline = time.monotonic() + _KILL_SECONDS if passed_on > 1 else deadline
            if time.monotonic() > deadline:
                for worker in workers:
                    worker.kill()
            if time.monotonic() >= next_count:
                view.update(advance)
                next_count = time.monotonic() + _COUNT_SECONDS
                measured = measured or _memory_is_measured(view, workers)
            time.sleep(_LOOK_SECONDS)
        view.update(advance)
    if all(worker.status() != 0 for worker in workers):
        if signals.count:
            raise KeyboardInterrupt
        raise StudyError(
            f"All workers ended with {view.done} of {view.total} trials finished. Their last lines are "
            f"above, and all of them in {workers[0].log.parent}/worker-<n>.log. What is finished is kept: "
            "mend the cause and resume the study."
        )


def _after_end(
    worker: _SupervisedWorker,
    workers: Sequence[_SupervisedWorker],
    restarts: int,
    *,
    stopping: bool,
    progress: Progress,
) -> None:
    """Restart a worker that died, unless there is a reason not to."""
    status = worker.status()
    assert status is not None
    worker.kill()
    if status == 0 or stopping:
        worker.ended = True
        return
    told = f"Its lines are in {worker.log}, the last ones being:{worker.last_lines()}"
    if status == ERROR_STATUS:
        worker.ended = True
        progress.say(f"Worker {worker.number} ended with an error, and is not restarted. {told}")
    elif any(other.ended and other.status() == 0 for other in workers):
        # Who ends by itself has seen the last trial finished.
        worker.ended = True
    elif worker.restarts >= restarts:
        worker.ended = True
        progress.say(
            f"Worker {worker.number} died ({_how(status)}) and was restarted {_times(restarts)} before: it "
            f"is not restarted again. {told}"
        )
    else:
        worker.restarts += 1
        progress.say(
            f"Worker {worker.number} died ({_how(status)}); restart {worker.restarts} of {restarts}. {told}"
        )
        worker.start()


def _stop(workers: Sequence[_SupervisedWorker], *, again: bool, progress: Progress) -> None:
    for worker in workers:
        if not worker.ended:
            worker.stop()
    progress.say(
        "The workers are ended at once."
        if again
        else "Stopping: the workers finish their step and leave checkpoints. Once more ends them at once."
    )


def _memory_is_measured(view: _View, workers: Sequence[_SupervisedWorker]) -> bool:
    """Warn if the workers will not fit, as soon as one has loaded all that it needs and runs a trial."""
    running = {
        trial.user_attrs[WORKER]["pid"]
        for trial in view.trials
        if trial.state == TrialState.RUNNING and WORKER in trial.user_attrs
    }
    for worker in workers:
        if worker.process is None or worker.process.pid not in running:
            continue
        try:
            sizes = [
                psutil.Process(w.process.pid).memory_info().rss for w in workers if w.process is not None
            ]
            one = psutil.Process(worker.process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return False
        warning = memory_warning(one, len(workers), psutil.virtual_memory().available + sum(sizes))
        if warning is not None:
            logger.warning("%s", warning)
        return True
    return False


def memory_warning(one: int, workers: int, room: int) -> str | None:
    """Say that the workers need more memory than there is, if so.

    Args:
        one: Resident size of one worker, in bytes.
        workers: How many there are.
        room: Memory that they can have, in bytes, what they have already included.
    """
    if one * workers <= room:
        return None
    return (
        f"{workers} workers need about {one * workers / 2**30:.1f} GiB of memory ({one / 2**30:.1f} GiB "
        f"each, and more while they train), and there are {room / 2**30:.1f} GiB. If workers are killed, use "
        f"fewer: --workers {max(1, room // one)}."
    )


def _note_of(trial: FrozenTrial) -> str:
    values = trial.values or ()
    note = ": accuracy {:.4f}, mac_ratio {:.4f}".format(*values) if len(values) == 2 else ""
    return f"trial {trial.number} {trial.state.name.lower()}{note}"


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
