"""What the dashboard shows beside what is stored: notes, plots and files, as the attributes that it reads.

They are made of the trials as they are when a page asks, which every open page does every few seconds. What
has been made is kept until something that it depends on changes.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial

from compress_search.exceptions import PlanError, StudyMismatchError
from compress_search.plan import CompressionPlan
from compress_search.reports.layers import LayerRow
from compress_search.results import Candidate, ParetoFront, Reference
from compress_search.search.candidates import candidate_of
from compress_search.search.dashboard_files import files_of_study, files_of_trial, last_stage
from compress_search.search.history import DUPLICATE_OF, FINALIST_OF, RETRY_OF, STAGES, current_trials
from compress_search.search.identity import Identity, is_foreign, load_identity
from compress_search.search.layer_tables import LayerTables
from compress_search.search.study_plots import study_plots
from compress_search.search.trial_history import trial_history
from compress_search.search.trial_note import study_note, trial_note
from compress_search.stage_files import PLAN
from compress_search.workspace import Workspace

logger = logging.getLogger("compress_search")

PLOT = "dashboard:plot_data:{name}:0"
"""System attribute of a study: a plotly figure as JSON, in one piece."""

Attributes = dict[str, str | int]


@dataclass
class _Note:
    """A note, with what it depends on and how often it has changed."""

    depends_on: object
    version: int
    text: str


@dataclass
class _Made:
    """What was made for one study, and how its trials were then."""

    trials: object = None
    front: ParetoFront | None = None
    rows: Sequence[LayerRow] | None = None
    attributes: Attributes = field(default_factory=dict)
    notes: dict[int | None, _Note] = field(default_factory=dict)


class Additions:
    """Makes what the dashboard shows beside what is stored.

    Args:
        workspace: Where stages lie.
        layers: Makes the tables of layers.
    """

    def __init__(self, workspace: Workspace, layers: LayerTables) -> None:
        self._workspace = workspace
        self._layers = layers
        self._lock = threading.Lock()
        self._made: dict[int, _Made] = {}
        self._faulty: set[int] = set()

    def of_trial(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the system attributes to add to a trial's own: its files."""
        return dict(files_of_trial(trial, self._workspace.stages))

    def of_study(self, study: FrozenStudy, trials: Sequence[FrozenTrial]) -> Attributes:
        """Return the system attributes to add to a study's own: notes, plots, pictures.

        A study of another program gets none.

        Args:
            study: Any study of the database.
            trials: All its trials.
        """
        try:
            # Several pages may ask at the same time, and each thing is made once.
            with self._lock:
                made = self._make(study, trials)
        except Exception as error:
            # A single odd trial must not take the whole dashboard from the user.
            if study._study_id not in self._faulty:
                logger.warning(
                    "The dashboard shows %s without notes and plots: %s", study.study_name, repr(error)
                )
            self._faulty.add(study._study_id)
            return {}
        return {} if made is None else {**made.attributes, **_notes_unless_written(made, study.system_attrs)}

    def front_of(self, study: FrozenStudy, trials: Sequence[FrozenTrial]) -> ParetoFront | None:
        """Return the front of a study; ``None`` for one of another program."""
        identity = _identity_of(study)
        return None if identity is None else self._front(identity, trials)

    def _make(self, study: FrozenStudy, trials: Sequence[FrozenTrial]) -> _Made | None:
        identity = _identity_of(study)
        if identity is None:
            return None
        made = self._made.setdefault(study._study_id, _Made())
        now = [(t._trial_id, t.state, len(t.user_attrs.get(STAGES, ()))) for t in trials]
        if made.front is None or made.trials != now:
            made.front, made.trials, made.rows = self._front(identity, trials), now, None
            _put(made.notes, None, now, study_note(made.front, name=study.study_name))
        chosen = made.front.most_accurate
        rows = () if chosen is None else self._rows_of(chosen)
        if made.rows != rows:
            made.rows = rows
            plots = study_plots(made.front, chosen=chosen, layers=rows)
            made.attributes = {PLOT.format(name=name): plot for name, plot in plots.items()}
            made.attributes |= files_of_study(study._study_id)
        self._make_notes(made, made.front, study.study_name, trials)
        return made

    def _front(self, identity: Identity, trials: Sequence[FrozenTrial]) -> ParetoFront:
        candidates = tuple(candidate_of(trial, self._workspace, None) for trial in current_trials(trials))
        settings = identity.settings
        return ParetoFront(candidates, identity.reference, settings.target, settings.tolerance)

    def _rows_of(self, candidate: Candidate) -> Sequence[LayerRow]:
        folder = candidate.folder
        return () if folder is None or not folder.is_dir() else self._layers.ready(folder) or ()

    def _make_notes(self, made: _Made, front: ParetoFront, study: str, trials: Sequence[FrozenTrial]) -> None:
        naming = _naming(trials)
        best = {candidate.number for candidate in front.best}
        for trial in trials:
            folder = last_stage(trial, self._workspace.stages)
            # Those that may be shipped: making the table of every trial would take minutes.
            rows = None if folder is None or trial.number not in best else self._layers.ready(folder)
            stages = len(trial.user_attrs.get(STAGES, ()))
            depends_on = (trial.state, stages, tuple(naming[trial.number]), folder, rows is not None)
            kept = made.notes.get(trial._trial_id)
            # How long a running one has been silent, nothing in the storage says.
            if kept is None or kept.depends_on != depends_on or not trial.state.is_finished():
                text = self._note_of(trial, trials, study, front.reference, folder, rows)
                _put(made.notes, trial._trial_id, depends_on, text)

    def _note_of(
        self,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        study: str,
        reference: Reference,
        folder: Path | None,
        rows: Sequence[LayerRow] | None,
    ) -> str:
        return trial_note(
            trial_history(trials, trial.number, study=study, stages=self._workspace.stages),
            reference=reference,
            folder=folder,
            plan=None if folder is None else _plan_in(folder),
            layers=rows,
        )


def _identity_of(study: FrozenStudy) -> Identity | None:
    if is_foreign(study):
        return None
    try:
        return load_identity(study)
    except StudyMismatchError:
        return None


def _naming(trials: Sequence[FrozenTrial]) -> Mapping[int, list[tuple[int, bool]]]:
    """For each trial those that stand in for it or train it on, of which its note tells."""
    naming = defaultdict(list)
    for trial in trials:
        for attribute in (RETRY_OF, FINALIST_OF):
            if attribute in trial.user_attrs:
                naming[trial.user_attrs[attribute]].append((trial.number, DUPLICATE_OF in trial.user_attrs))
    return naming


def _plan_in(folder: Path) -> CompressionPlan | None:
    try:
        return CompressionPlan.load(folder / PLAN)
    except PlanError:
        return None


def _put(notes: dict[int | None, _Note], trial_id: int | None, depends_on: object, text: str) -> None:
    kept = notes.get(trial_id)
    if kept is None:
        notes[trial_id] = _Note(depends_on, 1, text)
    else:
        kept.version += kept.text != text
        kept.depends_on, kept.text = depends_on, text


def _notes_unless_written(made: _Made, stored: Mapping[str, object]) -> Attributes:
    """The notes in the dashboard's form, without those in whose place the user has written another."""
    attributes: Attributes = {}
    for trial_id, note in made.notes.items():
        prefix = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
        version = stored.get(f"{prefix}note_ver", 0)
        # One that the user has emptied comes back, under the number that saving the next one goes by.
        if not isinstance(version, int) or (version and stored.get(f"{prefix}note_str:0")):
            continue
        attributes[f"{prefix}note_ver"] = max(version, note.version)
        attributes[f"{prefix}note_str:0"] = note.text
    return attributes
