"""Ratio selection beside AIMET and Torch-Pruning on ResNet-20 / CIFAR-10, without any fine-tuning.

Launch it with ``python studies/benchmarks/ratio_selection.py``. It trains the network if its weights are not
there, makes AIMET's virtual environment if need be, runs every case in a process of its own, one after the
other, and writes the table as Markdown and as CSV to ``runs/benchmarks``. It can be stopped at any time: a
case whose result is there is not run again. ``--only 'aimet-*'`` runs some cases, ``--again`` runs them anew,
``--table`` runs none and prints what there is. Times mean something on a machine that does nothing else.

The tools see the same images. AIMET scores candidates by the accuracy on 500 labelled images, which were held
out of the network's training; unlabelled images for reconstruction and calibration are the first of the
training images. The 10,000 test images are the judge's alone. MACs are counted by PyTorch's flop counter.

Each of our cases that has a rival may spend as many MACs as the rival's network has, and no more.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import AIMET, COMPRESS_SEARCH, TORCH_PRUNING, Case, Result, Step
from benchmarks.running import Laboratory
from benchmarks.table import Wanted, as_csv, as_markdown

FOLDER = Path("runs/benchmarks")
NETWORK = "resnet20"

SVD = (Step("spatial_svd", 0.5),)
PRUNING = (Step("channel_pruning", 0.5),)
BOTH = (Step("spatial_svd", 0.75), Step("channel_pruning", 0.66))
"""The guidebook's way to one half."""

OPTIMAL = {"selection": "optimal"}
MORE_IMAGES = {**OPTIMAL, "samples": 1_024, "scoring_samples": 256}
MANY_IMAGES = {**OPTIMAL, "samples": 2_048, "scoring_samples": 512}
"""Beside a rival that looks at 5,000 images or more."""

AIMET_CASES = (
    Case("aimet-svd", AIMET, NETWORK, SVD),
    Case("aimet-svd-monotonic", AIMET, NETWORK, SVD, {"monotonic_fit": True}),
    Case("aimet-pruning-500", AIMET, NETWORK, PRUNING, {"reconstruction_samples": 500}),
    Case("aimet-pruning-5000", AIMET, NETWORK, PRUNING, {"reconstruction_samples": 5_000}),
    Case("aimet-both-5000", AIMET, NETWORK, BOTH, {"reconstruction_samples": 5_000}),
)
LONG_CASES = (Case("aimet-pruning-50000", AIMET, NETWORK, PRUNING, {"reconstruction_samples": 50_000}),)
"""What AIMET recommends; hours on a CPU."""

OUR_CASES = tuple(
    Case(f"ours-{name}beside-{rival.name}", COMPRESS_SEARCH, NETWORK, rival.steps, settings, rival=rival.name)
    for rival in (*AIMET_CASES, *LONG_CASES)
    for name, settings in (("", OPTIMAL), ("more-images-", MORE_IMAGES), ("many-images-", MANY_IMAGES))
    if settings is OPTIMAL or rival.settings.get("reconstruction_samples", 0) > 500
)
OUR_TARGETS = tuple(
    Case(f"ours-{name}", COMPRESS_SEARCH, NETWORK, steps, OPTIMAL)
    for name, steps in (("svd", SVD), ("pruning", PRUNING), ("both", BOTH))
)
"""The same targets as AIMET was given, to see how near each comes."""

TORCH_PRUNING_CASES = tuple(
    Case(
        f"torch-pruning-{importance}{'-batchnorm' if batchnorm else ''}{suffix}",
        TORCH_PRUNING,
        NETWORK,
        PRUNING,
        {"importance": importance, "batchnorm": batchnorm},
        rival=rival,
    )
    for rival, suffix in (("aimet-pruning-5000", ""), ("aimet-both-5000", "-beside-aimet-both-5000"))
    for importance in ("magnitude", "taylor")
    for batchnorm in (False, True)
)

CASES = (*AIMET_CASES, *OUR_CASES, *OUR_TARGETS, *TORCH_PRUNING_CASES)

WANTED = {
    case.name: Wanted(share_of_drop=0.2 if case.steps == SVD else 0.5, times_faster=10) for case in OUR_CASES
}
"""Issue 4's wishes."""


def ordered(cases: tuple[Case, ...]) -> Iterator[Case]:
    """Rivals before those who are held against them."""
    yield from sorted(cases, key=lambda case: case.rival is not None)


def matching(cases: Iterable[Case], pattern: str) -> list[Case]:
    """The cases whose names match a pattern."""
    return [case for case in cases if fnmatch.fnmatch(case.name, pattern)]


def asked(parser: argparse.ArgumentParser, cases: Sequence[Case], pattern: str, more: str = "") -> list[Case]:
    """The cases that match a pattern; the program ends, with all names and ``more``, where none does."""
    found = matching(cases, pattern)
    if not found:
        parser.error(f"no case is called {pattern!r}: {', '.join(case.name for case in cases)}.{more}")
    return found


def run(laboratory: Laboratory, *, only: str, again: bool, table: bool, long: bool) -> dict[str, Result]:
    """Run the cases that match and are not there yet; return all results by name of case."""
    results: dict[str, Result] = {}
    wanted = [] if table else matching((*CASES, *(LONG_CASES if long else ())), only)
    for case in ordered((*CASES, *LONG_CASES)):
        known = list(results.values())
        chosen = case in wanted
        result = laboratory.stored(case, known)
        request = laboratory.request(case, known)
        if chosen and request is None:
            print(f"{case.name}: {case.rival} has no result to be held against.", flush=True)
        elif chosen and request is not None and (again or result is None):
            print(f"{case.name}: running", flush=True)
            result = laboratory.run(request)
            outcome = result.error or f"{result.accuracy:.4f} at {result.mac_ratio:.4f}"
            print(f"{case.name}: {outcome}", flush=True)
        if result is not None:
            results[case.name] = result
    return results


def main() -> None:
    """Run what is asked for; print the table and write it."""
    parser = argparse.ArgumentParser(description="Ratio selection beside AIMET and Torch-Pruning.")
    parser.add_argument("--threads", type=int, default=2, help="of each tool (default 2)")
    parser.add_argument("--only", default="*", help="the cases to run, a pattern")
    parser.add_argument("--again", action="store_true", help="run them though their results are there")
    parser.add_argument("--long", action="store_true", help="run those that take hours too")
    parser.add_argument("--table", action="store_true", help="run none")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default {FOLDER}")
    given = parser.parse_args()
    offered = (*CASES, *(LONG_CASES if given.long else ()))
    asked(parser, offered, given.only, more="" if given.long else " With --long there are more.")
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    laboratory = Laboratory(given.folder, given.threads)
    results = run(laboratory, only=given.only, again=given.again, table=given.table, long=given.long)
    shown = (*CASES, *LONG_CASES)
    head = f"{NETWORK} on CIFAR-10, no fine-tuning, {given.threads} threads."
    text = as_markdown(shown, results, WANTED, head)
    (given.folder / f"{NETWORK}.md").write_text(text)
    (given.folder / f"{NETWORK}.csv").write_text(as_csv(shown, results))
    print(text)


if __name__ == "__main__":
    main()
