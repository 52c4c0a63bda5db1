"""Looking at a study again and again while it runs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

_SECONDS = 5.0


def add_watch_option(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """Add an option that says how often to look; without a number it is every five seconds.

    Args:
        parser: Of a subcommand.
        name: Of the option, with its dashes.
        what: What is done each time, for the help.
    """
    parser.add_argument(
        name,
        type=_positive,
        nargs="?",
        const=_SECONDS,
        metavar="SECONDS",
        help=f"{what} every so many seconds ({_SECONDS:g}) until the study is over or Ctrl-C is pressed",
    )


def watch(look: Callable[[], bool], *, seconds: float) -> bool:
    """Look until the study is over; Ctrl-C ends it too, for nothing is lost by that.

    Args:
        look: Looks once, and says whether the study is over.
        seconds: Between two looks.

    Returns:
        Whether the study is over.
    """
    try:
        while not look():
            time.sleep(seconds)
    except KeyboardInterrupt:
        return False
    return True


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds
