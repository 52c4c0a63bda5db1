"""What makes a stored study this study: compared before anything is added to it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy

from compress_search.exceptions import ConfigError, StudyMismatchError
from compress_search.results import Reference
from compress_search.search.settings import SearchSettings

logger = logging.getLogger("compress_search")

_ATTRIBUTE = "compress_search"
DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
_PACKAGES = ("compress-search", "optuna", "torch")


@dataclass(frozen=True)
class Identity:
    """What is stored of a study beside its trials.

    Attributes:
        task: The task's name, fingerprints of its model and data, names of its functions.
        settings: How it searches.
        reference: The original model's numbers, measured when the study was created.
        versions: Of the packages that created it.
    """

    task: Mapping[str, Any]
    settings: SearchSettings
    reference: Reference
    versions: Mapping[str, str]

    def save(self, study: optuna.Study) -> None:
        """Write it into a new study, in one piece."""
        value = {
            "task": dict(self.task),
            "settings": self.settings.to_dict(),
            "reference": dataclasses.asdict(self.reference),
            "versions": dict(self.versions),
        }
        study.set_user_attr(_ATTRIBUTE, value)


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
        )
    except (ConfigError, KeyError, TypeError) as error:
        made_by = stored.get("versions", {}).get("compress-search", "an unknown version")
        raise StudyMismatchError(
            f"The study {name!r} was made by compress_search {made_by}, whose settings this version cannot "
            f"read ({type(error).__name__}: {error}). Use that version, or choose another name."
        ) from error


def check_same(
    study: optuna.Study, *, task: Mapping[str, Any], settings: SearchSettings | None = None
) -> Identity:
    """Make sure that a stored study is the one that is asked for.

    Args:
        study: The stored study.
        task: As in :class:`Identity`.
        settings: The settings asked for; ``None`` takes the stored ones.

    Returns:
        What is stored.

    Raises:
        StudyMismatchError: With every field that differs, both values, and the remedy.
    """
    stored = load_identity(study)
    differences = list(_differences(stored.task, task, "task"))
    if settings is not None:
        differences += _differences(stored.settings.to_dict(), settings.to_dict())
    if differences:
        name = study.study_name
        raise StudyMismatchError(
            f"The study {name!r} exists, and was made with other settings:\n"
            + "\n".join(differences)
            + f"\nTo continue it, ask for the stored values. {_another_name(name)}"
        )
    for package, version in current_versions().items():
        if stored.versions.get(package) != version:
            logger.warning(
                "The study %s was made with %s %s; it goes on with %s.",
                study.study_name,
                package,
                stored.versions.get(package),
                version,
            )
    return stored


def current_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {package: metadata.version(package) for package in _PACKAGES}


def _another_name(name: str) -> str:
    return (
        f"For a study of its own choose another name: name={name}-2 on the command line, "
        f'create_study("{name}-2", ...) in Python.'
    )


def _differences(stored: Any, asked: Any, field: str = "") -> Iterator[str]:
    """Name the fields that differ, nested ones with dots: ``fine_tune.epochs``."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for key in {**stored, **asked}:
            name = f"{field}.{key}" if field else str(key)
            yield from _differences(stored.get(key, "nothing"), asked.get(key, "nothing"), name)
    elif stored != asked:
        yield f"  - {field}: stored {stored!r}, asked {asked!r}"
