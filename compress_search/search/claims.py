"""One process at a time decides what to run next, so that a study's total is never overshot.

How many trials are finished or running is counted, and then one is claimed. Were two processes to do so at
the same time, both would count the same, and both would claim the last trial.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import filelock
import optuna
import sqlalchemy
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import orm

from compress_search.search.history import WORKER
from compress_search.search.patient_storage import PatientStorage
from compress_search.search.storage import backend_of
from compress_search.worker_process import Worker

_LOCK_SECONDS = 20
"""MySQL's server is asked for the lock for so long, and then again; its driver hears from it that often."""


class Claims:
    """The right to claim trials.

    Args:
        storage: The storage of the study.
        connection: The connection that holds the lock; ``None`` if the operating system holds it.
    """

    def __init__(self, storage: PatientStorage, connection: sqlalchemy.Connection | None) -> None:
        self._storage = storage
        self._connection = connection

    def take(self, trial_id: int) -> bool:
        """Claim a waiting trial for this process: it runs, has a heartbeat, and says who runs it, or neither.

        It is done over the connection that holds the lock. Should the lock be lost with it, because the
        server restarts, nothing is claimed.

        Returns:
            Whether it still waited.
        """
        if self._connection is not None:
            return self._take(trial_id, self._connection)
        with self._storage.engine.begin() as connection:
            return self._take(trial_id, connection)

    def _take(self, trial_id: int, connection: sqlalchemy.Connection) -> bool:
        with orm.Session(bind=connection) as session:
            trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            if trial.state != TrialState.WAITING:
                return False
            trial.state = TrialState.RUNNING
            trial.datetime_start = datetime.now()
            if models.TrialHeartbeatModel.where_trial_id(trial_id, session) is None:
                session.add(models.TrialHeartbeatModel(trial_id=trial_id))
            self._storage._set_trial_attr_without_commit(
                session, models.TrialUserAttributeModel, trial_id, WORKER, Worker.this_process().to_dict()
            )
            session.flush()
        return True


@contextmanager
def claiming(study: optuna.Study) -> Iterator[Claims]:
    """Keep the other processes of a study from claiming trials within the block.

    With SQLite it is a lock file beside the database, which the operating system lets go when its holder is
    killed. With PostgreSQL and MySQL it is a lock of the server, which ends with the connection; so it holds
    for all machines. What is claimed there is so when the block ends.
    """
    storage = backend_of(study)
    engine = storage.engine
    digest = hashlib.sha256(f"compress_search/{study.study_name}".encode()).digest()
    if engine.dialect.name == "sqlite":
        assert engine.url.database is not None
        database = Path(engine.url.database)
        with filelock.FileLock(database.with_name(f".{database.name}.claims.lock")):
            yield Claims(storage, None)
    elif engine.dialect.name == "postgresql":
        key = int.from_bytes(digest[:8], signed=True)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield Claims(storage, connection)
    else:
        with _mysql_lock(engine, f"compress_search/{digest.hex()[:32]}") as connection:
            yield Claims(storage, connection)


@contextmanager
def _mysql_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[sqlalchemy.Connection]:
    # The lock is of the server, which may have several databases with a study of this name each: no harm.
    take = sqlalchemy.text("SELECT GET_LOCK(:name, :seconds)")
    with engine.connect() as connection:
        while connection.scalar(take, {"name": name, "seconds": _LOCK_SECONDS}) != 1:
            pass
        # What is read from here on is of after the lock.
        connection.rollback()
        try:
            with connection.begin():
                yield connection
        except BaseException:
            # The lock ends with the connection, whatever state that is in.
            connection.invalidate()
            raise
        connection.execute(sqlalchemy.text("SELECT RELEASE_LOCK(:name)"), {"name": name})
