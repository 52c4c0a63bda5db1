"""``compress-search finalize``: train the best candidates of a study on for longer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from compress_search.cli.study_argument import add_accept_option, add_study_argument, find_study

if TYPE_CHECKING:
    from compress_search.progress import Progress
    from compress_search.search.study import CompressionStudy


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "finalize",
        help="train the best candidates on for longer",
        description="Train the best candidates on, each as a further trial, then answer as `run` does. They "
        "are not counted in n_trials. After Ctrl-C the same command goes on.",
        epilog="Example: compress-search finalize digits --top 3 --epochs 30",
    )
    add_study_argument(parser)
    add_accept_option(parser)
    parser.add_argument("--top", type=int, default=3, metavar="K", help="how many candidates; default: 3")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="how long; default: 30")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Train the finalists."""
    config = find_study(args).config()
    from compress_search.cli.session import work_and_answer
    from compress_search.results import format_candidates

    def train(study: CompressionStudy, progress: Progress) -> None:
        seconds = config.checkpoint_seconds
        finalists = study.finalize(args.top, args.epochs, checkpoint_seconds=seconds, progress=progress)
        complete = [finalist for finalist in finalists if finalist.state == "complete"]
        print(f"Finalists:\n{format_candidates(complete)}\n")
        for other in finalists:
            if other not in complete:
                print(f"Trial {other.number}, a finalist of trial {other.finalist_of}: {other.reason}\n")

    return work_and_answer(config, train, accept_changed=args.accept_changed)
