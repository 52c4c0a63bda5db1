"""Where a study is kept: a database through SQLAlchemy, set up so that a dying process loses nothing."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from compress_search.exceptions import StudyError
from compress_search.workspace import Workspace

HEARTBEAT_SECONDS = 10
"""A running trial says this often that its process lives."""
GRACE_SECONDS = 60
"""A running trial that said nothing for this long is taken for dead."""
_SQLITE_WAIT_SECONDS = 30
_DRIVERS = {
    "postgresql": ("postgresql+psycopg", "psycopg", "pip install 'psycopg[binary]'"),
    "mysql": ("mysql+pymysql", "pymysql", "pip install pymysql"),
    "mariadb": ("mariadb+pymysql", "pymysql", "pip install pymysql"),
}
"""For each kind of server the driver that is tried, its module, and where it comes from."""
_SECRET = "pass"
"""Part of the names of URL options that hold a password: ``?password=``, ``?passwd=``."""

_NO_HEARTBEAT = (
    "cannot keep a study that is to be resumed: it has no heartbeat, so a trial whose process was killed "
    "would be running for ever{more}. Use SQLite (sqlite:///studies.db, one machine, a local disk) or "
    "PostgreSQL (postgresql+psycopg://user@host/database)."
)
_REFUSED = {
    "journal": "A journal file " + _NO_HEARTBEAT.format(more=", and one torn line makes it unreadable"),
    "redis": "A journal in Redis " + _NO_HEARTBEAT.format(more=""),
    "grpc": "Optuna's gRPC proxy " + _NO_HEARTBEAT.format(more=""),
}


def open_storage(url: str | None, workspace: Workspace, *, must_exist: bool = False) -> RDBStorage:
    """Open, or create, the database of a study.

    SQLite is set up with write-ahead logging and with transactions that take the write lock when they
    begin: with Optuna's defaults two processes can both claim one waiting trial.

    Args:
        url: A SQLAlchemy URL; ``None`` is the SQLite file of the workspace.
        workspace: The workspace.
        must_exist: Refuse to create a SQLite file.

    Raises:
        StudyError: The URL is not one that can keep a resumable study, or the database cannot be used.
    """
    parsed = make_sqlite_url(workspace.database) if url is None else parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return _connect(parsed, {"pool_pre_ping": True})
    if parsed.database in (None, "", ":memory:"):
        raise StudyError(
            "A SQLite database in memory is gone when the process ends. Name a file: sqlite:///studies.db."
        )
    assert parsed.database is not None
    if must_exist and not Path(parsed.database).is_file():
        raise StudyError(
            f"There is no database {parsed.database!r}. Name the workspace or the storage that the study was "
            "made with: --workspace DIR or --storage URL on the command line, workspace=... or storage=... "
            "in Python."
        )
    storage = _connect(
        parsed,
        {
            # The driver begins no transaction of its own; _begin_immediately does.
            "connect_args": {"isolation_level": None, "timeout": _SQLITE_WAIT_SECONDS},
            "pool_events": [(_set_pragmas, "connect")],
        },
    )
    sqlalchemy.event.listen(storage.engine, "begin", _begin_immediately)
    return storage


def make_sqlite_url(path: Path) -> URL:
    """Return the SQLAlchemy URL of a SQLite file."""
    return URL.create("sqlite", database=str(path.absolute()))


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


def parse_url(url: object) -> URL:
    """Read the URL of a database.

    Raises:
        StudyError: It is none, or one that cannot keep a resumable study. A password is not shown.
    """
    text = url if isinstance(url, str) else type(url).__name__.lower()
    kind = text.partition("://")[0].lower()
    for name, reason in _REFUSED.items():
        if kind.startswith(name) or kind.endswith((f".{name}", f"{name}storage", f"{name}storageproxy")):
            raise StudyError(reason)
    if not isinstance(url, str):
        raise StudyError(
            f"storage is a {type(url).__name__}; give the URL of the database, for example sqlite:///studies.db."
        )
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        # The value is not shown, and not chained either: it may hold a password.
        raise StudyError(
            "storage is not the URL of a database. Write, for example, sqlite:///studies.db or "
            "postgresql+psycopg://user@host/database."
        ) from None


def shown_url(url: URL) -> str:
    """Return a URL for people, without its password, wherever in it that stands."""
    query = {name: "***" if _SECRET in name.lower() else value for name, value in url.query.items()}
    # Asterisks are escaped in options, which nobody could read.
    return url.set(query=query).render_as_string(hide_password=True).replace("%2A", "*")


def _without_password(text: str, url: URL) -> str:
    """Blot a URL's passwords out of what a driver said."""
    secrets = [str(url.password or ""), *(str(v) for k, v in url.query.items() if _SECRET in k.lower())]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def _driver_remedy(url: URL) -> str:
    name = url.get_backend_name()
    if name not in _DRIVERS:
        return "Use SQLite (sqlite:///studies.db), PostgreSQL (postgresql+psycopg://) or MySQL (mysql+pymysql://)."
    driver, module, install = _DRIVERS[name]
    if url.drivername == driver:
        return f"Install it: {install}."
    return f"Install it, or write {driver}:// and install {module}: {install}."


def _connect(url: URL, engine_arguments: dict[str, Any]) -> RDBStorage:
    shown = shown_url(url)
    try:
        with quiet_optuna():
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=engine_arguments,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
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
            f"The database {shown} cannot be used: {_without_password(str(cause), url)}. Check that it can "
            "be reached and written, or name another: --storage URL on the command line, storage=... in "
            "Python."
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
