"""``compress-search benchmark``: how long a model takes on this machine, beside the original."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_search.cli.study_argument import add_study_argument, find_study
from compress_search.exceptions import ConfigError
from compress_search.plain_text import format_table
from compress_search.workspace import write_text_atomically

if TYPE_CHECKING:
    from compress_search.latency import LatencyTable

_RUNTIMES = ("eager", "torch.compile", "onnxruntime")
_BATCHES = (1, 32)
_FORMATS = (".md", ".csv", ".json")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "benchmark",
        help="measure latency: original against compressed, in three runtimes",
        description="Measure how long a trial's model and the original take on this machine: in PyTorch as "
        "it is, compiled by torch.compile, and in ONNX Runtime. Of a study the result is kept in "
        "latency/trial-N.json, where `compress-search report` finds it. Fewer MACs are not always as much "
        "faster.",
        epilog="Example: compress-search benchmark digits --trial 7 --threads 1 --output latency.md",
    )
    add_study_argument(parser, or_else="; or a torch.export program (model.pt2, or the folder of an export)")
    parser.add_argument("--trial", type=int, metavar="N", help="of the study; default: the most accurate one")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="the original as a program, for a program of no study"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=list(_BATCHES),
        metavar="N",
        help="examples a call; default: 1 32",
    )
    parser.add_argument(
        "--runtime", nargs="+", choices=_RUNTIMES, default=list(_RUNTIMES), help="default: all three"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU; default: as many as PyTorch takes"
    )
    parser.add_argument("--device", help="cpu or cuda:0; default: as the study, else cpu")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="how long each model is measured in each case; default: 2"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it as .md, .csv or .json as well")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it where that is asked for."""
    _check(args)
    from compress_search.cli.log import logging_to_terminal

    with logging_to_terminal():
        table = _of_files(args) if _names_a_file(args.study) else _of_trial(args)
    titles, *rows = table.cells()
    print(format_table([titles, *rows], right=titles[1:]))
    print("\n" + "\n".join([table.caption, *table.remarks]))
    if args.output is not None:
        write_text_atomically(args.output, _written(table, args.output.suffix))
        print(args.output)
    return 0


def _check(args: argparse.Namespace) -> None:
    faults = []
    if args.output is not None and args.output.suffix not in _FORMATS:
        faults.append(f"--output is {str(args.output)!r}; its name must end with {', '.join(_FORMATS)}.")
    faults += [f"--batch is {batch}; it must be 1 or more." for batch in args.batch if batch < 1]
    if args.threads is not None and args.threads < 1:
        faults.append(f"--threads is {args.threads}; it must be 1 or more.")
    if not args.seconds >= 0:
        faults.append(f"--seconds is {args.seconds:g}; it must be 0 or more.")
    if _names_a_file(args.study):
        if args.trial is not None:
            faults.append(f"--trial is {args.trial}, but {args.study!r} is a program, not a study.")
    elif args.against is not None:
        faults.append("--against is for a program; of a study the original is known.")
    if faults:
        raise ConfigError(faults)


def _names_a_file(given: str) -> bool:
    """Whether it is a program rather than a study, whose name may have dots too."""
    path = Path(given)
    return path.is_file() or (path / "candidate.json").is_file() or path.suffix in (".pt2", ".onnx")


def _of_files(args: argparse.Namespace) -> LatencyTable:
    from compress_search.latency import COMPRESSED, ORIGINAL, load_program, measure_latency

    model, example = load_program(Path(args.study))
    models = {COMPRESSED: model}
    if args.against is not None:
        models = {ORIGINAL: load_program(args.against)[0], **models}
    return measure_latency(
        models,
        example,
        batches=args.batch,
        runtimes=args.runtime,
        device=args.device or "cpu",
        threads=args.threads,
        seconds=args.seconds,
    )


def _of_trial(args: argparse.Namespace) -> LatencyTable:
    place = find_study(args)
    config = place.config()
    study = place.open(config.load_task(), device=args.device or config.device)
    candidate = study.best() if args.trial is None else study.candidate(args.trial)
    table = study.benchmark_latency(
        candidate, batches=args.batch, runtimes=args.runtime, threads=args.threads, seconds=args.seconds
    )
    print(f"Trial {candidate.number} of {study.name!r}, mac_ratio {candidate.mac_ratio:.4f}.\n")
    return table


def _written(table: LatencyTable, suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(table.to_dict(), indent=2) + "\n"
    return table.to_markdown() if suffix == ".md" else table.to_csv()
