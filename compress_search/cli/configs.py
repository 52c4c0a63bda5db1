"""``compress-search configs``: the configurations and study scripts that are shipped."""

from __future__ import annotations

import argparse
import ast
import difflib
import shutil
from pathlib import Path
from typing import Any

import compress_search
from compress_search.exceptions import CompressSearchError


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "configs",
        help="list or copy the shipped configurations",
        description="List the shipped configurations, or copy one with its study script.",
        epilog="Example: compress-search configs cp digits",
    )
    actions = parser.add_subparsers(required=True, metavar="ls|cp")
    ls = actions.add_parser("ls", help="list them", epilog="Example: compress-search configs ls")
    ls.set_defaults(main=list_configs)
    cp = actions.add_parser(
        "cp",
        help="copy one",
        description="Copy a configuration to DEST/configs, and to DEST/studies the script that it names "
        "with the files there that the script imports.",
        epilog="Example: compress-search configs cp digits my-project",
    )
    cp.add_argument("name", metavar="NAME", help="as `configs ls` shows it")
    cp.add_argument("destination", metavar="DEST", nargs="?", type=Path, default=Path())
    cp.add_argument("--force", action="store_true", help="replace files that are there")
    cp.set_defaults(main=copy_config)


def list_configs(_args: argparse.Namespace) -> int:
    """Print each shipped configuration and the command that launches it."""
    found = _shipped_configs()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        launch = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        print(f"{name:<{width}}  {launch}")
    return 0


def copy_config(args: argparse.Namespace) -> int:
    """Copy a configuration and its study script, keeping where they lie to each other."""
    found = _shipped_configs()
    if args.name not in found:
        near = difflib.get_close_matches(args.name, found, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(found)}."
        raise CompressSearchError(f"No configuration {args.name!r} is shipped. {remedy}")
    source = found[args.name]
    root = source.parent.parent
    copies = {path: args.destination / path.relative_to(root) for path in (source, *_scripts_of(source))}
    in_the_way = [str(copy) for copy in copies.values() if copy.exists()]
    if in_the_way and not args.force:
        raise CompressSearchError(f"There is already: {', '.join(in_the_way)}. --force replaces it.")
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        print(copy)
    return 0


def shipped_root(package: Path | None = None) -> Path:
    """The folder that holds ``configs/`` and ``studies/``.

    Args:
        package: The package's folder. In an installed wheel they lie inside it, in a checkout beside it.
    """
    package = package or Path(compress_search.__file__).parent
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent


def _shipped_configs() -> dict[str, Path]:
    return {path.stem: path for path in sorted((shipped_root() / "configs").glob("*.yaml"))}


def _scripts_of(config: Path) -> list[Path]:
    """The study script that a configuration names, if it names a file, and the neighbours that it imports."""
    from compress_search.yaml_settings import parse_yaml

    task = str(parse_yaml(config.read_text(encoding="utf-8"), source=str(config))["task"])
    script = (config.parent / task.rpartition(":")[0]).resolve()
    found: list[Path] = []
    waiting = [script] if script.is_file() else []
    while waiting:
        path = waiting.pop()
        found.append(path)
        waiting += [p for p in _imported(path, script.parent) if p not in found and p not in waiting]
    return sorted(found)


def _imported(script: Path, folder: Path) -> list[Path]:
    """The files below a folder that a script imports from, by the names that it imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = [folder.joinpath(*name.split(".")) for name in names]
    # With a module of a package comes the package's own file.
    candidates = [
        p
        for path in paths
        for p in (path.with_suffix(".py"), path / "__init__.py", path.parent / "__init__.py")
    ]
    return [path for path in candidates if path.is_file()]
