"""Which process it was: told apart from all others of its machine, and looked up later."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True)
class Worker:
    """A process that computes stages and runs trials.

    Attributes:
        host: Name of its machine.
        pid: Its process id.
        started: When it started, in seconds since its machine did: process ids are used again, and clocks
            are set.
    """

    host: str
    pid: int
    started: float

    @classmethod
    def this_process(cls) -> Worker:
        """Describe the process that asks."""
        return cls.of(psutil.Process())

    @classmethod
    def of(cls, process: psutil.Process) -> Worker:
        """Describe a process of this machine."""
        return cls(socket.gethostname(), process.pid, _started(process))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {"host": self.host, "pid": self.pid, "started": self.started}

    def is_known_dead(self) -> bool:
        """Whether it ran on this machine and does not any more. Of other machines nothing is known."""
        if not self.is_of_this_machine:
            return False
        try:
            process = psutil.Process(self.pid)
            another = abs(_started(process) - self.started) > 1
            return bool(another or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    @property
    def is_of_this_machine(self) -> bool:
        """Whether it ran, or runs, on the machine that asks."""
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _started(process: psutil.Process) -> float:
    # The machine's start, in seconds since 1970, moves when its clock is set; a process's start with it.
    return float(process.create_time() - psutil.boot_time())
