"""``compress-search run``: a study from its configuration to its answer."""

from __future__ import annotations

import argparse
from typing import Any

from compress_search.cli.study_argument import add_accept_option
from compress_search.cli.workers import add_workers_options, prepare, run_workers


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "run",
        help="search, then report and export; continues the study if it was begun",
        description="Run the study of a configuration up to its n_trials, then print the front, test the "
        "chosen model, and write the report and the exported model.",
        epilog="Example: compress-search run configs/digits.yaml target=0.4 fine_tune.epochs=6",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; `compress-search configs ls` lists some")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replaces a value of the file: fine_tune.epochs=6"
    )
    add_preset_option(parser)
    add_workers_options(parser)
    add_accept_option(parser)
    parser.set_defaults(main=main)


def add_preset_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses among the presets of a configuration."""
    parser.add_argument(
        "--preset", metavar="NAME", help="use the values that stand below `presets` in the file: smoke"
    )


def main(args: argparse.Namespace) -> int:
    """Run the study."""
    if args.workers is not None:
        chosen = [] if args.preset is None else ["--preset", args.preset]
        words = ["run", args.config, *chosen, *args.overrides]
        return run_workers(
            words, workers=args.workers, restarts=args.restarts, accept_changed=args.accept_changed
        )
    from compress_search.config import StudyConfig

    config = StudyConfig.load(args.config, args.overrides, preset=args.preset)
    if args.prepare is not None:
        return prepare(config, args.prepare, accept_changed=args.accept_changed)
    from compress_search.cli.session import search_and_answer

    return search_and_answer(config, accept_changed=args.accept_changed)
