"""What lies in a workspace beside the studies themselves: listed, checked, and what is needless removed.

Who uses a stage is told by :class:`StageUses`, which the search reads from its databases; this module knows
no studies. Nothing that somebody may be using is removed: see :func:`what_to_prune`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from compress_search.exceptions import UnreadableStageError, WorkspaceError
from compress_search.leases import LeaseFile, is_abandoned, lease_files, remove_lease, waiting_files
from compress_search.progress import Progress
from compress_search.results import StageResult
from compress_search.stage_files import PLAN, WEIGHTS, fault_of, read_result
from compress_search.stage_store import DAMAGED, StageStore, key_of_set_aside
from compress_search.workspace import Workspace, remove_folder

logger = logging.getLogger("compress_search")

_HOUR = 3600.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
"""What is being written has such a name until it is whole."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One user of a stage.

    Attributes:
        study: Name of the study.
        trial: The trial's number; ``None`` is the study itself, whose original model the stage is.
        state: The trial's state, or ``"original"``.
        needed: Whether the study's front needs the stage, an unfinished trial, or the study itself.
    """

    study: str
    trial: int | None
    state: str
    needed: bool


@dataclass(frozen=True, kw_only=True)
class StageUses:
    """Who uses which stage of a workspace.

    Attributes:
        by_key: The users by the stage's key.
        unfinished_since: When the first of the trials that are not finished began, in seconds since 1970;
            ``None`` if all are finished. What was stored since then may be theirs without being listed.
        gaps: Why the list may be incomplete, a sentence each. Then no stage is known to be unused.
    """

    by_key: Mapping[str, tuple[Use, ...]] = field(default_factory=dict)
    unfinished_since: float | None = None
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that lies in the workspace.

    Attributes:
        path: A file or a folder.
        size: In bytes.
        used: When it was last written or, for a stage, found by somebody, in seconds since 1970.
    """

    path: Path
    size: int
    used: float


@dataclass(frozen=True, kw_only=True)
class StoredStage(Item):
    """A stage.

    Attributes:
        key: Hash of all that made it.
        result: Its numbers; ``None`` if they cannot be read.
        made: When it was stored, in seconds since 1970.
        fault: What is wrong with its files. Of the weights only whether they are there: to read all of them
            takes its time, and is what :func:`verify` does.
        uses: Who uses it.
    """

    key: str
    result: StageResult | None
    made: float
    fault: str | None
    uses: tuple[Use, ...]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All that lies in a workspace.

    Attributes:
        stages: The finished stages, oldest first.
        damaged: Stages that were set aside.
        tables: The sensitivity tables.
        teacher: What the original says of training batches.
        unfinished: Checkpoints of fine-tunings that are not finished; the folder's name is the stage's key.
        temporary: What was being written.
        leases: Who computes what.
        abandoned_waiting: Files of processes that waited for a stage when they ended.
        uses: Who uses the stages.
    """

    stages: tuple[StoredStage, ...]
    damaged: tuple[Item, ...]
    tables: tuple[Item, ...]
    teacher: tuple[Item, ...]
    unfinished: tuple[Item, ...]
    temporary: tuple[Item, ...]
    leases: tuple[LeaseFile, ...]
    abandoned_waiting: tuple[Item, ...]
    uses: StageUses

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        parts = (self.stages, self.damaged, self.tables, self.teacher, self.unfinished, self.temporary)
        return sum(item.size for part in parts for item in part)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A stage that is not what was written.

    Attributes:
        key: Of the stage.
        fault: What is wrong with it.
        aside: Where it was moved to; ``None`` if another process was quicker.
        uses: Who uses it.
    """

    key: str
    fault: str
    aside: Path | None
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Removal:
    """Something to remove.

    Attributes:
        item: What.
        why: The reason, in words.
        lease: The lease that it is, if it is one.
    """

    item: Item
    why: str
    lease: LeaseFile | None = None


def take_inventory(workspace: Workspace, uses: StageUses) -> Inventory:
    """Look at all that lies in a workspace.

    Args:
        workspace: The workspace.
        uses: Who uses its stages.

    Raises:
        WorkspaceError: There is no such workspace.
    """
    if not workspace.stages.is_dir():
        raise WorkspaceError(
            f"There is no workspace {str(workspace.root)!r}: it has no folder 'stages'. "
            "Name the one that the studies were run in: --workspace DIR."
        )
    folders = [path for path in _entries(workspace.stages) if path.is_dir() and not path.name.startswith(".")]
    stages = [_stage(path, uses) for path in folders if DAMAGED not in path.name]
    waiting = [w for lease in _lease_paths(workspace) for w in waiting_files(lease) if is_abandoned(w)]
    return Inventory(
        stages=tuple(sorted((s for s in stages if s is not None), key=lambda stage: stage.made)),
        damaged=_items(path for path in folders if DAMAGED in path.name),
        tables=_items(path for path in _entries(workspace.tables) if path.suffix == ".jsonl"),
        teacher=_items(path for path in _entries(workspace.teacher) if path.suffix == ".outputs"),
        unfinished=_items(path for path in _entries(workspace.checkpoints) if not path.name.startswith(".")),
        temporary=_items(_temporary_files(workspace)),
        leases=tuple(lease_files(workspace.stages)),
        abandoned_waiting=_items(waiting),
        uses=uses,
    )


def verify(workspace: Workspace, uses: StageUses, progress: Progress) -> tuple[Damage, ...]:
    """Check every file of every stage: what is damaged is set aside, what was and is whole is put back.

    Args:
        workspace: The workspace.
        uses: Who uses its stages.
        progress: Where to show how far it is.

    Raises:
        WorkspaceError: There is no such workspace.
        UnreadableStageError: A stage cannot be read, whole or not.
    """
    inventory, store = take_inventory(workspace, uses), StageStore(workspace)
    for item in inventory.damaged:
        if store.put_back(item.path):
            logger.info("The stage %s was set aside and is whole: it is back.", key_of_set_aside(item.path))
    stages, found = inventory.stages, []
    with progress.bar("stages", len(stages)) as advance:
        for stage in stages:
            fault = fault_of(stage.path) if stage.path.is_dir() else None
            if fault is not None:
                aside = store.set_aside(stage.key, fault)
                found.append(Damage(key=stage.key, fault=fault, aside=aside, uses=stage.uses))
            advance(f"{stage.key} {fault or 'is whole'}")
    return tuple(found)


def what_to_prune(
    inventory: Inventory, *, keep_front: bool = False, older_than: float = 0.0, now: float | None = None
) -> tuple[Removal, ...]:
    """Choose what is not needed.

    Stages that no trial uses are kept nevertheless if they were stored or found within the last hour, or
    since the first unfinished trial began, if a process holds their lease, and if it is not known who uses
    what.

    Args:
        inventory: What there is.
        keep_front: Whether stages are needed only by their study's front and by unfinished trials.
        older_than: Keep all that was used within so many seconds.
        now: Seconds since 1970; by default what the clock says.

    Returns:
        What to remove, and why.
    """
    now = time.time() if now is None else now
    removals = [
        *_needless_set_aside(inventory),
        *(Removal(item, "left over from writing") for item in inventory.temporary if now - item.used > _HOUR),
        *(Removal(item, "its process has ended") for item in inventory.abandoned_waiting),
        *_dead_leases(inventory),
        *_needless_checkpoints(inventory, now),
        *_needless_teacher_outputs(inventory, now),
        *_needless_stages(inventory, now, keep_front=keep_front),
    ]
    return tuple(removal for removal in removals if now - removal.item.used >= older_than)


def prune(workspace: Workspace, removals: Iterable[Removal]) -> tuple[Removal, ...]:
    """Remove what was chosen, except what somebody took up meanwhile.

    Returns:
        What was removed.
    """
    done = []
    for removal in removals:
        item = removal.item
        if removal.lease is not None:
            removed = remove_lease(removal.lease)
        elif not item.path.exists() or _is_wanted_again(workspace, removal):
            removed = False
        elif item.path.is_dir() and not _TEMPORARY.fullmatch(item.path.name):
            remove_folder(item.path)
            removed = True
        else:
            _remove_at_once(item.path)
            removed = True
        if removed:
            done.append(removal)
    return tuple(done)


def live_keys(inventory: Inventory) -> set[str]:
    """Keys of the stages that a process holds a lease of."""
    return {lease.key for lease in inventory.leases if not _is_dead(lease)}


def _needless_stages(inventory: Inventory, now: float, *, keep_front: bool) -> Iterator[Removal]:
    if inventory.uses.gaps:
        return
    live = live_keys(inventory)
    for stage in inventory.stages:
        if stage.key in live:
            continue
        if not stage.uses:
            if not _may_be_wanted(inventory, stage, now):
                yield Removal(stage, "no trial uses it")
        elif keep_front and not any(use.needed for use in stage.uses):
            yield Removal(stage, "only trials that are not on the front use it")


def _needless_set_aside(inventory: Inventory) -> Iterator[Removal]:
    stored = {stage.key for stage in inventory.stages}
    for item in inventory.damaged:
        # Looked at again: what another version took for damaged may be whole, and the only copy.
        if key_of_set_aside(item.path) in stored or _is_damaged(item.path):
            yield Removal(item, "damaged, set aside")


def _is_damaged(folder: Path) -> bool:
    """Whether a stage is known to be damaged; of one that cannot be read it is not."""
    with suppress(UnreadableStageError):
        return fault_of(folder) is not None
    return False


def _needless_checkpoints(inventory: Inventory, now: float) -> Iterator[Removal]:
    live, stored = live_keys(inventory), {stage.key for stage in inventory.stages}
    for item in inventory.unfinished:
        if item.path.name in live:
            continue
        if item.path.name in stored:
            yield Removal(item, "its stage is finished")
        elif not inventory.uses.gaps and not _may_be_wanted(inventory, item, now):
            yield Removal(item, "no unfinished trial can need it")


def _needless_teacher_outputs(inventory: Inventory, now: float) -> Iterator[Removal]:
    # A trial that is not finished may be at an epoch that it has not looked up yet, however old.
    if not inventory.uses.gaps and inventory.uses.unfinished_since is None:
        for item in inventory.teacher:
            if not _may_be_wanted(inventory, item, now):
                yield Removal(item, "no trial is unfinished; the original can be asked again")


def _may_be_wanted(inventory: Inventory, item: Item, now: float) -> bool:
    """Whether something that no trial has named may be in use all the same."""
    since = inventory.uses.unfinished_since
    # Stages of single layers have no lease of their own: they are part of one that has.
    return (
        bool(live_keys(inventory)) or now - item.used <= _HOUR or (since is not None and item.used >= since)
    )


def _dead_leases(inventory: Inventory) -> Iterator[Removal]:
    for lease in inventory.leases:
        if _is_dead(lease):
            item = Item(path=lease.file, size=0, used=lease.renewed)
            yield Removal(item, "a lease whose process has ended", lease)


def _is_dead(lease: LeaseFile) -> bool:
    return lease.is_known_dead(silent_seconds=_HOUR)


def _is_wanted_again(workspace: Workspace, removal: Removal) -> bool:
    """Whether a stage was found, or a checkpoint continued, since the inventory was taken."""
    item = removal.item
    if item.path.parent not in (workspace.stages, workspace.checkpoints):
        return False
    held = {lease.key for lease in lease_files(workspace.stages) if not _is_dead(lease)}
    return item.path.name in held or _last_change(item.path) > item.used


def _stage(folder: Path, uses: StageUses) -> StoredStage | None:
    try:
        result = StageResult.from_dict(read_result(folder))
        made = (folder / WEIGHTS).stat().st_mtime
        fault = fault_of(folder, (PLAN,))
    except (OSError, ValueError, TypeError, UnreadableStageError) as error:
        if not folder.is_dir():
            return None
        result, made, fault = None, folder.stat().st_mtime, str(error)
    return StoredStage(
        path=folder,
        size=_size_of(folder),
        used=_last_change(folder),
        key=folder.name,
        result=result,
        made=made,
        fault=fault,
        uses=tuple(uses.by_key.get(folder.name, ())),
    )


def _temporary_files(workspace: Workspace) -> Iterator[Path]:
    checkpoints = workspace.checkpoints
    shared = (workspace.stages, workspace.tables, workspace.teacher, checkpoints)
    for folder in (workspace.root, *shared, *_entries(checkpoints)):
        yield from (path for path in _entries(folder) if _TEMPORARY.fullmatch(path.name))


def _lease_paths(workspace: Workspace) -> list[Path]:
    """Leases, and those that are gone but for somebody who had waited."""
    found = (path.name.partition(".waiting-")[0] for path in _entries(workspace.stages))
    return [workspace.stages / name for name in sorted(set(found)) if name.endswith(".lease")]


def _entries(folder: Path) -> Sequence[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _items(paths: Iterable[Path]) -> tuple[Item, ...]:
    found = []
    for path in paths:
        # What another process removes at this moment is not there.
        with suppress(FileNotFoundError):
            found.append(Item(path=path, size=_size_of(path), used=_last_change(path)))
    return tuple(found)


def _last_change(path: Path) -> float:
    return max(part.stat().st_mtime for part in (path, *_entries(path)))


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).stat().st_size
    return total


def _remove_at_once(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
