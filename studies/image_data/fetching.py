"""Files that are fetched once, by whichever road is open, and verified whenever they are read."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from compress_search.workspace import write_bytes_atomically
from image_data.images import DataError

T = TypeVar("T")


def fetch(
    what: str,
    roads: Sequence[Callable[[Path], Iterable[T]]],
    keep: Callable[[T], tuple[Path, bytes]],
    *,
    remedy: str,
) -> None:
    """Take the first road that leads there.

    Args:
        what: What is fetched, for the error.
        roads: Each is given an empty folder for its own use, and yields parts of the data.
        keep: Says for a part in which file it is kept, and how it is written there.
        remedy: What to do where no road leads there.

    Raises:
        DataError: None does; the message has the fault of each.
    """
    faults = []
    for road in roads:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                for part in road(Path(scratch)):
                    write_bytes_atomically(*keep(part))
            return
        except (OSError, RuntimeError, subprocess.SubprocessError, tarfile.TarError) as error:
            faults.append(f"{road.__name__.removeprefix('_')}: {type(error).__name__}: {error}")
    raise DataError(f"{what} cannot be fetched ({'; '.join(faults)}). {remedy}")


def verified(path: Path, md5: str, *, what: str) -> bytes:
    """Read a file and compare its MD5.

    Raises:
        DataError: It is not that of the official data.
    """
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(
            f"{path} is not the official {what}: its MD5 is {found}, not {md5}. "
            "Delete the file, and it is fetched again."
        )
    return content
