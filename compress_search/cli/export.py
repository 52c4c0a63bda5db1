"""``compress-search export``: write the model of one trial."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress_search.cli.study_argument import add_study_argument, find_study


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write the model of one trial",
        description="Write a trial's plan (JSON), weights (safetensors), torch.export program and summary, "
        "each read back and compared with the model.",
        epilog="Example: compress-search export digits --trial 7 --format onnx --output digits-small",
    )
    add_study_argument(parser)
    parser.add_argument("--trial", type=int, required=True, metavar="N", help="number of a complete trial")
    parser.add_argument("--format", choices=["onnx"], help="write this form as well")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: export/trial-N in the study's folder"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Export the trial."""
    place = find_study(args)
    from compress_search.cli.log import logging_to_terminal
    from compress_search.export import export_candidate

    with logging_to_terminal():
        task = place.config().load_task()
        study = place.open(task)
        files = export_candidate(
            study.candidate(args.trial),
            args.output or study.folder / "export" / f"trial-{args.trial}",
            example_input=task.example_input,
            onnx=args.format == "onnx",
        )
    print(files.folder)
    return 0
