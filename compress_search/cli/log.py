"""Where log lines go: the study's file, and the terminal without breaking its bars."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from rich.console import Console
from rich.logging import RichHandler

_LOGGERS = ("compress_search", "py.warnings")


@contextmanager
def logging_to_terminal() -> Iterator[Console]:
    """Send log lines to stderr: all of them where it is no terminal, warnings only beside bars.

    Yields:
        The console that bars are to be drawn on.
    """
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, level=logging.WARNING, show_time=False, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Warnings of libraries are lines of the log too, rather than text in the middle of a bar.
    logging.captureWarnings(True)
    try:
        with _added(handler):
            yield console
    finally:
        logging.captureWarnings(False)


@contextmanager
def logging_to_file(path: Path) -> Iterator[None]:
    """Append all log lines of the block to a file, with date and time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    try:
        with _added(handler):
            yield
    finally:
        handler.close()


@contextmanager
def _added(handler: logging.Handler) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
