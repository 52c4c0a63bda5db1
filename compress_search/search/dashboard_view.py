"""A storage as the Optuna dashboard reads it: with what it shows added, and nothing written."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any

import optuna_dashboard._app as dashboard_app
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from compress_search.exceptions import StudyError
from compress_search.results import ParetoFront
from compress_search.search.dashboard_additions import Additions
from compress_search.search.history import RECIPE, STAGES, TRACEBACK

_IN_THE_NOTE = (RECIPE, STAGES, TRACEBACK)
"""User attributes of kilobytes, each of which the dashboard would write on one very long line."""


class DashboardView(_CachedStorage):
    """A storage as optuna-dashboard 0.21 reads it.

    * That dashboard looks for constraints in one list, the trial's system attribute ``constraints``; since
      version 5 Optuna stores each under a key of its own. With both in the database, Optuna would count each
      constraint twice.
    * Notes, plots and the names of files are system attributes too. The view makes them of the trials as
      they are when it is asked: they are never out of date, and do not swell the user's database.
    * A trial's attributes are shown on one line each. Those of kilobytes are left out; the note has them.

    What is written goes to the storage as it is.

    Args:
        storage: The study's storage.
        additions: Makes what is added.
    """

    def __init__(self, storage: RDBStorage, additions: Additions) -> None:
        super().__init__(storage)
        self._additions = additions

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return one trial, with its list of constraints and its files."""
        return self._viewed(super().get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study, each with its list of constraints and its files."""
        trials = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [self._viewed(trial) for trial in trials]

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's system attributes, with its notes, plots and pictures."""
        study = self._study(study_id)
        return super().get_study_system_attrs(study_id) if study is None else self._added_to(study)

    def with_additions(self, study: FrozenStudy) -> FrozenStudy:
        """Return a study with its notes, plots and pictures among its system attributes."""
        viewed = copy.copy(study)
        viewed.system_attrs = self._added_to(study)
        return viewed

    def front_of(self, study_id: int) -> ParetoFront:
        """Read the front of a study.

        Raises:
            StudyError: It is none of this package.
        """
        study = self._study(study_id)
        front = None if study is None else self._additions.front_of(study, self._stored_trials(study_id))
        if front is None:
            raise StudyError(f"Study {study_id} of this database was not made by compress_search.")
        return front

    def _study(self, study_id: int) -> FrozenStudy | None:
        return next((study for study in self.get_all_studies() if study._study_id == study_id), None)

    def _stored_trials(self, study_id: int) -> list[FrozenTrial]:
        return super().get_all_trials(study_id, deepcopy=False)

    def _added_to(self, study: FrozenStudy) -> dict[str, Any]:
        # Nothing is added where the user has written a note.
        added = self._additions.of_study(study, self._stored_trials(study._study_id))
        return {**study.system_attrs, **added}

    def _viewed(self, trial: FrozenTrial) -> FrozenTrial:
        """A copy with what is added, without what its note says better; the storage caches the original."""
        added = self._additions.of_trial(trial)
        kept: dict[str, Any] = trial.system_attrs
        if trial.constraints:
            kept = {key: value for key, value in kept.items() if not key.startswith("constraints")}
            added["constraints"] = list(trial.constraints.values())
        if not added and RECIPE not in trial.user_attrs:
            return trial
        viewed = copy.copy(trial)
        if RECIPE in trial.user_attrs:
            shown = {key: value for key, value in trial.user_attrs.items() if key not in _IN_THE_NOTE}
            viewed.user_attrs = shown
        viewed.system_attrs = kept | added
        return viewed


def _study_with_additions(storage: BaseStorage, study_id: int) -> FrozenStudy | None:
    study: FrozenStudy | None = _stored_study(storage, study_id)
    return storage.with_additions(study) if study and isinstance(storage, DashboardView) else study


def _best_feasible(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    feasible = [trial for trial in trials if all(value <= 0 for value in trial.constraints.values())]
    best: list[FrozenTrial] = _best_of_all(feasible, directions)
    return best


def _plots_in_order(system_attributes: dict[str, Any]) -> dict[str, str]:
    return dict(sorted(_plots_in_any_order(system_attributes).items()))


# Only the page of one study has additions: making them for all of a database would take long.
_stored_study, dashboard_app.get_study = dashboard_app.get_study, _study_with_additions
# The dashboard marks as best what no trial dominates, whether or not that trial is feasible.
_best_of_all, dashboard_app.get_pareto_front_trials = dashboard_app.get_pareto_front_trials, _best_feasible
# It would show them in another order each time that it is started.
_plots_in_any_order = dashboard_app.get_plotly_graph_objects
dashboard_app.get_plotly_graph_objects = _plots_in_order
