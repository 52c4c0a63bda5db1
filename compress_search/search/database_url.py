"""URLs of databases: read, shown and saved without their passwords."""

from __future__ import annotations

import os

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from compress_search.exceptions import StudyError

PASSWORD_VARIABLE = "COMPRESS_SEARCH_DB_PASSWORD"
"""Environment variable: the password of a URL that has none."""

_SECRET = "pass"
"""Part of the names of URL options that hold a password: ``?password=``, ``?passwd=``."""
_PASSWORDS = ("password", "passwd")

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


def without_secrets(text: str, url: URL) -> str:
    """Blot a URL's passwords out of what a driver said."""
    secrets = [str(url.password or ""), *(str(v) for k, v in url.query.items() if _SECRET in k.lower())]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def saved_url(url: URL) -> str:
    """Return a URL for a file: without its passwords, which are then looked for in the environment."""
    query = {
        name: value for name, value in url.query.items() if _SECRET not in name.lower() or name == "passfile"
    }
    return url._replace(password=None).set(query=query).render_as_string(hide_password=False)


def password_of(url: URL) -> str | None:
    """Return the password of a URL, wherever in it that stands."""
    in_options = (str(value) for name, value in url.query.items() if name.lower() in _PASSWORDS)
    return str(url.password) if url.password else next(in_options, None)


def with_password(url: URL) -> URL:
    """Return a URL with the password of ``$COMPRESS_SEARCH_DB_PASSWORD`` if it is a server's and has none."""
    password = os.environ.get(PASSWORD_VARIABLE)
    if not password or url.get_backend_name() == "sqlite" or password_of(url) is not None:
        return url
    return url.set(password=password)


def hand_on_password(url: str | None) -> None:
    """Put the password of a URL, if it has one, where the processes that this one starts look for it."""
    password = None if url is None else password_of(parse_url(url))
    if password is not None:
        os.environ[PASSWORD_VARIABLE] = password
