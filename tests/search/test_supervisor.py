"""Workers under a supervisor: they share a machine, are restarted, and end the study with its exact total."""

from __future__ import annotations

import io
import os
import re
import signal
import sys

from rich.console import Console

from compress_search.exceptions import StudyError
from compress_search.progress import Progress
from compress_search.search.supervisor import memory_warning, supervise, worker_environments


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
    said = watch(new_study(), tmp_path, program)
    assert "finish their step" in said[1] and "ended at once" in said[2]
    assert said[3] == "KeyboardInterrupt()"
    assert (tmp_path / "worker-1.log").read_text().count("asked to stop") == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
