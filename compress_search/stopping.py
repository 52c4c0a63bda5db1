"""Ctrl-C and SIGTERM: the first one lets the step that runs be finished, the second one ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopSwitch:
    """Whether the process was asked to stop, and what it may still finish.

    Outside of :meth:`finishing` a signal raises :class:`KeyboardInterrupt` where it arrives, as always.

    Attributes:
        requested: Whether a signal has arrived. What runs within :meth:`finishing` looks at it after every
            step, and raises :class:`KeyboardInterrupt` itself when what it has done is safe.
    """

    def __init__(self) -> None:
        self.requested = False
        self._finishing = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to the signals within the block. Only the main thread can; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.requested = False
        before = {number: signal.signal(number, self._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Let the first signal wait within the block."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _arrived(self, *_: object) -> None:
        second, self.requested = self.requested, True
        if second or not self._finishing:
            raise KeyboardInterrupt
