"""Signs of life of running trials, and who gave none for too long.

A process that runs a trial writes into the database now and then. Whether it did is judged as for leases: by
whether what it wrote *changed* while the one who asks was watching, by a clock that nobody can set. Optuna
compares it with the database's clock instead, so that a clock that jumps by an hour makes the trials of
healthy processes fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_LOOKS_APART = 3


@dataclass(frozen=True)
class Heartbeat:
    """How often a running trial says that its process lives, and when it is taken for dead.

    Args:
        seconds: It says so this often.
        grace_seconds: A running trial that said nothing for this long is taken for dead.
    """

    seconds: float = 10.0
    grace_seconds: float = 60.0


@dataclass
class HeartbeatWatch:
    """What one process saw of the heartbeats of others.

    Args:
        heartbeat: How often they are written.
        clock: Monotonic, in seconds.
    """

    heartbeat: Heartbeat
    clock: Callable[[], float] = time.monotonic
    _last_look: float = field(default=float("-inf"), init=False)
    _seen: dict[int, tuple[object, float]] = field(default_factory=dict, init=False)

    def look(self, beats: Mapping[int, object]) -> list[int]:
        """Look at the heartbeats of all running trials; to be done again within a few heartbeats.

        Who has not looked for longer begins anew. It was paused itself, or the database was away, and then
        nobody could write a heartbeat; both say nothing of the others.

        Args:
            beats: What each running trial wrote last, by its id.

        Returns:
            The trials that wrote nothing for longer than the grace.
        """
        now = self.clock()
        if now - self._last_look > _LOOKS_APART * self.heartbeat.seconds:
            self._seen.clear()
        self._last_look = now
        seen = {}
        for trial, beat in beats.items():
            before, since = self._seen.get(trial, (None, now))
            seen[trial] = (beat, since if before == beat else now)
        self._seen = seen
        return [trial for trial, (_, since) in seen.items() if now - since > self.heartbeat.grace_seconds]
