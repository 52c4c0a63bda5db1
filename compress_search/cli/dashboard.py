"""``compress-search dashboard``: watch a study in the browser."""

from __future__ import annotations

import argparse
from typing import Any

from compress_search.cli.study_argument import add_study_argument, find_study
from compress_search.search.dashboard_access import PORT


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "dashboard",
        help="serve the Optuna dashboard of a study, to this machine only",
        description="Serve the Optuna dashboard on 127.0.0.1 until Ctrl-C. It follows a study that is "
        "running. It has no password: whoever reaches the port can change and delete studies, unless it is "
        "served with --read-only.",
        epilog="Example: compress-search dashboard digits --port 8081 --read-only",
    )
    add_study_argument(parser)
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    parser.add_argument("--read-only", action="store_true", help="refuse everything but reading")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Serve the dashboard."""
    place = find_study(args)
    from compress_search.cli.log import logging_to_terminal
    from compress_search.search.dashboard import DashboardServer

    with logging_to_terminal():
        study = place.open()
        with DashboardServer(
            study.storage,
            study.name,
            workspace=study.workspace,
            port=args.port,
            read_only=args.read_only,
            # Made from the saved configuration when a table needs it: the pages do without.
            load_task=(lambda: place.config().load_task()) if place.has_config else None,
        ) as server:
            server.serve_until_interrupted()
    return 0
