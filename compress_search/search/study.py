"""Studies are created, continued and loaded here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import optuna
import torch
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import RDBStorage
from torch import nn

from compress_search.device import choose_device
from compress_search.exceptions import ConfigError, StudyError
from compress_search.methods.ignored_layers import layers_matching
from compress_search.methods.kept_channels import channels_to_keep
from compress_search.profile import ModelProfile, profile_model
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.search.compression_study import CompressionStudy, TestScore
from compress_search.search.identity import (
    DIRECTIONS,
    Asked,
    Identity,
    agree,
    current_versions,
    is_blank,
    load_identity,
)
from compress_search.search.manual_shares import check_manual_shares
from compress_search.search.objective import METRICS
from compress_search.search.settings import SearchSettings
from compress_search.search.stage_uses import remember_database
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.search.variables import Choice, Range
from compress_search.selection.manual import check_share_names
from compress_search.stages import StageRunner
from compress_search.task import Task
from compress_search.training.readiness import check_training
from compress_search.workspace import INTERNAL_NAMES, Workspace

__all__ = ["CompressionStudy", "TestScore", "create_study", "load_study"]

_LONGEST_NAME = 200
"""File systems take 255 bytes."""


def create_study(
    name: str,
    task: Task,
    *,
    target: float | tuple[float, float],
    tolerance: float = 0.02,
    methods: tuple[str, ...] = ("spatial_svd", "channel_pruning"),
    selection: str = "optimal",
    least_share: float = 0.0,
    shares: Mapping[str, float] | None = None,
    samples: int = 512,
    sensitivity: str = "divergence",
    scoring_samples: int = 128,
    probes: int = 3,
    on_cell_error: str = "stop",
    ignore: tuple[str, ...] = (),
    round_to: int = 1,
    keep_channels: Mapping[str, tuple[int, ...]] | None = None,
    per_layer_fine_tune: FineTune | None = None,
    fine_tune: FineTune | None = None,
    final_fine_tune: FineTune | None = None,
    variables: Mapping[str, Range | Choice] | None = None,
    step: float = 0.05,
    max_drop_after_ssvd: float | None = None,
    median_stopping: bool = False,
    sampler: str = "tpe",
    grid: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    workspace: str | Path = "runs",
    storage: str | None = None,
    device: str | None = None,
    accept_changed: bool = False,
) -> CompressionStudy:
    """Create a study, or continue the one of that name if everything agrees.

    The task is checked and the original model evaluated before anything is stored. The search itself is
    described by :class:`~compress_search.search.settings.SearchSettings`, whose fields are spelt out here.

    Args:
        name: Letters, digits and ``. _ -``.
        task: The model, its data and how to judge it.
        target: MACs to keep / MACs of the original model, in (0, 1); or the lowest and the highest of a
            range, for the whole front between them.
        tolerance: See :class:`~compress_search.search.settings.SearchSettings`; the others too.
        methods: The compression methods, in order.
        selection: How each layer's size is chosen.
        least_share: Every layer keeps at least this share of what it costs.
        shares: For the ``manual`` selection: shares by layer name or pattern.
        samples: Number of unlabelled calibration examples.
        sensitivity: What sensitivity tables measure, ``"divergence"`` or ``"score"``.
        scoring_samples: Number of calibration examples that the divergence is measured on.
        probes: At how many sizes of each layer the divergence is measured; the others follow from the error
            of the layer itself.
        on_cell_error: What to do when the score fails at one cell of a table: ``"stop"`` or ``"skip"``.
        ignore: Names or patterns of layers to leave alone.
        round_to: Ranks and channels are multiples of this.
        keep_channels: Indices of output channels that no pruning removes, by layer name.
        per_layer_fine_tune: The fine-tuning after each single layer, or group of coupled channels; ``None``
            compresses all layers of a method at once.
        fine_tune: The fine-tuning after each method but the last; ``None`` is the default one.
        final_fine_tune: The last fine-tuning of a trial; ``None`` is as ``fine_tune``.
        variables: Settings for which every trial chooses a value, by name:
            ``{"fine_tune.lr": Range(1e-4, 1e-1, log=True), "selection": Choice(("optimal", "uniform"))}``.
        step: Step of the grid of the first method's ratio.
        max_drop_after_ssvd: Largest drop of accuracy half-way.
        median_stopping: Whether trials that are behind half of the others after an epoch are given up.
        sampler: How points are proposed.
        grid: For the ``"grid"`` sampler: the ratios to try, ``{"c_ssvd": [0.9, 0.8, 0.7]}``, with or without
            those of the last method.
        seed: Fixes all that is random.
        workspace: Folder of the results.
        storage: URL of the database; ``None`` is a SQLite file in the workspace.
        device: For example ``"cpu"`` or ``"cuda:1"``; ``None`` takes the first GPU if there is one.
        accept_changed: Continue a study although its task, versions of packages, workspace or settings are
            others than before; what differs is noted in the study. What trials are judged by and the search
            space must be the same in any case.

    Raises:
        ConfigError: Settings are out of range; all faults are in the message.
        TaskError: The task cannot be used.
        ModelError: ``ignore``, ``shares`` or ``keep_channels`` names a layer or channel that the model does
            not have.
        WorkspaceError: The workspace cannot be written.
        StudyMismatchError: A study of that name was made with other settings, or by another program.
        StudyError: The name or the database cannot be used.
        DeviceError: This machine has no such device.
    """
    check_name(name)
    tunings = {
        "fine_tune": fine_tune,
        "final_fine_tune": final_fine_tune,
        "per_layer_fine_tune": per_layer_fine_tune,
    }
    if faults := _argument_faults({"methods": methods, "ignore": ignore}, tunings):
        raise ConfigError(faults, source="create_study")
    settings = SearchSettings(
        target=target,
        tolerance=tolerance,
        methods=tuple(methods),
        selection=selection,
        least_share=least_share,
        shares={} if shares is None else shares,
        samples=samples,
        sensitivity=sensitivity,
        scoring_samples=scoring_samples,
        probes=probes,
        on_cell_error=on_cell_error,
        ignore=tuple(ignore),
        round_to=round_to,
        keep_channels={} if keep_channels is None else keep_channels,
        per_layer_fine_tune=per_layer_fine_tune,
        fine_tune=fine_tune or FineTune(),
        final_fine_tune=final_fine_tune,
        variables={} if variables is None else variables,
        step=step,
        max_drop_after_ssvd=max_drop_after_ssvd,
        median_stopping=median_stopping,
        sampler=sampler,
        grid={} if grid is None else cast("Mapping[str, tuple[float, ...]]", grid),
        seed=seed,
    )
    place, where = Workspace(Path(workspace)), choose_device(device)
    model = task.build_model()
    task.check(model, where)
    check_settings(settings, task, model, where)
    runner = _runner(task, place.prepare(), settings, where, Progress())
    database = open_storage(storage, place)
    study = _find(database, name)
    asked = _asked(task, runner, place, settings)
    if study is None or is_blank(study):
        assert asked.task is not None and asked.versions is not None
        study = _create(database, name, Identity(asked.task, settings, runner.reference, asked.versions))
    identity = agree(study, asked, accept=accept_changed)
    if storage is not None:
        remember_database(place, name, storage)
    return CompressionStudy(
        study,
        storage=database,
        workspace=place,
        identity=identity,
        task=task,
        device=where,
        accept_changed=accept_changed,
    )


def _argument_faults(names: Mapping[str, object], tunings: Mapping[str, object]) -> list[str]:
    """Find texts in place of lists, whose letters would be taken for names, and settings that are none."""
    faults = [
        f"{name} is {given!r}, a single text; it must be a list: [{given!r}]."
        for name, given in names.items()
        if isinstance(given, str)
    ]
    faults += [
        f"{name} is {given!r}; it must be a list of names."
        for name, given in names.items()
        if not isinstance(given, Collection)
    ]
    faults += [
        f"{name} is {given!r}; it must be a FineTune: FineTune(epochs=3)."
        for name, given in tunings.items()
        if not isinstance(given, FineTune | None)
    ]
    return faults


def load_study(
    name: str,
    task: Task | None = None,
    *,
    workspace: str | Path = "runs",
    storage: str | None = None,
    device: str | None = None,
    accept_changed: bool = False,
) -> CompressionStudy:
    """Open a study that exists.

    Other versions of packages than before, and another workspace, are refused when it is to run.

    Args:
        name: Of the study.
        task: Its task; without it the study can be looked at, but not continued.
        workspace: Folder of the results.
        storage: URL of the database; ``None`` is the SQLite file in the workspace.
        device: See :func:`create_study`.
        accept_changed: See :func:`create_study`; for a study that is opened with its task.

    Raises:
        StudyError: There is no such study or database; the studies that exist are named.
        StudyMismatchError: The study was made with another task, or by another program.
        DeviceError: This machine has no such device.
        TaskError: The task cannot be used.
    """
    place, where = Workspace(Path(workspace)), choose_device(device)
    if task is not None:
        task.check(task.build_model(), where)
    database = open_storage(storage, place, must_exist=True)
    study = _find(database, name)
    if study is None:
        raise StudyError(_not_found(database, name))
    identity = load_identity(study)
    if task is not None:
        asked = _asked(task, _runner(task, place, identity.settings, where, Progress()), place)
        if not accept_changed:
            # Whoever only looks at it may do so with any version, and from anywhere.
            asked = replace(asked, versions=None, workspace=None)
        identity = agree(study, asked, accept=accept_changed)
    return CompressionStudy(
        study,
        storage=database,
        workspace=place,
        identity=identity,
        task=task,
        device=where,
        accept_changed=accept_changed,
    )


def _runner(
    task: Task, workspace: Workspace, settings: SearchSettings, device: torch.device, progress: Progress
) -> StageRunner:
    return StageRunner(task, workspace, seed=settings.seed, device=device, progress=progress)


def _asked(
    task: Task, runner: StageRunner, workspace: Workspace, settings: SearchSettings | None = None
) -> Asked:
    def size() -> dict[str, int]:
        profile = profile_model(*task.build_with_example())
        return {"macs": profile.macs, "params": profile.params}

    # The seed is one of the settings.
    made_of = {key: value for key, value in runner.identity.items() if key != "seed"}
    return Asked(
        task={"name": task.name, **made_of},
        settings=settings,
        versions=current_versions(),
        workspace=workspace,
        size=size,
        measure=lambda: runner.reference,
    )


def check_settings(
    settings: SearchSettings, task: Task, model: nn.Module, device: torch.device
) -> ModelProfile:
    """Find what of a study's settings its task and its model do not allow, before any work starts.

    Args:
        settings: The settings, sound in themselves.
        task: The task, sound in itself.
        model: Its original model, on the device.
        device: Where models run.

    Returns:
        What the model costs.

    Raises:
        ConfigError: See :func:`compress_search.search.manual_shares.check_manual_shares`.
        TaskError: The task cannot be trained as the settings say.
        ModelError: ``ignore``, ``shares`` or ``keep_channels`` names what the model does not have.
    """
    trainings = (settings.fine_tune, settings.final_fine_tune, settings.per_layer_fine_tune)
    check_training(task, trainings, device)
    channels_to_keep(settings.keep_channels, model)
    check_share_names(settings.shares, model)
    check_manual_shares(settings)
    profile = profile_model(model, task.example_input.to(device), warn=True)
    layers_matching(settings.ignore, profile)
    return profile


def check_name(name: str) -> None:
    """Make sure that a study of this name can have a folder of its own in the workspace.

    Raises:
        StudyError: It cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in INTERNAL_NAMES:
        raise StudyError(
            f"The study's name is {name!r}; it names a folder of the workspace: use letters, digits and "
            f". _ - (not {', '.join(map(repr, INTERNAL_NAMES))})."
        )
    if len(name) > _LONGEST_NAME:
        raise StudyError(
            f"The study's name {name[:20]!r}... has {len(name)} characters; it names a folder of the "
            f"workspace: use at most {_LONGEST_NAME}."
        )


def _find(storage: RDBStorage, name: str) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def _create(storage: RDBStorage, name: str, identity: Identity) -> optuna.Study:
    with quiet_optuna():
        try:
            study = optuna.create_study(study_name=name, storage=storage, directions=DIRECTIONS)
        except DuplicatedStudyError:
            # Another process was quicker, or was killed between this line and the one that saves.
            study = optuna.load_study(study_name=name, storage=storage)
        if is_blank(study):
            study.set_metric_names(list(METRICS))
            identity.save(study)
        return study


def _not_found(storage: RDBStorage, name: str) -> str:
    names = sorted(study.study_name for study in storage.get_all_studies())
    near = difflib.get_close_matches(name, names, n=1)
    there = f"It has: {', '.join(names)}." if names else "It has none."
    remedy = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no study {name!r} in this database. {there}{remedy}"
