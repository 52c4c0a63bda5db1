"""The Optuna dashboard over a study, on this machine only, with feasibility shown rightly."""

from __future__ import annotations

import copy
import errno
from collections.abc import Container, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna_dashboard._app as dashboard_app
from optuna.storages import RDBStorage, _CachedStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from compress_search.exceptions import StudyError

HOST = "127.0.0.1"


class FeasibilityView(_CachedStorage):
    """A storage as optuna-dashboard 0.21 reads it.

    That dashboard looks for constraints in one list, the trial's system attribute ``constraints``; since
    version 5 Optuna stores each under a key of its own. The view adds the list to what is read and writes
    nothing: with both in the database, Optuna would count each constraint twice.

    Args:
        storage: The study's storage.
    """

    def __init__(self, storage: RDBStorage) -> None:
        super().__init__(storage)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return one trial, with its list of constraints."""
        return _with_constraint_list(super().get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study, each with its list of constraints."""
        trials = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [_with_constraint_list(trial) for trial in trials]


class DashboardServer:
    """Serves the dashboard of one storage on 127.0.0.1; a context manager.

    Args:
        storage: The storage of the study.
        study: Name of the study whose page is :attr:`url`.
        port: A free port; 0 takes any.

    Raises:
        StudyError: The port is taken, or not allowed.
    """

    def __init__(self, storage: RDBStorage, study: str, *, port: int) -> None:
        view = FeasibilityView(storage)
        try:
            self._server = make_server(
                HOST, port, dashboard_app.wsgi(view), server_class=_Server, handler_class=_Handler
            )
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            fault = "is taken by another program" if taken else f"cannot be used ({error})"
            raise StudyError(
                f"Port {port} of {HOST} {fault}. "
                "Choose another: --port N on the command line, port=N in Python."
            ) from error
        page = f"/dashboard/studies/{view.get_study_id_from_name(study)}"
        self.url = f"http://{HOST}:{self._server.server_port}{page}"

    def serve_forever(self) -> None:
        """Answer requests until :meth:`shutdown` is called from another thread, or Ctrl-C."""
        self._server.serve_forever()

    def shutdown(self) -> None:
        """Make :meth:`serve_forever` return."""
        self._server.shutdown()

    def __enter__(self) -> DashboardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the page asks every few seconds."""


def _best_feasible(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    feasible = [trial for trial in trials if all(value <= 0 for value in trial.constraints.values())]
    best: list[FrozenTrial] = _best_of_all(feasible, directions)
    return best


# The dashboard marks as best what no trial dominates, whether or not that trial is feasible.
_best_of_all = dashboard_app.get_pareto_front_trials
dashboard_app.get_pareto_front_trials = _best_feasible


def _with_constraint_list(trial: FrozenTrial) -> FrozenTrial:
    """Put a list in the place of the separate constraints, in a copy: the storage caches the original."""
    if not trial.constraints:
        return trial
    kept = {key: value for key, value in trial.system_attrs.items() if not key.startswith("constraints")}
    viewed = copy.copy(trial)
    viewed.system_attrs = {**kept, "constraints": list(trial.constraints.values())}
    return viewed
