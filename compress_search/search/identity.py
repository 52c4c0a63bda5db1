"""What makes a stored study this study: compared before anything is added to it."""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from compress_search.exceptions import ConfigError, StudyMismatchError
from compress_search.results import Reference
from compress_search.search.changes import WORKSPACE, Change, Difference, differences
from compress_search.search.claims import claiming
from compress_search.search.settings import SearchSettings
from compress_search.search.storage import backend_of
from compress_search.workspace import Workspace

logger = logging.getLogger("compress_search")

_ATTRIBUTE = "compress_search"
DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
_PACKAGES = ("compress-search", "optuna", "torch", "torch-pruning", "numpy", "scipy")
"""What trials and their results depend on. What the task needs beside them shows in its model and data."""


@dataclass(frozen=True)
class Identity:
    """What is stored of a study beside its trials.

    Attributes:
        task: The task's name, fingerprints of its model and data, names of its functions.
        settings: How it searches.
        reference: The original model's numbers, measured when the study was created.
        versions: Of the packages that work on it.
        workspaces: The folders that it is worked on in, by their tokens.
        changes: What was accepted, in order. The fields above are as they are since then.
    """

    task: Mapping[str, Any]
    settings: SearchSettings
    reference: Reference
    versions: Mapping[str, str]
    workspaces: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()

    @property
    def size(self) -> Mapping[str, int]:
        """MACs and parameters of the original model."""
        return {"macs": self.reference.macs, "params": self.reference.params}

    def save(self, study: optuna.Study) -> None:
        """Write it into a study, in one piece."""
        value = {
            "task": dict(self.task),
            "settings": self.settings.to_dict(),
            "reference": dataclasses.asdict(self.reference),
            "versions": dict(self.versions),
            "workspaces": dict(self.workspaces),
            "changes": [dataclasses.asdict(change) for change in self.changes],
        }
        study.set_user_attr(_ATTRIBUTE, value)


_SAME_FOLDER = (
    "The stages, checkpoints and models of the study are in another folder, which all its processes need: "
    "mount it here, and name it with --workspace DIR on the command line, workspace=... in Python."
)


def is_blank(study: optuna.Study) -> bool:
    """Whether a process created the study and was killed before it could say what it is."""
    return study.directions == DIRECTIONS and not study.user_attrs and not study.get_trials(deepcopy=False)


def is_foreign(study: optuna.Study | FrozenStudy) -> bool:
    """Whether a study was not made by compress_search, and has no stages."""
    return study.directions != DIRECTIONS or _ATTRIBUTE not in study.user_attrs


def load_identity(study: optuna.Study | FrozenStudy) -> Identity:
    """Read what a study is.

    Raises:
        StudyMismatchError: It is not a study of compress_search, or of a version that this one cannot read.
    """
    name = study.study_name
    remedy = _another_name(name)
    if study.directions != DIRECTIONS:
        wanted, found = (", ".join(d.name.lower() for d in ds) for ds in (DIRECTIONS, study.directions))
        raise StudyMismatchError(
            f"The study {name!r} of this database has other directions:\n"
            f"  - directions: stored {found}; wanted {wanted}\n{remedy}"
        )
    stored = study.user_attrs.get(_ATTRIBUTE)
    if stored is None:
        raise StudyMismatchError(
            f"The study {name!r} of this database was not made by compress_search. {remedy}"
        )
    try:
        return Identity(
            task=stored["task"],
            settings=SearchSettings.from_dict(stored["settings"]),
            reference=Reference(**stored["reference"]),
            versions=stored["versions"],
            # Studies that are older than these do not have them.
            workspaces=stored.get("workspaces", {}),
            changes=tuple(Change(**change) for change in stored.get("changes", ())),
        )
    except (ConfigError, KeyError, TypeError) as error:
        made_by = stored.get("versions", {}).get("compress-search", "an unknown version")
        raise StudyMismatchError(
            f"The study {name!r} was made by compress_search {made_by}, whose settings this version cannot "
            f"read ({type(error).__name__}: {error}). Use that version, or choose another name."
        ) from error


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a process asks of a stored study. What is ``None`` is not compared.

    Attributes:
        task: As in :class:`Identity`.
        settings: The settings asked for.
        versions: Of the packages that the process has.
        workspace: Where it works.
        size: Counts the MACs and parameters of the task's model.
        measure: Measures the original model.
    """

    task: Mapping[str, Any] | None = None
    settings: SearchSettings | None = None
    versions: Mapping[str, str] | None = None
    workspace: Workspace | None = None
    size: Callable[[], Mapping[str, int]] = dict
    measure: Callable[[], Reference] | None = None


def agree(study: optuna.Study, asked: Asked, *, accept: bool = False) -> Identity:
    """Make sure that a stored study is the one that is asked for, or go on with what has changed.

    What an older version did not store of a study, such as its workspace, is taken as it is now.

    Args:
        study: The stored study.
        asked: What is asked for.
        accept: Accept what differs, and note it in the study.

    Returns:
        What is stored.

    Raises:
        StudyMismatchError: With every field that differs, both values, and the remedy.
    """
    stored = load_identity(study)
    found = _accepted(study, stored, asked, accept=accept)
    if not found and not _is_news(stored, asked):
        return stored
    if asked.measure is not None and any(difference.field.startswith("task.") for difference in found):
        # It may take minutes, in which nobody is to wait for the lock.
        asked.measure()

    def note() -> Identity:
        # Two processes that note at the same time would both write what they read before.
        with claiming(study):
            before = load_identity(study)
            found = _accepted(study, before, asked, accept=accept)
            noted = _noted(before, asked, found, study.get_trials(deepcopy=False))
            noted.save(study)
            return noted

    noted = backend_of(study).until_answered(note)
    for change in noted.changes[len(stored.changes) :]:
        logger.warning("The study %s goes on with what has changed. %s.", study.study_name, change)
    return noted


def check_place(study: optuna.Study, workspace: Workspace) -> None:
    """Refuse a folder in which none of a study's files can be.

    Raises:
        StudyMismatchError: It is not a workspace of the study.
    """
    for other in _elsewhere(load_identity(study), workspace):
        raise StudyMismatchError(
            f"This is not the workspace of the study {study.study_name!r}:\n  - {other}\n{_SAME_FOLDER}"
        )


def _accepted(study: optuna.Study, stored: Identity, asked: Asked, *, accept: bool) -> list[Difference]:
    """Find what differs, and refuse what is not accepted."""
    found = _differences(stored, asked)
    if found and (not accept or any(difference.why_never for difference in found)):
        raise StudyMismatchError(_refusal(study.study_name, found, accept=accept))
    return found


def _differences(stored: Identity, asked: Asked) -> list[Difference]:
    found: list[Difference] = []
    if asked.task is not None:
        found += differences(stored.task, asked.task, "task")
        if stored.task.get("model") != asked.task.get("model"):
            found += differences(stored.size, asked.size(), "reference")
    if asked.settings is not None:
        found += differences(stored.settings.to_dict(), asked.settings.to_dict())
    if asked.versions is not None:
        # A study that is older than the record of a package says nothing of it.
        names = stored.versions.keys() & asked.versions
        found += [
            one
            for name in sorted(names)
            for one in differences(stored.versions[name], asked.versions[name], f"versions.{name}")
            if _public(stored.versions[name]) != _public(asked.versions[name])
        ]
    if asked.workspace is not None:
        found += _elsewhere(stored, asked.workspace)
    return found


def _elsewhere(stored: Identity, workspace: Workspace) -> list[Difference]:
    token = workspace.token
    if not stored.workspaces or token in stored.workspaces:
        return []
    folders = ", ".join(_shown_workspace(*item) for item in stored.workspaces.items())
    return [Difference(WORKSPACE, folders, _shown_workspace(token, _place_of(workspace)))]


def _public(version: str) -> str:
    # What follows the plus says for which hardware a package was built: machines of one study may differ.
    return version.partition("+")[0]


def _is_news(stored: Identity, asked: Asked) -> bool:
    """Whether the study has not said before what it would now."""
    versions = asked.versions or {}
    return (asked.workspace is not None and not stored.workspaces) or bool(versions.keys() - stored.versions)


def _noted(
    stored: Identity, asked: Asked, found: Sequence[Difference], trials: Sequence[FrozenTrial]
) -> Identity:
    """Return what is to be stored once what differs is accepted."""
    changed = dataclasses.replace(
        stored,
        task=stored.task if asked.task is None else asked.task,
        settings=asked.settings or stored.settings,
        versions={**stored.versions, **(asked.versions or {})},
    )
    if asked.measure is not None and changed.task != stored.task:
        reference = asked.measure()
        old, new = (dataclasses.asdict(one) for one in (stored.reference, reference))
        found = [*found, *differences(old, new, "reference")]
        changed = dataclasses.replace(changed, reference=reference)
    if asked.workspace is not None:
        place = {asked.workspace.make_token(): _place_of(asked.workspace)}
        changed = dataclasses.replace(changed, workspaces={**place, **stored.workspaces})
    waiting = (trial.number for trial in trials if trial.state == TrialState.WAITING)
    first = min(waiting, default=len(trials))
    more = (Change(one.field, one.stored, one.asked, first) for one in found)
    return dataclasses.replace(changed, changes=(*stored.changes, *more))


def _place_of(workspace: Workspace) -> str:
    return f"{workspace.root.absolute()} on {socket.gethostname()}"


def _shown_workspace(token: str | None, place: str) -> str:
    return f"{place} (token {token or 'missing'})"


def _refusal(name: str, found: Sequence[Difference], *, accept: bool) -> str:
    lines = [
        f"The study {name!r} exists, and is not what is asked for:",
        *(f"  - {difference}" for difference in found),
    ]
    if any(difference.field == WORKSPACE for difference in found):
        lines.append(_SAME_FOLDER)
    never: dict[str, list[str]] = {}
    for difference in found:
        if difference.why_never is not None:
            never.setdefault(difference.why_never, []).append(difference.field)
    if never:
        lines += [f"{' and '.join(fields)} cannot be accepted: {why}." for why, fields in never.items()]
    elif not accept:
        lines.append(
            "To go on with what is asked now, and have it noted in the study from which trial on: "
            "--accept-changed (of run, resume, worker and finalize), accept_changed=True in Python."
        )
    lines.append(f"To continue it as it was, ask for the stored values. {_another_name(name)}")
    return "\n".join(lines)


def current_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {package: metadata.version(package) for package in _PACKAGES}


def _another_name(name: str) -> str:
    return (
        f"For a study of its own choose another name: name={name}-2 on the command line, "
        f'create_study("{name}-2", ...) in Python.'
    )
