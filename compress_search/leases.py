"""Leases: while a process computes a stage, others that want the same one wait for it.

A lease is a file beside the stage, which only one process can make: it is written under a name of its own
and then linked, so that it is never seen half written, even where its holder is killed; without hard links
it is made with ``O_EXCL``. Its holder touches it now and then. A lease whose holder is dead, or has not
touched it for a while, is taken over. Whether it was touched is judged by whether the file's time *changed*
while the one who waits was watching, by its own clock: two machines need not agree on what time it is.

A lease saves work, and nothing else depends on it. Were two processes to compute the same stage after all
(because one was only paused, say), both would store the same bits, and one folder of them stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock

from compress_search.repeating import repeating
from compress_search.worker_process import Worker

logger = logging.getLogger("compress_search")

Found = TypeVar("Found")

RENEW_SECONDS = 15.0
"""A holder says this often that it lives."""
GRACE_SECONDS = 60.0
"""A holder that said nothing for this long is taken for dead."""
POLL_SECONDS = 1.0
"""Who waits looks this often."""

_SUFFIX = ".lease"
_REMOVAL_SECONDS = 5.0


@dataclass(frozen=True)
class Lease:
    """What a lease file says.

    Attributes:
        what: Name of the stage, for people.
        holder: The process.
        token: Random; no other lease has it.
        since: When it was taken, in seconds since 1970 by the holder's clock.
    """

    what: str
    holder: Worker
    token: str
    since: float

    @classmethod
    def of_this_process(cls, what: str) -> Lease:
        """Make a new one."""
        return cls(what, Worker.this_process(), secrets.token_hex(8), time.time())

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, file: Path) -> Lease | None:
        """Read a lease; ``None`` if there is none, or if it is still being written."""
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return cls(**value | {"holder": Worker(**value["holder"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.what}, by {self.holder} since {since}"


@dataclass(frozen=True)
class LeaseFile:
    """A lease as it lies in a folder.

    Attributes:
        key: Of the stage.
        file: The file.
        lease: What it says; ``None`` if it cannot be read.
        renewed: When its holder last said that it lives, in seconds since 1970 by the holder's clock.
        waiting: Those who wait for it, as far as they are not known to be dead.
    """

    key: str
    file: Path
    lease: Lease | None
    renewed: float
    waiting: tuple[Worker, ...]

    def is_known_dead(self, *, silent_seconds: float) -> bool:
        """Whether nobody holds it any more, as far as one look can tell.

        Args:
            silent_seconds: A holder of another machine that was silent for so long is taken for dead. That
                compares the clocks of two machines, so it should be long.
        """
        if self.lease is not None and self.lease.holder.is_of_this_machine:
            return self.lease.holder.is_known_dead()
        return time.time() - self.renewed > silent_seconds


@dataclass(frozen=True)
class Leases:
    """The leases of a folder of stages.

    Attributes:
        folder: The folder. It exists.
        say: Tells the user whom this process waits for.
        renew_seconds: A holder says so often that it lives.
        grace_seconds: One that said nothing for so long is taken for dead.
        poll_seconds: Who waits looks so often.
    """

    folder: Path
    say: Callable[[str], None]
    renew_seconds: float = RENEW_SECONDS
    grace_seconds: float = GRACE_SECONDS
    poll_seconds: float = POLL_SECONDS

    @contextmanager
    def computing(self, key: str, what: str, find: Callable[[], Found | None]) -> Iterator[Found | None]:
        """Wait until nobody else computes a stage, and keep others from computing it within the block.

        Args:
            key: Of the stage.
            what: Its name, for people.
            find: Returns the finished stage, if there is one.

        Yields:
            The stage, if another process finished it meanwhile; else ``None``, and it is to be computed.
        """
        found, held = self._found_or_taken(key, what, find)
        if held is None:
            yield found
            return
        try:
            with held.renewed(self.renew_seconds):
                # Another process may have stored it between the last look and the lease.
                yield find()
        finally:
            held.release()

    def _found_or_taken(
        self, key: str, what: str, find: Callable[[], Found | None]
    ) -> tuple[Found | None, _Held | None]:
        file = self.folder / f"{key}{_SUFFIX}"
        if (held := _take(file, what)) is not None:
            return None, held
        with _announced(file, what) as still_waiting:
            renewed, changed, told = 0, time.monotonic(), False
            while True:
                if (found := find()) is not None:
                    return found, None
                if (held := _take(file, what)) is not None:
                    return None, held
                lease, before, renewed = Lease.read(file), renewed, _time_of(file)
                if renewed != before:
                    changed = time.monotonic()
                if not told and lease is not None:
                    self.say(
                        f"Waiting for the stage {key}, which another process computes: {lease}. "
                        "Should that process end, this one takes over."
                    )
                    told = True
                reason = self._why_to_take_over(lease, silent=time.monotonic() - changed)
                if reason is not None and _remove(file, None if lease is None else lease.token):
                    self.say(f"The stage {key} is taken over: {reason}.")
                    continue
                still_waiting()
                time.sleep(self.poll_seconds)

    def _why_to_take_over(self, lease: Lease | None, *, silent: float) -> str | None:
        holder = "who held it" if lease is None else str(lease.holder)
        if lease is not None and lease.holder.is_known_dead():
            return f"{holder} has ended"
        if silent > self.grace_seconds:
            return f"{holder} gave no sign of life for {silent:.0f} s"
        return None


@dataclass
class _Held:
    """A lease of this process.

    Attributes:
        file: Its file.
        token: What tells it from another process's lease of the same name; ``None`` if it is empty.
        descriptor: The file, open: to renew it through this cannot touch another process's lease. ``None``
            if there is no file, because none can be made.
    """

    file: Path
    token: str | None
    descriptor: int | None

    @contextmanager
    def renewed(self, seconds: float) -> Iterator[None]:
        """Say every so many seconds that the holder lives."""
        descriptor = self.descriptor
        if descriptor is None:
            yield
            return

        def renew() -> None:
            try:
                os.utime(descriptor)
            except OSError as error:
                logger.warning("The lease %s was not renewed: %s", self.file, error)

        with repeating(renew, seconds=seconds, name=f"lease {self.file.stem}"):
            yield

    def release(self) -> None:
        """Give it back, unless another process has taken it over."""
        if self.descriptor is None:
            return
        try:
            _remove(self.file, self.token)
        except OSError as error:
            logger.warning("The lease %s could not be removed (%s). It runs out by itself.", self.file, error)
        finally:
            os.close(self.descriptor)


def lease_files(folder: Path) -> list[LeaseFile]:
    """List the leases of a folder of stages, oldest first."""
    found = []
    for file in folder.glob(f"*{_SUFFIX}"):
        try:
            renewed = file.stat().st_mtime
        except FileNotFoundError:
            continue
        waiting = [Lease.read(path) for path in waiting_files(file)]
        found.append(
            LeaseFile(
                file.stem,
                file,
                Lease.read(file),
                renewed,
                tuple(w.holder for w in waiting if w is not None and not w.holder.is_known_dead()),
            )
        )
    return sorted(found, key=lambda one: one.renewed if one.lease is None else one.lease.since)


def waiting_files(lease: Path) -> list[Path]:
    """The files of those who wait for a lease, or did when their process was killed."""
    return sorted(lease.parent.glob(f"{lease.name}.waiting-*"))


def is_abandoned(waiting: Path) -> bool:
    """Whether the process whose file this is does not wait any more, as far as one look can tell."""
    lease = Lease.read(waiting)
    return lease is not None and lease.holder.is_known_dead()


def remove_lease(lease: LeaseFile) -> bool:
    """Remove a lease that nobody holds any more.

    Returns:
        Whether it was removed; if not, somebody else has removed it, or taken it over.
    """
    return _remove(lease.file, None if lease.lease is None else lease.lease.token)


def _take(file: Path, what: str) -> _Held | None:
    """Make the lease; ``None`` if another process has it."""
    if file.exists():
        return None
    lease = Lease.of_this_process(what)
    try:
        return _Held(file, lease.token, _linked(file, lease))
    except FileExistsError:
        return None
    except OSError:
        return _made_in_place(file, lease)


def _linked(file: Path, lease: Lease) -> int:
    """Make a lease that is whole as soon as it is there, and return it open.

    Raises:
        FileExistsError: Another process has it.
        OSError: The file cannot be written, or there are no hard links here.
    """
    # What a process leaves that is killed in between is one of the files that are pruned with their holder.
    draft = _waiting_file(file, lease)
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        os.write(descriptor, lease.to_json().encode())
        os.link(draft, file)
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        draft.unlink(missing_ok=True)
    return descriptor


def _made_in_place(file: Path, lease: Lease) -> _Held | None:
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    except OSError as error:
        logger.warning("No lease %s can be made (%s): another process may compute the same.", file, error)
        return _Held(file, None, None)
    try:
        os.write(descriptor, lease.to_json().encode())
    except OSError as error:
        logger.warning(
            "The lease %s could not be written (%s). It keeps others out all the same.", file, error
        )
        os.ftruncate(descriptor, 0)
        return _Held(file, None, descriptor)
    return _Held(file, lease.token, descriptor)


def _waiting_file(file: Path, lease: Lease) -> Path:
    return file.with_name(f"{file.name}.waiting-{lease.token}")


def _remove(file: Path, token: str | None) -> bool:
    """Remove a lease if it is still the one with this token; ``None`` is one that cannot be read.

    Every lease is removed under one lock of the operating system. So of two processes that find the same
    lease dead only one removes it, and not the new lease that the other one took meanwhile.

    Returns:
        Whether it was removed.
    """
    # Beside the folder: in it there are stages and leases alone.
    lock = filelock.FileLock(file.parent.with_name(f".{file.parent.name}.lock"))
    try:
        lock.acquire(timeout=_REMOVAL_SECONDS)
    except filelock.Timeout:
        return False
    try:
        lease = Lease.read(file)
        if (None if lease is None else lease.token) != token or not file.exists():
            return False
        file.unlink()
        return True
    finally:
        lock.release()


def _time_of(file: Path) -> int:
    """When a lease was last renewed, in nanoseconds of its holder's clock; 0 if it is gone."""
    try:
        # Opened first, not only looked at: network file systems remember for long what a look showed.
        with file.open("rb") as handle:
            return os.fstat(handle.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


@contextmanager
def _announced(file: Path, what: str) -> Iterator[Callable[[], None]]:
    """Leave a file that says who waits, for ``status``.

    Yields:
        Says that it still waits.
    """
    lease = Lease.of_this_process(what)
    mine = _waiting_file(file, lease)
    # Nothing depends on it, so nothing is made of a failure.
    with contextlib.suppress(OSError):
        mine.write_text(lease.to_json(), encoding="utf-8")

    def still_waiting() -> None:
        with contextlib.suppress(OSError):
            os.utime(mine)

    try:
        yield still_waiting
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
