"""One process at a time decides what to run next, so that a study's total is never overshot.

How many trials are finished or running is counted, and then one is claimed. Were two processes to do so at
the same time, both would count the same, and both would claim the last trial.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage


@contextmanager
def claiming(study: optuna.Study) -> Iterator[None]:
    """Keep the other processes of a study from claiming trials within the block.

    With SQLite it is a lock file beside the database, which the operating system lets go when its holder is
    killed. With PostgreSQL it is an advisory lock, which ends with the connection; so it holds for all
    machines. Other databases have no lock here: there the total may be overshot, by a trial for each process
    at the most.
    """
    storage = study._storage
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    assert isinstance(backend, RDBStorage)
    engine: sqlalchemy.Engine = backend.engine
    if engine.dialect.name == "sqlite":
        assert engine.url.database is not None
        database = Path(engine.url.database)
        with filelock.FileLock(database.with_name(f".{database.name}.claims.lock")):
            yield
    elif engine.dialect.name == "postgresql":
        digest = hashlib.sha256(f"compress_search/{study.study_name}".encode()).digest()
        key = int.from_bytes(digest[:8], signed=True)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield
    else:
        yield
