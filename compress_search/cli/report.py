"""``compress-search report``: write a study's report again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from compress_search.cli.study_argument import add_study_argument, find_study
from compress_search.cli.watching import add_watch_option, watch

if TYPE_CHECKING:
    from compress_search.reports.page import ReportFiles


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
    add_watch_option(parser, "--follow", "write it again, as a page that reads itself again,")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Write the report."""
    place = find_study(args)
    from compress_search.cli.answer import choose
    from compress_search.cli.log import logging_to_terminal

    with logging_to_terminal():
        config = place.config() if place.has_config else None
        task = config.load_task() if config else None

        def write(refresh: float | None) -> tuple[ReportFiles, bool]:
            study = place.open(task)
            over = study.status().is_over
            chosen = choose(study, config.max_drop if config else None)[0] if len(study.front()) else None
            # The last page stays as it is.
            return study.report(chosen, refresh=None if over else refresh), over

        files, over = write(args.follow)
        if args.follow is not None and not over:
            print(f"Following the study: {files.page}", flush=True)
            if not watch(lambda: write(args.follow)[1], seconds=args.follow):
                # Nobody writes the page any more, so it is not to read itself again.
                write(None)
    print("\n".join(str(path) for path in (files.page, files.plot, files.picture, files.table)))
    return 0
