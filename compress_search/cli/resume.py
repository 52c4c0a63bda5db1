"""``compress-search resume``: go on with a study after anything that stopped it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from compress_search.cli.study_argument import add_accept_option, add_study_argument, find_study
from compress_search.cli.workers import add_workers_options, prepare, run_workers


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "resume",
        help="go on with a study that was interrupted, or raise its number of trials",
        description="Go on with a study up to its total number of finished trials. Finished stages are not "
        "computed again; a study that has all its trials only answers again.",
        epilog="Example: compress-search resume digits --n-trials 30",
    )
    add_study_argument(parser)
    parser.add_argument("--n-trials", type=int, metavar="N", help="a new total number of finished trials")
    add_workers_options(parser)
    add_accept_option(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Resume the study."""
    place = find_study(args)
    if args.workers is not None:
        words = ["resume", str(place.folder)]
        words += [] if place.storage is None else ["--storage", place.storage]
        words += [] if args.n_trials is None else ["--n-trials", str(args.n_trials)]
        return run_workers(
            words, workers=args.workers, restarts=args.restarts, accept_changed=args.accept_changed
        )
    config = place.config()
    if args.n_trials is not None:
        config = dataclasses.replace(config, n_trials=args.n_trials)
    if args.prepare is not None:
        return prepare(config, args.prepare, accept_changed=args.accept_changed)
    from compress_search.cli.session import search_and_answer

    return search_and_answer(config, accept_changed=args.accept_changed)
