"""The Optuna dashboard over a study, on this machine only."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna_dashboard
from optuna.storages import RDBStorage
from rich.console import Console

from compress_search.exceptions import StudyError
from compress_search.search.dashboard_access import PORT, guarded
from compress_search.search.dashboard_additions import Additions
from compress_search.search.dashboard_files import StageFiles
from compress_search.search.dashboard_view import DashboardView
from compress_search.search.layer_tables import LayerTables
from compress_search.task import Task
from compress_search.workspace import Workspace

HOST = "127.0.0.1"
_PATIENCE = 0.1
"""Seconds after which :meth:`DashboardServer.shutdown` is noticed."""


class DashboardServer:
    """Serves the dashboard of one storage on 127.0.0.1; a context manager.

    Args:
        storage: The storage of the study.
        study: Name of the study whose page is :attr:`url`.
        workspace: Where its stages lie.
        port: A free port; 0 takes any.
        read_only: Refuse everything but reading.
        load_task: Makes the study's task, if it is known. It is called when the first table of layers needs
            it, and not in a process that trains: it draws random numbers.

    Raises:
        StudyError: The port is taken, or not allowed.
    """

    def __init__(
        self,
        storage: RDBStorage,
        study: str,
        *,
        workspace: Workspace,
        port: int = PORT,
        read_only: bool = False,
        load_task: Callable[[], Task] | None = None,
    ) -> None:
        try:
            # Before anything else, which may take a while.
            self._server = _Server((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            fault = "is taken by another program" if taken else f"cannot be used ({error})"
            raise StudyError(
                f"Port {port} of {HOST} {fault}. "
                "Choose another: --port N on the command line, port=N in Python."
            ) from error
        self._layers = LayerTables(load_task)
        view = DashboardView(storage, Additions(workspace, self._layers))
        files = StageFiles(workspace.stages, self._layers, view.front_of)
        self._server.set_app(guarded(optuna_dashboard.wsgi(view, files), read_only=read_only))
        page = f"/dashboard/studies/{view.get_study_id_from_name(study)}"
        self.url = f"http://{HOST}:{self._server.server_port}{page}"

    def serve_forever(self) -> None:
        """Answer requests until :meth:`shutdown` is called from another thread, or Ctrl-C."""
        self._server.serve_forever(poll_interval=_PATIENCE)

    def serve_until_interrupted(self) -> None:
        """Say where, and answer requests until Ctrl-C."""
        lines = (self.url, "Ctrl-C ends it.")
        Console().print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
        with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
            # The pages ask for statistics again and again, and Optuna warns of few trials each time.
            warnings.filterwarnings("ignore", module=r"optuna\.")
            self.serve_forever()

    def shutdown(self) -> None:
        """Make :meth:`serve_forever` return."""
        self._server.shutdown()

    def __enter__(self) -> DashboardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()
        self._layers.close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Pages load a dozen things at once; five waiting connections are the default.
    request_queue_size = 64


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the page asks every few seconds."""
