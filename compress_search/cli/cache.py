"""``compress-search cache``: what a workspace stores, whether it is whole, and removing what is needless."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_search.exceptions import WorkspaceError
from compress_search.plain_text import duration, format_table
from compress_search.workspace import WORKSPACE_VARIABLE, Workspace, default_workspace

if TYPE_CHECKING:
    from compress_search.stage_inventory import Inventory, Item, Removal, StageUses, StoredStage, Use

_KEY_DIGITS, _SHOWN_TRIALS = 10, 6
_DAY = 86_400.0
_NUMBERS = ("accuracy", "mac_ratio", "took", "size", "age")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "cache",
        help="list, verify or prune the stored stages of a workspace",
        description="Look after the stages that a workspace stores: trials, studies and resumed runs reuse "
        "them.",
        epilog="Example: compress-search cache prune --dry-run",
    )
    actions = parser.add_subparsers(required=True, metavar="ls|verify|prune")
    ls = actions.add_parser(
        "ls",
        help="list what is stored, how large it is, and who uses it",
        description="List every stage with the trials that use it, the sensitivity tables, what the "
        "original says of training batches, and the checkpoints of unfinished fine-tunings. The weights are "
        "not read: `cache verify` does that.",
        epilog="Example: compress-search cache ls --workspace runs",
    )
    ls.add_argument("--json", action="store_true", help="print it as JSON: bytes, seconds, whole keys")
    ls.set_defaults(main=list_stages)
    verify = actions.add_parser(
        "verify",
        help="check every file of every stage; exit status 1 if one is damaged",
        description="Check every file against the checksum it was written with. What is damaged is set "
        "aside under another name, and computed again when a trial wants it.",
        epilog="Example: compress-search cache verify",
    )
    verify.set_defaults(main=verify_stages)
    prune = actions.add_parser(
        "prune",
        help="remove what no trial needs",
        description="Remove damaged stages that were set aside, what was left over from writing more than an "
        "hour ago, leases of processes that have ended, checkpoints of finished stages, stages that no "
        "trial of any study uses, and, where no trial is unfinished, what the original says of training "
        "batches. What a running or waiting trial may need always stays.",
        epilog="Example: compress-search cache prune --keep-front --older-than 7 --dry-run",
    )
    prune.add_argument(
        "--keep-front",
        action="store_true",
        help="also remove the stages of finished trials that are not on their study's front; the models of "
        "those trials are then gone",
    )
    prune.add_argument(
        "--older-than",
        type=_days,
        default=0.0,
        metavar="DAYS",
        help="only what was not used for so many days",
    )
    prune.add_argument("--dry-run", action="store_true", help="show what would be removed; remove nothing")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    prune.set_defaults(main=prune_stages)
    for action in (ls, verify, prune):
        action.add_argument(
            "--workspace",
            metavar="DIR",
            type=Path,
            default=default_workspace(),
            help=f"the workspace (default: ${WORKSPACE_VARIABLE}, else runs)",
        )
        action.add_argument(
            "--storage", metavar="URL", help="a database of studies that is not the workspace's own"
        )


def list_stages(args: argparse.Namespace) -> int:
    """Print what is stored."""
    from compress_search.reports.formatting import byte_size

    inventory = _inventory(args)
    if args.json:
        print(json.dumps(_as_json(inventory), indent=2))
        return 0
    now = time.time()
    rows = [["stage", "what", "accuracy", "mac_ratio", "took", "size", "age", "used by"]]
    for stage in inventory.stages:
        result = stage.result
        rows.append(
            [
                stage.key[:_KEY_DIGITS],
                "?" if result is None else result.name,
                "" if result is None else f"{result.accuracy:.4f}",
                "" if result is None else f"{result.mac_ratio:.4f}",
                "" if result is None else duration(result.seconds),
                byte_size(stage.size),
                _age(now - stage.made),
                f"FAULT: {stage.fault}" if stage.fault else _users(stage.uses, most=_SHOWN_TRIALS),
            ]
        )
    others = (
        ("damaged, set aside", inventory.damaged),
        ("sensitivity table", inventory.tables),
        ("the original's outputs of an epoch", inventory.teacher),
        ("unfinished: checkpoints", inventory.unfinished),
        ("being written, or left over", inventory.temporary),
    )
    for what, items in others:
        rows += [
            [_short(item), what, "", "", "", byte_size(item.size), _age(now - item.used), ""]
            for item in items
        ]
    print(format_table(rows, right=_NUMBERS))
    print(f"\n{_count(len(inventory.stages), 'stage')}, {byte_size(inventory.size)} in all.")
    for lease in inventory.leases:
        ended = lease.is_known_dead(silent_seconds=_DAY)
        said = "a process whose lease cannot be read" if lease.lease is None else str(lease.lease)
        print(f"{'Its process has ended' if ended else 'Being computed'}: {lease.key[:_KEY_DIGITS]}, {said}.")
    _tell_gaps(inventory.uses)
    return 0


def verify_stages(args: argparse.Namespace) -> int:
    """Check all checksums."""
    from compress_search.cli.log import logging_to_terminal
    from compress_search.progress import Progress
    from compress_search.search.stage_uses import stage_uses
    from compress_search.stage_inventory import take_inventory, verify

    workspace = Workspace(args.workspace)
    uses = stage_uses(workspace, args.storage)
    with logging_to_terminal() as console:
        checked = len(take_inventory(workspace, uses).stages)
        damaged = verify(workspace, uses, Progress(console))
    if not damaged:
        print(f"{_count(checked, 'stage')}, all whole.")
        return 0
    print(f"{_count(checked, 'stage')}, {len(damaged)} damaged:")
    for one in damaged:
        print(f"{one.key}: {one.fault}.")
        if one.aside is not None:
            print(f"  set aside as {one.aside}")
        print(f"  affected: {_users(one.uses, states=True) or 'no trial'}")
    print(
        "\nA trial that needs one of these computes it again. The model of a finished trial that ended with "
        "one cannot be loaded until then: run the same study under another name in this workspace, which "
        "reuses every stage that is whole."
    )
    return 1


def prune_stages(args: argparse.Namespace) -> int:
    """Remove what is needless."""
    from compress_search.reports.formatting import byte_size
    from compress_search.stage_inventory import prune, what_to_prune

    inventory = _inventory(args)
    removals = what_to_prune(inventory, keep_front=args.keep_front, older_than=args.older_than * _DAY)
    if inventory.uses.gaps:
        print("No stage is known to be unused, so all stages stay:", file=sys.stderr)
    _tell_gaps(inventory.uses)
    if not removals:
        print("There is nothing to prune.")
        return 0
    size = sum(removal.item.size for removal in removals)
    summary = f"{_count(len(removals), 'thing')}, {byte_size(size)} of {byte_size(inventory.size)}"
    print(_removal_table(removals))
    if args.dry_run:
        print(f"\nWould be removed: {summary}. Nothing was removed.")
        return 0
    if not args.yes and not _agreed(f"\nRemove {summary}? [y/N] "):
        print("Nothing was removed.")
        return 0
    removed = prune(Workspace(args.workspace), removals)
    freed = byte_size(sum(removal.item.size for removal in removed))
    print(f"\nRemoved: {_count(len(removed), 'thing')}, {freed}.")
    for removal in removals:
        if removal not in removed:
            print(f"Kept, because somebody took it up meanwhile: {removal.item.path.name}.")
    return 0


def _inventory(args: argparse.Namespace) -> Inventory:
    from compress_search.search.stage_uses import stage_uses
    from compress_search.stage_inventory import take_inventory

    workspace = Workspace(args.workspace)
    return take_inventory(workspace, stage_uses(workspace, args.storage))


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise WorkspaceError(
            "Nothing was removed: there is no terminal to ask on. Say --yes to remove all of this, or "
            "--dry-run to look only."
        )
    return input(question).strip().lower() in ("y", "yes")


def _removal_table(removals: Iterable[Removal]) -> str:
    from compress_search.reports.formatting import byte_size

    now = time.time()
    rows = [["what", "", "size", "age", "why"]]
    for removal in removals:
        item = removal.item
        name = "" if (result := getattr(item, "result", None)) is None else result.name
        rows.append([_short(item), name, byte_size(item.size), _age(now - item.used), removal.why])
    return format_table(rows, right=_NUMBERS)


def _as_json(inventory: Inventory) -> dict[str, Any]:
    return {
        "stages": [_stage_as_json(stage) for stage in inventory.stages],
        **{
            name: [_item_as_json(item) for item in getattr(inventory, name)]
            for name in ("damaged", "tables", "teacher", "unfinished", "temporary")
        },
        "leases": [
            {
                "key": lease.key,
                "lease": None if lease.lease is None else dataclasses.asdict(lease.lease),
                "renewed": lease.renewed,
                "waiting": [worker.to_dict() for worker in lease.waiting],
            }
            for lease in inventory.leases
        ],
        "bytes": inventory.size,
        "gaps": list(inventory.uses.gaps),
    }


def _stage_as_json(stage: StoredStage) -> dict[str, Any]:
    return _item_as_json(stage) | {
        "key": stage.key,
        "result": None if stage.result is None else stage.result.to_dict(),
        "made": stage.made,
        "fault": stage.fault,
        "uses": [dataclasses.asdict(use) for use in stage.uses],
    }


def _item_as_json(item: Item) -> dict[str, Any]:
    return {"path": str(item.path), "bytes": item.size, "used": item.used}


def _users(uses: Iterable[Use], *, states: bool = False, most: int = 1000) -> str:
    """Name the trials by study, for example ``digits: original, 0, 3``; not more than ``most`` of each."""
    by_study: dict[str, list[str]] = {}
    for use in uses:
        name = use.state if use.trial is None else str(use.trial)
        if states and use.trial is not None:
            name = f"trial {use.trial} ({use.state})"
        by_study.setdefault(use.study, []).append(name)
    return "; ".join(
        f"{study}: {', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}"
        for study, names in by_study.items()
    )


def _short(item: Item) -> str:
    # A hash is known by its beginning; what follows it says what kind of thing this is.
    name = item.path.name
    key, dot, rest = name.partition(".")
    return f"{key[:_KEY_DIGITS]}{dot}{rest.partition('-')[0]}" if key else f"{name[: _KEY_DIGITS + 1]}..."


def _age(seconds: float) -> str:
    days = seconds / _DAY
    return f"{days:.0f} days" if days >= 2 else duration(max(0.0, seconds))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _tell_gaps(uses: StageUses) -> None:
    for gap in uses.gaps:
        print(gap, file=sys.stderr)


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of days; give 0 or more")
    return days
