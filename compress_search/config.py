"""StudyConfig: one YAML file says what a study is. It is read, checked as a whole, and saved resolved.

Example::

    # compress-search run configs/digits.yaml
    name: digits
    task: ../studies/digits.py:task
    target: 0.5
    n_trials: 12
    fine_tune: {epochs: 4, lr: 0.02}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from compress_search.device import choose_device
from compress_search.exceptions import ConfigError, DeviceError, StudyError, TaskError
from compress_search.search.database_url import parse_url, saved_url
from compress_search.search.settings import TUNINGS, SearchSettings, searchable
from compress_search.search.stop_when import StopWhen
from compress_search.search.study import check_name
from compress_search.search.variables import Choice, Range
from compress_search.task import Task
from compress_search.task_path import load_task, resolve_task_path
from compress_search.training.trainer import CHECKPOINT_SECONDS
from compress_search.workspace import default_workspace, write_text_atomically
from compress_search.yaml_settings import apply_overrides, build, converted, parse_yaml, unknown_keys

T = TypeVar("T")

_SEARCH_KEYS = tuple(item.name for item in dataclasses.fields(SearchSettings))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything that a command line study is made of.

    In the YAML file the fields of ``search`` stand beside the others, at the top level. What is to be
    searched stands in the place of a value, ``fine_tune: {lr: {low: 1e-4, high: 1e-1, log: true}}``, or in
    ``variables`` under its name, ``fine_tune.lr``. ``presets`` holds values that take the place of others
    where one is asked for: ``presets: {smoke: {n_trials: 2, fine_tune: {epochs: 1}}}``.

    Attributes:
        name: What the study is called in the workspace and in the dashboard.
        task: ``path/to/file.py:function`` (in the YAML file, relative to that file's folder) or
            ``package.module:function``. The function returns a :class:`~compress_search.task.Task`.
        search: How to search.
        task_args: Keyword arguments of the task function.
        n_trials: Total number of finished trials that the study is to have.
        stop_when: Ends the study before it has them, as soon as a candidate is good enough: for example
            ``{max_drop: 0.01, mac_ratio: 0.5}``; ``None`` for never.
        max_drop: The largest drop of accuracy that the chosen model may have (0.01 is one point);
            ``None`` chooses the most accurate one.
        workspace: Folder of the results, relative to the current one; by default
            ``$COMPRESS_SEARCH_WORKSPACE``, else ``runs``.
        storage: URL of the database of the study; ``None`` is a SQLite file in the workspace. A password
            in it is not saved: it is then taken from ``$COMPRESS_SEARCH_DB_PASSWORD``.
        checkpoint_seconds: A fine-tuning leaves a checkpoint so often, and after each epoch.
        device: Where to compute, for example ``"cpu"`` or ``"cuda:1"``; ``None`` takes the first GPU
            if there is one.
    """

    name: str
    task: str
    search: SearchSettings
    task_args: Mapping[str, Any] = field(default_factory=dict)
    n_trials: int = 20
    stop_when: StopWhen | None = None
    max_drop: float | None = None
    workspace: Path = field(default_factory=default_workspace)
    storage: str | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    device: str | None = None

    def __post_init__(self) -> None:
        faults = [*_faults_of(check_name, self.name), *_faults_of(choose_device, self.device)]
        if self.n_trials < 1:
            faults.append(f"n_trials is {self.n_trials!r}; it must be 1 or more.")
        if not 0 < self.checkpoint_seconds < math.inf:
            faults.append(f"checkpoint_seconds is {self.checkpoint_seconds!r}; it must be positive.")
        if self.max_drop is not None and not math.isfinite(self.max_drop):
            faults.append(f"max_drop is {self.max_drop!r}; it must be a number (0.01 is one point), or null.")
        if self.stop_when is not None:
            try:
                self.stop_when.check(self.search)
            except ConfigError as error:
                faults += error.faults
        if faults:
            raise ConfigError(faults)

    @classmethod
    def load(
        cls, path: Path | str, overrides: Sequence[str] = (), *, preset: str | None = None
    ) -> StudyConfig:
        """Read a configuration and check all of it, the task's file included.

        Args:
            path: The YAML file.
            overrides: Such as ``"target=0.4"`` or ``"fine_tune.epochs=3"``, stronger than the file.
            preset: A name below ``presets`` in the file, whose values are stronger than those outside;
                ``None`` for these alone.

        Raises:
            ConfigError: The file cannot be read, or is wrong; every fault is in the message.
        """
        path = Path(path)
        values = _read(path)
        faults = _choose_preset(values, preset)
        faults += apply_overrides(values, overrides)
        own = {item.name for item in dataclasses.fields(cls)} - {"search"}
        faults += unknown_keys(values, {*own, *_SEARCH_KEYS})
        faults += _gather_variables(values)
        _inherit_fine_tune(values)
        faults += _resolve_places(values, path.parent)
        search = build(
            SearchSettings,
            {key: values[key] for key in _SEARCH_KEYS if key in values},
            faults,
            stand_in={"target": 0.5},
        )
        config = build(
            cls,
            {key: values[key] for key in own if key in values} | {"search": search},
            faults,
            stand_in={"name": "unnamed", "task": "module:function", "search": search},
        )
        if faults:
            raise ConfigError(faults, source=str(path))
        return dataclasses.replace(config, workspace=config.workspace.resolve())

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as the YAML file has it, with every default but no password."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        search = values.pop("search").to_dict()
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in {
                **values,
                # A password is nothing to write down: whoever resumes the study has it in the environment.
                "storage": None if self.storage is None else saved_url(parse_url(self.storage)),
                "task_args": dict(self.task_args),
                "stop_when": None if self.stop_when is None else dataclasses.asdict(self.stop_when),
                "workspace": str(self.workspace),
                **search,
            }.items()
        }

    def save(self, path: Path) -> None:
        """Write the configuration so that :meth:`load` reads the same from any folder, but for a password."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        write_text_atomically(path, f"# compress-search resume {path.parent}\n{text}")

    def load_task(self) -> Task:
        """Make the study's task.

        Raises:
            TaskError: See :func:`compress_search.task_path.load_task`.
        """
        return load_task(self.task, self.task_args)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"The file cannot be read: {error}. `compress-search configs ls` lists the shipped ones."],
            source=str(path),
        ) from error
    values = parse_yaml(text, source=str(path))
    if not isinstance(values, dict):
        raise ConfigError([f"It holds {values!r:.40}; it must hold lines of key: value."], source=str(path))
    return values


def _choose_preset(values: dict[str, Any], preset: str | None) -> list[str]:
    """Let the values of a preset take the place of those outside, in place; return what is wrong."""
    presets = values.pop("presets", {})
    if not isinstance(presets, dict) or not all(isinstance(chosen, dict) for chosen in presets.values()):
        return [f"presets is {presets!r:.60}; it must hold a mapping of values for each name, {{}} for none."]
    if preset is None:
        return []
    if preset not in presets:
        return [f"There is no preset {preset!r}. The file has: {', '.join(presets) or 'none'}."]
    _merge(values, presets[preset])
    return []


def _merge(values: dict[str, Any], stronger: Mapping[str, Any]) -> None:
    for key, value in stronger.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _faults_of(check: Callable[[T], object], value: T) -> list[str]:
    try:
        check(value)
    except (StudyError, DeviceError) as error:
        return [str(error)]
    return []


def _gather_variables(values: dict[str, Any]) -> list[str]:
    """Move what is to be searched from where the value would stand into ``variables``, in place.

    Returns:
        What is wrong with the variables.
    """
    found = {name: values.pop(name) for name in searchable() if isinstance(values.get(name), dict)}
    for group in TUNINGS:
        tuning = values.get(group)
        if not isinstance(tuning, dict):
            continue
        # The options of a training function are a mapping of their own; what it holds is not looked at.
        for key in [key for key, value in tuning.items() if isinstance(value, dict) and key != "options"]:
            found[f"{group}.{key}"] = tuning.pop(key)
        if not tuning:
            # Then no value of its own is left, and the rest is as if it had not been mentioned.
            del values[group]
    named = values.get("variables", {})
    if not isinstance(named, dict):
        return []
    faults = [
        f"{name} has what it is searched over twice, there and in variables. Remove one."
        for name in found
        if name in named
    ]
    variables = {}
    for name, value in {**named, **found}.items():
        try:
            variables[str(name)] = converted(value, Range | Choice, str(name))
        except ConfigError as error:
            faults += error.faults
    if variables:
        values["variables"] = variables
    else:
        values.pop("variables", None)
    return faults


def _inherit_fine_tune(values: dict[str, Any]) -> None:
    """What ``final_fine_tune`` and ``per_layer_fine_tune`` do not say is as in ``fine_tune``."""
    first = values.get("fine_tune")
    for name in ("final_fine_tune", "per_layer_fine_tune"):
        other = values.get(name)
        if isinstance(first, dict) and isinstance(other, dict):
            values[name] = first | other


def _resolve_places(values: dict[str, Any], folder: Path) -> list[str]:
    """Make the task's file and a SQLite file absolute, in place; return what is wrong with them."""
    faults = []
    task, storage = values.get("task"), values.get("storage")
    if isinstance(task, str):
        try:
            values["task"] = resolve_task_path(task, folder)
        except TaskError as error:
            faults.append(str(error))
    if isinstance(storage, str):
        try:
            values["storage"] = _absolute_sqlite(storage)
        except StudyError as error:
            faults.append(str(error))
    return faults


def _absolute_sqlite(storage: str) -> str:
    url = parse_url(storage)
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return storage
    assert url.database is not None
    return url.set(database=str(Path(url.database).resolve())).render_as_string(hide_password=False)
