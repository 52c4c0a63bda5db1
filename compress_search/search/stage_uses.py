"""Which trials of which studies use the stages of a workspace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from compress_search.exceptions import StudyError, StudyMismatchError
from compress_search.fingerprint import content_hash
from compress_search.results import ParetoFront
from compress_search.search.candidates import STATES, candidate_of
from compress_search.search.database_url import parse_url, saved_url
from compress_search.search.history import FINALIST_OF, RETRY_OF, STAGES, current_trials
from compress_search.search.identity import Identity, is_foreign, load_identity
from compress_search.search.storage import open_storage
from compress_search.stage_inventory import StageUses, Use
from compress_search.workspace import Workspace, write_json_atomically

_ELSEWHERE = "database.json"
"""File in the folder of a study whose database is not the workspace's."""
_STUDY_FILES = (_ELSEWHERE, "config.yaml", "study.log", "report.html")
"""A folder of the workspace that has one of these is a study's."""
_GOES_ON_FROM = (RETRY_OF, FINALIST_OF)
"""User attributes that name the trial whose stages another one begins with."""
_DAY = 86_400.0


def remember_database(workspace: Workspace, study: str, url: str) -> None:
    """Note in a study's folder that its database is not the workspace's, so that its stages are not pruned.

    Args:
        workspace: Where its stages lie.
        study: Its name.
        url: URL of the database. A password in it is not written down.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        parsed = parsed.set(database=str(Path(parsed.database).absolute()))
    if parsed.database == str(workspace.database.absolute()):
        return
    write_json_atomically(workspace.study_folder(study) / _ELSEWHERE, {"storage": saved_url(parsed)})


def stage_uses(workspace: Workspace, storage: str | None = None) -> StageUses:
    """Find out who uses the stages of a workspace.

    Looked at are the workspace's own database, those that its studies' folders name, and ``storage``.

    Args:
        workspace: The workspace.
        storage: URL of one more database.

    Raises:
        StudyError: ``storage`` cannot be used.
    """
    gaps: list[str] = []
    databases = [*_databases(workspace, storage, gaps)]
    by_key: dict[str, list[Use]] = {}
    begun: list[float] = []
    names = set()
    try:
        for database in databases:
            for name in sorted(optuna.get_all_study_names(database)):
                study = optuna.load_study(study_name=name, storage=database)
                names.add(name)
                if is_foreign(study):
                    continue
                try:
                    identity = load_identity(study)
                except StudyMismatchError as error:
                    gaps.append(str(error))
                    continue
                trials = study.get_trials(deepcopy=False)
                for key, use in _uses_of(name, identity, trials, workspace):
                    by_key.setdefault(key, []).append(use)
                begun += [t.datetime_start.timestamp() for t in _unfinished(trials) if t.datetime_start]
    finally:
        for database in databases:
            database.engine.dispose()
    gaps += _unknown_studies(workspace, names)
    if not databases:
        gaps.append(
            f"There is no database of studies in {str(workspace.root)!r}: name it with --storage URL."
        )
    return StageUses(
        by_key={key: tuple(uses) for key, uses in by_key.items()},
        # A day of margin: Optuna writes local times, and a machine may be in another time zone.
        unfinished_since=min(begun) - _DAY if begun else None,
        gaps=tuple(gaps),
    )


def _databases(workspace: Workspace, storage: str | None, gaps: list[str]) -> Iterator[RDBStorage]:
    opened = set()
    if workspace.database.is_file():
        yield open_storage(None, workspace, must_exist=True)
    if storage is not None:
        opened.add(saved_url(parse_url(storage)))
        yield open_storage(storage, workspace, must_exist=True)
    for folder in _study_folders(workspace):
        file = folder / _ELSEWHERE
        if not file.is_file():
            continue
        url = str(json.loads(file.read_text(encoding="utf-8"))["storage"])
        if url in opened:
            continue
        opened.add(url)
        try:
            yield open_storage(url, workspace, must_exist=True)
        except StudyError as error:
            gaps.append(f"The database of the study {folder.name!r} cannot be read: {error}")


def _uses_of(
    name: str, identity: Identity, trials: Sequence[FrozenTrial], workspace: Workspace
) -> Iterator[tuple[str, Use]]:
    made_from = {key: value for key, value in identity.task.items() if key != "name"}
    original = content_hash(made_from | {"seed": identity.settings.seed})
    yield original, Use(study=name, trial=None, state="original", needed=True)
    settings = identity.settings
    candidates = tuple(candidate_of(trial, workspace, None) for trial in current_trials(trials))
    front = ParetoFront(candidates, identity.reference, settings.target, settings.tolerance).best
    # Where nothing is on the front there is no telling which trials matter: all do.
    needed = {candidate.number for candidate in front} or {trial.number for trial in trials}
    needed |= {trial.number for trial in _unfinished(trials)}
    for trial in trials:
        for stage in trial.user_attrs.get(STAGES, ()):
            yield (
                stage["key"],
                Use(
                    study=name,
                    trial=trial.number,
                    state=STATES[trial.state],
                    needed=trial.number in needed,
                ),
            )


def _unfinished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that run or wait, and those that they go on from."""
    by_number = {trial.number: trial for trial in trials}
    found: dict[int, FrozenTrial] = {}
    ahead = [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    while ahead:
        trial = ahead.pop()
        found[trial.number] = trial
        ahead += [
            by_number[before]
            for before in (trial.user_attrs.get(name) for name in _GOES_ON_FROM)
            if before in by_number and before not in found
        ]
    return [*found.values()]


def _study_folders(workspace: Workspace) -> list[Path]:
    if not workspace.root.is_dir():
        return []
    return [
        path
        for path in sorted(workspace.root.iterdir())
        # Whatever it is called: an earlier version let a study be called as the workspace's own folder.
        if any((path / file).is_file() for file in _STUDY_FILES)
    ]


def _unknown_studies(workspace: Workspace, known: set[str]) -> Iterator[str]:
    for folder in _study_folders(workspace):
        if folder.name not in known:
            yield (
                f"The study {folder.name!r} is in no database that was looked at: name its database with "
                f"--storage URL, or, if it was deleted, remove its folder {str(folder)!r}."
            )
