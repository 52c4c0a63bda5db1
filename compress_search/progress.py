"""Progress of long work: bars with an estimate on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from compress_search.plain_text import duration

logger = logging.getLogger("compress_search")

Advance = Callable[[str], None]
"""Says that one unit of the work is done, with a short note of how it went."""


class Progress:
    """Nested bars: the study's trials, the trial's stages, the stage's epochs.

    Every step also goes to the log ``compress_search`` with an estimate of the time left, so that a run
    without a terminal tells the same.

    Args:
        console: Where to draw. Bars are drawn only if it is a terminal or a notebook.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._rich: RichProgress | None = None

    @contextmanager
    def bar(self, what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        """Show the progress of ``total`` units of work.

        Args:
            what: What the work is.
            total: Number of units.
            done: Number of units that were done before.

        Yields:
            A function to call after each unit with a short note.
        """
        started = time.monotonic()
        finished = done

        def log(note: str) -> None:
            nonlocal finished
            finished += 1
            left = (time.monotonic() - started) / (finished - done) * (total - finished)
            logger.info("%s %d/%d: %s (about %s left)", what, finished, total, note, duration(max(0.0, left)))

        rich = self._live()
        if rich is None:
            yield log
            return
        task = rich.add_task(what, total=total, completed=done, note="")

        def advance(note: str) -> None:
            log(note)
            rich.update(task, advance=1, note=note)

        try:
            yield advance
        finally:
            rich.remove_task(task)
            if not rich.task_ids:
                rich.stop()
                self._rich = None

    def say(self, message: str) -> None:
        """Tell a fact that is not a step, above the bars and in the log."""
        logger.info("%s", message)
        if self._rich is not None:
            self._rich.console.print(message, highlight=False, markup=False)

    def _live(self) -> RichProgress | None:
        if not (self._console.is_terminal or self._console.is_jupyter):
            return None
        if self._rich is None:
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )
            self._rich.start()
        return self._rich
