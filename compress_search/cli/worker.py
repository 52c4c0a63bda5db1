"""``compress-search worker``: one more process on a study that runs, here or on another machine."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from contextlib import ExitStack
from typing import Any

from compress_search.cli.study_argument import add_accept_option, add_study_argument, find_study


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "worker",
        help="join a study that runs, from any terminal or machine",
        description="Run trials of a study up to its total, beside the processes that do so already, and "
        "exit without the answer. On another machine the study needs a database server, and a workspace "
        "that both machines see.",
        epilog="Example: compress-search worker digits",
    )
    add_study_argument(parser)
    add_accept_option(parser)
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run trials."""
    if args.supervised:
        _stop_with_the_supervisor()
    place = find_study(args)
    config = place.config()
    from compress_search.cli.log import logging_to_file, logging_to_terminal
    from compress_search.progress import Progress
    from compress_search.search.patient_storage import PATIENCE_SECONDS
    from compress_search.search.storage import open_storage
    from compress_search.search.study import load_study
    from compress_search.workspace import Workspace

    with ExitStack() as stack:
        console = stack.enter_context(logging_to_terminal())
        if not args.supervised:
            stack.enter_context(logging_to_file(place.folder / "study.log"))
        elif config.storage is not None:
            # Who is restarted while the database is away waits for it, too.
            open_storage(
                config.storage, Workspace(config.workspace), opening_seconds=PATIENCE_SECONDS
            ).engine.dispose()
        study = load_study(
            config.name,
            config.load_task(),
            workspace=config.workspace,
            storage=config.storage,
            device=config.device,
            accept_changed=args.accept_changed,
        )
        study.optimize(
            config.n_trials,
            stop_when=config.stop_when,
            checkpoint_seconds=config.checkpoint_seconds,
            progress=Progress(console),
        )
    return 0


def _stop_with_the_supervisor() -> None:
    """Stop as after Ctrl-C when standard input ends, which it does when the supervisor is no more."""

    def wait() -> None:
        # Not through sys.stdin: its lock, held here, would abort the interpreter when it shuts down.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="the supervisor lives", daemon=True).start()
