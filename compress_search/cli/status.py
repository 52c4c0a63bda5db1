"""``compress-search status``: how far a study is, once or for as long as it runs."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from compress_search.cli.study_argument import StudyPlace, add_study_argument, find_study
from compress_search.cli.watching import add_watch_option, watch

_HEIGHT = 16
_CLEAR = "\x1b[2J\x1b[H"


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
    add_watch_option(parser, "--watch", "show it again, with the front drawn in characters,")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the status."""
    place = find_study(args)
    if args.watch is not None and args.trial is None:
        show = _Shown(place)
        watch(show.again, seconds=args.watch)
        return 0
    study = place.open()
    print(study.status() if args.trial is None else study.trial_history(args.trial))
    return 0


class _Shown:
    """The status and the front, as they are shown now."""

    def __init__(self, place: StudyPlace) -> None:
        self._place = place
        self._on_terminal = sys.stdout.isatty()
        self._text = ""

    def again(self) -> bool:
        """Show them as they are; return whether the study is over."""
        from compress_search.reports.pareto import pareto_data
        from compress_search.reports.pareto_characters import draw_characters

        study = self._place.open()
        status, data = study.status(), pareto_data(study.front())
        width = shutil.get_terminal_size().columns - 1
        text = f"{status}\n\n{draw_characters(data, width=width, height=_HEIGHT)}"
        if self._on_terminal:
            print(_CLEAR + text, flush=True)
        elif text != self._text:
            # In a file or a pipe: only what has changed.
            print(text + "\n", flush=True)
        self._text = text
        return status.is_over
