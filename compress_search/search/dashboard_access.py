"""The dashboard's port, and what may be done through it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

PORT = 8080
"""The port unless another one is asked for."""

_READING = ("GET", "HEAD")
_MOST_READ = 1 << 20

_READ_ONLY = (
    "This dashboard is read-only: nothing can be changed or deleted here. "
    "To change things, serve it without --read-only (read_only=False in Python)."
)
_RENAMING = (
    "Studies are not renamed here: a study's folder, its stages and its constraints go by its name. "
    "Run the same study under another name instead; it reuses every stage."
)
_FILES = (
    "Files are not added or deleted here: they are stages, which other trials may use too. "
    "`compress-search cache prune` removes those that no trial needs."
)


def guarded(app: WSGIApplication, *, read_only: bool) -> WSGIApplication:
    """Put a guard before the dashboard, which itself has none.

    It answers 403 and a reason in place of what is not allowed: with ``read_only`` everything but reading,
    otherwise what would damage a study of this package. Browsers are told to take the media types of files
    as they are given.

    Args:
        app: The dashboard.
        read_only: Whether nothing can be changed.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        reason = why_refused(environ["REQUEST_METHOD"], environ.get("PATH_INFO", ""), read_only=read_only)
        if reason is not None:
            return _refuse(reason, environ, start_response)

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [*headers, ("X-Content-Type-Options", "nosniff")], *error)

        return app(environ, start)

    return answer


def why_refused(method: str, path: str, *, read_only: bool) -> str | None:
    """Say why a request is refused; ``None`` if it is not.

    Args:
        method: Of the request, for example ``"DELETE"``.
        path: Of the request.
        read_only: Whether nothing can be changed.
    """
    if method in _READING:
        return None
    if read_only:
        return _READ_ONLY
    if path.startswith("/api/studies/") and path.rstrip("/").endswith("/rename"):
        return _RENAMING
    return _FILES if path.startswith("/api/artifacts/") else None


def _refuse(reason: str, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    # A connection that is closed on an unread body is reset, and the reason is lost.
    length = environ.get("CONTENT_LENGTH") or "0"
    if length.isdecimal():
        environ["wsgi.input"].read(min(int(length), _MOST_READ))
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("403 Forbidden", headers)
    return [body]
