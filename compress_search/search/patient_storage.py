"""Optuna's database storage, which waits while the database is away instead of failing.

Every call goes through :class:`PatientStorage`, so this is the one place that knows of databases that
restart, networks that break and files that another process has locked.

A commit whose answer was lost may have been done, and then doing it again must change nothing:

* Reading changes nothing. Attributes, parameters and heartbeats are written under their name, and writing
  the same again changes nothing.
* Ending a trial that has ended already is refused by Optuna; if it ended in the very state and with the very
  values that were to be written, it was this process's own lost commit.
* A trial that is added carries a mark of its own, by which it is found if it is added again.
* Claiming a trial is one transaction with its process's name in it: see ``claims.py``.
"""

from __future__ import annotations

import copy
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import orm, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from compress_search.exceptions import DatabaseError
from compress_search.search.database_url import shown_url, without_secrets
from compress_search.search.heartbeats import Heartbeat, HeartbeatWatch

logger = logging.getLogger("compress_search")

T = TypeVar("T")

PATIENCE_SECONDS = 1800.0
"""A database that does not answer is waited for this long."""

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 10.0
_DEFERRED_PAUSE = 5.0
_ADDED = "compress_search:added"
"""System attribute: the mark of a trial that was added."""
_PASSING_SQLITE = (5, 6, 10, 13, 14, 15)
"""SQLite's codes of what passes: busy, locked, input or output failed, full, cannot open, protocol."""
_LASTING_MYSQL = (1044, 1045, 1049, 1054, 1142, 1146)
"""MySQL's codes of what does not pass: access denied, unknown database, column or table."""

_PATIENT = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "_set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_system_attr",
    "get_trial_id_from_study_id_trial_number",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_trial",
    "_get_trials",
)
"""The methods of Optuna's storage that are only to be tried again."""


def passing_fault(error: BaseException) -> BaseException | None:
    """Return what the driver said, if it is a fault of the database that waiting may mend; else ``None``."""
    fault: BaseException | None = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(fault, PoolTimeoutError):
        return fault
    if not isinstance(fault, DBAPIError):
        return None
    said = fault.orig
    if not fault.connection_invalidated:
        if not isinstance(fault, (OperationalError, InterfaceError, InternalError)):
            return None
        code = getattr(said, "sqlite_errorcode", None)
        if code is not None and code & 0xFF not in _PASSING_SQLITE:
            return None
        if said is not None and said.args and said.args[0] in _LASTING_MYSQL:
            return None
    return said or fault


class PatientStorage(RDBStorage):
    """A database that is waited for while it does not answer.

    What a running trial says about itself is not worth waiting: it is kept, the trial computes on, and it is
    written with the next heartbeat after the database is back, at the latest before the trial's end is.

    Args:
        url: Of the database.
        engine_kwargs: For SQLAlchemy.
        heartbeat: How often running trials say that they live.
        patience_seconds: How long to wait.

    Attributes:
        watch: What this process saw of the other processes' heartbeats.
        patience_seconds: As given.
    """

    def __init__(
        self, url: URL, *, engine_kwargs: dict[str, Any], heartbeat: Heartbeat, patience_seconds: float
    ) -> None:
        self._shown, self._url = shown_url(url), url
        self.watch = HeartbeatWatch(heartbeat)
        self.patience_seconds = patience_seconds
        self._deferred: dict[int, dict[str, Any]] = {}
        self._deferred_until = 0.0
        self._writing = threading.RLock()
        self._added: set[str] = set()
        try:
            super().__init__(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)
        except BaseException:
            # It may have connected before it found that it may not write.
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise

    @property
    def heartbeat(self) -> Heartbeat:
        """How often running trials say that they live."""
        return self.watch.heartbeat

    def until_answered(self, action: Callable[[], T]) -> T:
        """Do something with the database; while that does not answer, say so, wait and do it again.

        Args:
            action: May be done again although it was done.

        Raises:
            DatabaseError: The database did not answer for too long.
        """
        since, pause, told = time.monotonic(), _FIRST_PAUSE, False
        while True:
            try:
                result = action()
            except Exception as error:
                fault = passing_fault(error)
                if fault is None:
                    raise
                waited = time.monotonic() - since
                said = without_secrets(" ".join(str(fault).split()), self._url)
                if waited + pause > self.patience_seconds:
                    raise DatabaseError(
                        f"The database {self._shown} did not answer for {waited:.0f} s: {said}. Nothing that "
                        "is finished is lost: resume the study when the database can be reached, and a trial "
                        "that ran goes on from its last stage or checkpoint."
                    ) from error
                logger.warning(
                    "The database %s does not answer (%s). It is tried again in %.1f s, for %.0f s at most.",
                    self._shown,
                    said,
                    pause,
                    self.patience_seconds - waited,
                )
                told = True
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if told:
                    logger.warning("The database answers again, after %.1f s.", time.monotonic() - since)
                return result

    @contextmanager
    def without_patience(self) -> Iterator[None]:
        """Do not wait within the block."""
        before, self.patience_seconds = self.patience_seconds, 0.0
        try:
            yield
        finally:
            self.patience_seconds = before

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write what a trial says about itself, now or when the database answers again."""
        with self._writing:
            self._deferred.setdefault(trial_id, {})[key] = value
            if time.monotonic() < self._deferred_until:
                return
            try:
                self._write_deferred(trial_id)
            except Exception as error:
                fault = passing_fault(error)
                if fault is None:
                    raise
                self._deferred_until = time.monotonic() + _DEFERRED_PAUSE
                logger.warning(
                    "The database %s does not answer (%s). The trial goes on, and what it has to tell is "
                    "written when the database answers again.",
                    self._shown,
                    without_secrets(" ".join(str(fault).split()), self._url),
                )

    def _write_deferred(self, trial_id: int) -> None:
        with self._writing:
            waiting = self._deferred.get(trial_id, {})
            for key in list(waiting):
                try:
                    super().set_trial_user_attr(trial_id, key, waiting[key])
                except Exception as error:
                    if passing_fault(error) is None:
                        # The trial has ended without this process, or the value cannot be written.
                        self._deferred.pop(trial_id, None)
                    raise
                del waiting[key]
            self._deferred.pop(trial_id, None)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Write the state of a trial, after all that it said."""
        attempts = 0

        def write() -> bool:
            nonlocal attempts
            self._write_deferred(trial_id)
            attempts += 1
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                stored = RDBStorage.get_trial(self, trial_id)
                given = None if values is None else list(values)
                if attempts > 1 and (stored.state, stored.values) == (state, given):
                    return True
                raise

        return self.until_answered(write)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if template_trial is not None:
            template_trial = copy.copy(template_trial)
            mark = secrets.token_hex(8)
            template_trial.system_attrs = {**template_trial.system_attrs, _ADDED: mark}
        create = super()._create_new_trial
        return self.until_answered(lambda: create(study_id, template_trial))

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: orm.Session
    ) -> models.TrialModel:
        # Called with the study's row locked, at every attempt anew: Optuna makes five by itself.
        mark = None if template_trial is None else template_trial.system_attrs.get(_ADDED)
        if mark in self._added:
            attribute = models.TrialSystemAttributeModel
            query = (
                select(models.TrialModel)
                .join(attribute, attribute.trial_id == models.TrialModel.trial_id)
                .where(models.TrialModel.study_id == study_id)
                .where(attribute.key == _ADDED, attribute.value_json == f'"{mark}"')
            )
            found = session.scalars(query).one_or_none()
            if found is not None:
                return found
        if mark is not None:
            self._added.add(mark)
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def record_heartbeat(self, trial_id: int) -> None:
        """Say once that a trial's process lives, and write what waits to be written of it."""
        super().record_heartbeat(trial_id)
        self._write_deferred(trial_id)

    def silent_trials(self, study_id: int) -> list[int]:
        """Look at the heartbeats of the trials that run, once.

        Optuna is told of no heartbeat: it would judge them by the database's clock.

        Returns:
            The ids of those whose process gave no sign of life for too long.
        """
        trial, beat = models.TrialModel, models.TrialHeartbeatModel
        query = (
            select(beat.trial_id, beat.heartbeat)
            .join(trial, trial.trial_id == beat.trial_id)
            .where(trial.study_id == study_id, trial.state == TrialState.RUNNING)
        )
        with self.engine.connect() as connection:
            beats = {row.trial_id: row.heartbeat for row in connection.execute(query)}
        return self.watch.look(beats)


def _patiently(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def patient(self: PatientStorage, *args: Any, **options: Any) -> Any:
        return self.until_answered(lambda: method(self, *args, **options))

    return patient


for _name in _PATIENT:
    setattr(PatientStorage, _name, _patiently(_name))
