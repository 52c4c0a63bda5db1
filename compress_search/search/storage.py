"""Where a study is kept: a database through SQLAlchemy, set up so that a dying process loses nothing."""

from __future__ import annotations

import logging
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages._cached_storage import _CachedStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from compress_search.exceptions import StudyError
from compress_search.search.database_url import (
    PASSWORD_VARIABLE,
    parse_url,
    shown_url,
    with_password,
    without_secrets,
)
from compress_search.search.heartbeats import Heartbeat
from compress_search.search.patient_storage import PATIENCE_SECONDS, PatientStorage, passing_fault
from compress_search.workspace import Workspace, prove_writable

logger = logging.getLogger("compress_search")

_HOW_TO_NAME_ANOTHER = "storage=URL for compress-search run and in Python, --storage URL for other commands"

_SQLITE_WAIT_SECONDS = 30
_OPENING_PAUSE = 1.0
_WAITS: dict[str, dict[str, int]] = {
    # Without them a network that swallows everything is waited for for a quarter of an hour.
    "postgresql+psycopg": {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    },
    "mysql+pymysql": {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60},
}
"""For each driver how long it waits for the network, by its own names."""
_DRIVERS = {
    "postgresql": ("postgresql+psycopg", "psycopg", "pip install 'compress-search[postgresql]'"),
    "mysql": ("mysql+pymysql", "pymysql", "pip install 'compress-search[mysql]'"),
    "mariadb": ("mariadb+pymysql", "pymysql", "pip install 'compress-search[mysql]'"),
}
"""For each kind of server the driver that is tried, its module, and where it comes from."""


def open_storage(
    url: str | None,
    workspace: Workspace,
    *,
    must_exist: bool = False,
    heartbeat: Heartbeat | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
    opening_seconds: float = 0.0,
) -> PatientStorage:
    """Open, or create, the database of a study.

    SQLite is set up with write-ahead logging and with transactions that take the write lock when they
    begin: with Optuna's defaults two processes can both claim one waiting trial.

    Args:
        url: A SQLAlchemy URL; ``None`` is the SQLite file of the workspace. A server's that has no password
            takes it from ``$COMPRESS_SEARCH_DB_PASSWORD``, if that is set.
        workspace: The workspace.
        must_exist: Refuse to create a SQLite file.
        heartbeat: How often running trials say that they live; ``None`` is the default.
        patience_seconds: Once it is open, a database that does not answer is waited for this long.
        opening_seconds: The same while it is opened.

    Raises:
        StudyError: The URL is not one that can keep a resumable study, or the database cannot be used.
    """
    parsed = make_sqlite_url(workspace.database) if url is None else with_password(parse_url(url))
    if parsed.get_backend_name() == "mariadb":
        # Optuna knows it by its older name.
        parsed = parsed.set(drivername=parsed.drivername.replace("mariadb", "mysql", 1))
    arguments = _server_arguments(parsed)
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, must_exist=must_exist)
        arguments = {
            # The driver begins no transaction of its own; _begin_immediately does.
            "connect_args": {"isolation_level": None, "timeout": _SQLITE_WAIT_SECONDS},
            "pool_events": [(_set_pragmas, "connect")],
        }
    deadline = time.monotonic() + opening_seconds
    while True:
        try:
            storage = _connect(parsed, arguments, heartbeat or Heartbeat(), patience_seconds)
            break
        except StudyError as error:
            if time.monotonic() > deadline or passing_fault(error.__cause__ or error) is None:
                raise
            logger.warning("%s It is tried again.", error)
            time.sleep(_OPENING_PAUSE)
    if parsed.get_backend_name() == "sqlite":
        sqlalchemy.event.listen(storage.engine, "begin", _begin_immediately)
    return storage


def check_storage(url: str | None, workspace: Workspace) -> None:
    """Prove that a SQLite file can be made or written, and leave nothing behind; servers are not asked.

    Args:
        url: See :func:`open_storage`.
        workspace: The workspace, whose folder need not be there yet.

    Raises:
        StudyError: It cannot, or the URL is not one that can keep a resumable study.
    """
    parsed = make_sqlite_url(workspace.database) if url is None else parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return
    _check_file(parsed, must_exist=False)
    folder = Path(str(parsed.database)).absolute().parent
    if not folder.exists() and folder in workspace.stages.absolute().parents:
        # It is made with the workspace, which is there before its database.
        return
    try:
        prove_writable(folder)
    except OSError as error:
        raise StudyError(
            f"The database {shown_url(parsed)} cannot be used: {error}. Create its folder, or name another: "
            f"{_HOW_TO_NAME_ANOTHER}."
        ) from error


def _check_file(url: URL, *, must_exist: bool) -> None:
    if url.database in (None, "", ":memory:"):
        raise StudyError(
            "A SQLite database in memory is gone when the process ends. Name a file: sqlite:///studies.db."
        )
    assert url.database is not None
    if must_exist and not Path(url.database).is_file():
        raise StudyError(
            f"There is no database {url.database!r}. Name the workspace or the storage that the study was "
            "made with: --workspace DIR or --storage URL on the command line, workspace=... or storage=... "
            "in Python."
        )


def _server_arguments(url: URL) -> dict[str, Any]:
    """What SQLAlchemy is told about a server: a connection that is dead is found out about, and soon."""
    waits = {name: value for name, value in _WAITS.get(url.drivername, {}).items() if name not in url.query}
    return {"pool_pre_ping": True, "connect_args": waits}


def make_sqlite_url(path: Path) -> URL:
    """Return the SQLAlchemy URL of a SQLite file."""
    return URL.create("sqlite", database=str(path.absolute()))


def backend_of(study: optuna.Study) -> PatientStorage:
    """Return the database of a study, below what Optuna keeps in memory of it."""
    storage = study._storage
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    assert isinstance(backend, PatientStorage)
    return backend


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna from telling users what they did not ask for: experimental features, new studies."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _driver_remedy(url: URL) -> str:
    name = url.get_backend_name()
    if name not in _DRIVERS:
        return "Use SQLite (sqlite:///studies.db), PostgreSQL (postgresql+psycopg://) or MySQL (mysql+pymysql://)."
    driver, module, install = _DRIVERS[name]
    if url.drivername == driver:
        return f"Install it: {install}."
    return f"Install it, or write {driver}:// and install {module}: {install}."


def _connect(
    url: URL, engine_arguments: dict[str, Any], heartbeat: Heartbeat, patience_seconds: float
) -> PatientStorage:
    shown = shown_url(url)
    try:
        with quiet_optuna():
            return PatientStorage(
                url,
                engine_kwargs=dict(engine_arguments),
                heartbeat=heartbeat,
                patience_seconds=patience_seconds,
            )
    except (ImportError, NoSuchModuleError) as error:
        cause = error.__cause__ or error
        raise StudyError(f"The driver of {shown} is missing ({cause}). {_driver_remedy(url)}") from error
    except RuntimeError as error:
        # Optuna raises this for tables of another version; it names both.
        raise StudyError(
            f"The tables of {shown} belong to another version of Optuna: {error} "
            "Upgrade them (make a copy first): optuna storage upgrade --storage URL."
        ) from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        raise StudyError(
            f"The database {shown} cannot be used: {without_secrets(str(cause).strip(), url)}. Check that it "
            f"can be reached and written, and that its password is in the URL or in ${PASSWORD_VARIABLE}; or "
            f"name another: {_HOW_TO_NAME_ANOTHER}."
        ) from error


def _set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    cursor = connection.cursor()
    # First the patience: switching to write-ahead logging needs the lock too.
    cursor.execute(f"PRAGMA busy_timeout={_SQLITE_WAIT_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _begin_immediately(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
