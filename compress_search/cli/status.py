"""``compress-search status``: how far a study is."""

from __future__ import annotations

import argparse
from typing import Any

from compress_search.cli.study_argument import add_study_argument, find_study


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "status",
        help="trials by state, the best so far, time per stage, what reuse saved",
        description="Tell how far a study is. It may be running meanwhile.",
        epilog="Example: compress-search status digits --trial 7",
    )
    add_study_argument(parser)
    parser.add_argument(
        "--trial",
        type=int,
        metavar="N",
        help="everything about one trial: its stages, its process, its retries, why it ended as it did",
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the status."""
    study = find_study(args).open()
    print(study.status() if args.trial is None else study.trial_history(args.trial))
    return 0
