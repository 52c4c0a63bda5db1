"""Something that is done every so many seconds beside the work: a sign of life, for others to see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(action: Callable[[], None], *, seconds: float, name: str) -> Iterator[None]:
    """Do something again and again while the block runs, for the first time after the first pause.

    Args:
        action: What to do. It must not raise: it runs in a thread of its own.
        seconds: The pause.
        name: Of the thread.
    """
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
