"""``compress-search report``: write a study's report again."""

from __future__ import annotations

import argparse
from typing import Any

from compress_search.cli.study_argument import add_study_argument, find_study


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="write the report, the plots and the table of all trials",
        description="Write report.html, front.html, front.png and candidates.csv into the study's folder, "
        "from what is finished so far.",
        epilog="Example: compress-search report runs/digits",
    )
    add_study_argument(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Write the report."""
    place = find_study(args)
    from compress_search.cli.answer import choose
    from compress_search.cli.log import logging_to_terminal

    with logging_to_terminal():
        config = place.config() if place.has_config else None
        study = place.open(config.load_task() if config else None)
        chosen = choose(study, config.max_drop if config else None)[0] if len(study.front()) else None
        files = study.report(chosen)
    print("\n".join(str(path) for path in (files.page, files.plot, files.picture, files.table)))
    return 0
