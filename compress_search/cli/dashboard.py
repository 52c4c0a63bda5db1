"""``compress-search dashboard``: watch a study in the browser."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from compress_search.cli.study_argument import add_study_argument, find_study


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "dashboard",
        help="serve the Optuna dashboard of a study, to this machine only",
        description="Serve the Optuna dashboard on 127.0.0.1 until Ctrl-C. It follows a study that is "
        "running. It has no password: whoever reaches the port can change and delete studies.",
        epilog="Example: compress-search dashboard digits --port 8081",
    )
    add_study_argument(parser)
    parser.add_argument("--port", type=int, default=8080, help="default: 8080")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Serve the dashboard."""
    place = find_study(args)
    from compress_search.search.dashboard import DashboardServer

    # The pages ask for statistics again and again, and Optuna warns of few trials each time.
    warnings.filterwarnings("ignore", module=r"optuna\.")
    study = place.open()
    with DashboardServer(study.storage, study.name, port=args.port) as server:
        print(f"{server.url}\nCtrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
