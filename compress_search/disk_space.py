"""A full disk: what was computed waits in memory until there is room for it."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SECONDS = 10.0
"""How long to wait between two attempts."""


def write_when_there_is_room(
    write: Callable[[], None],
    folder: Path,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write something; while the disk is full, say so and try again.

    Nothing that is stored already is touched meanwhile, and Ctrl-C ends the waiting.

    Args:
        write: Writes whole or not at all. It is called until it does not find the disk full.
        folder: Where it writes to.
        say: Tells the user.
        sleep: Waits for so many seconds.

    Raises:
        OSError: Whatever else is wrong with the disk.
    """
    told = False
    while True:
        try:
            write()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not told:
                free = shutil.disk_usage(folder).free
                say(
                    f"The disk of {str(folder)!r} is full ({error.strerror}; {free / 1e6:.0f} MB left), so "
                    "that a result cannot be stored. It is kept in memory: make room, and the work goes on "
                    f"by itself (it is tried again every {_SECONDS:.0f} s). `compress-search cache prune` "
                    "removes what no trial needs."
                )
                told = True
            sleep(_SECONDS)
        else:
            if told:
                say("There is room on the disk again.")
            return
