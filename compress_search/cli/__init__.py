"""The command ``compress-search``: one module a subcommand.

Each module has ``add_parser(subparsers)`` and ``main(args) -> int``. What needs PyTorch is imported inside
``main``, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from compress_search import __version__
from compress_search.cli import (
    benchmark,
    cache,
    configs,
    dashboard,
    export,
    finalize,
    report,
    resume,
    run,
    status,
    validate,
    worker,
)
from compress_search.exceptions import CompressSearchError

COMMANDS = (
    run,
    resume,
    worker,
    finalize,
    status,
    report,
    dashboard,
    export,
    benchmark,
    cache,
    configs,
    validate,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``compress-search``; those of the process by default.

    Returns:
        The exit status: 0, 1 (the study has no answer yet, or `cache verify` found damage), 2 (an error,
        told on stderr) or 130 (Ctrl-C).
    """
    parser = argparse.ArgumentParser(
        prog="compress-search",
        description="Search for a CNN of the same accuracy with fewer multiply-accumulates.",
        epilog="Start with: compress-search configs ls",
    )
    parser.add_argument("--version", action="version", version=f"compress-search {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse does not find the words of a list again that come after an option.
        args.overrides += rest
    try:
        exit_status: int = args.main(args)
        sys.stdout.flush()
        return exit_status
    except CompressSearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; the interpreter must not try to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
