"""AIMET, Torch-Pruning and compress_search at 0.7, 0.5 and 0.33 of the MACs, before and after fine-tuning.

Launch it with ``python studies/benchmarks/field.py``. From each seed and at each share of the MACs AIMET
compresses first, by spatial SVD and then by channel pruning, or with ``--plan spatial_svd`` by the first
alone; compress_search does the same, and Torch-Pruning prunes, each to no more MACs than AIMET has left. Then
the same code fine-tunes all three for as many epochs, from the same seeds and taught by the original network.
The network, its images, who judges and what is kept are those of :mod:`benchmarks.ratio_selection` and
:mod:`benchmarks.fine_tuning`.

Nothing is fine-tuned between the two methods: AIMET's process does not keep the network that it has there.

The script can be stopped at any time: what is there is not run again. The table goes to ``runs/benchmarks``,
as Markdown and as CSV.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import AIMET, COMPRESS_SEARCH, TORCH_PRUNING, Case, Result
from benchmarks.field_cases import PLANS, SPLITS, cases_of
from benchmarks.field_table import Row, as_csv, as_markdown
from benchmarks.fine_tuning import Bench, add_conditions, bench_of
from benchmarks.ratio_selection import NETWORK
from benchmarks.tunings import Tuned, keep, stored

TOOLS = (AIMET, COMPRESS_SEARCH, TORCH_PRUNING)
"""Each of them."""


def run(
    bench: Bench,
    network: str,
    ratios: Sequence[float],
    seeds: Sequence[int],
    *,
    plan: str = "both",
    tools: Sequence[str] = TOOLS,
    tunings: int,
    table: bool,
    written: Callable[[Sequence[Row]], None],
) -> list[Row]:
    """Run what is not there yet; return what there is.

    Seed after seed, so that whenever it is stopped, as many shares of the MACs as can be have been run alike.

    Args:
        bench: The conditions.
        network: Name of the network.
        ratios: Shares of the MACs, keys of :data:`benchmarks.field_cases.SPLITS`.
        seeds: To compress from.
        plan: What AIMET and ours do, one of :data:`benchmarks.field_cases.PLANS`.
        tools: Whose networks are fine-tuned. Of the others only AIMET compresses.
        tunings: So many fine-tunings of each compressed network, from seeds of their own.
        table: Run none.
        written: Called with all rows so far after each seed and share.
    """
    rows: list[Row] = []
    asked = list(itertools.product(seeds, ratios))
    with bench.progress.bar("shares of the MACs", len(asked)) as advance:
        for seed, ratio in asked:
            cases = [
                case for case in cases_of(network, ratio, seed, plan=plan) if case.tool in (AIMET, *tools)
            ]
            found = compared(bench, cases, ratio, tools=tools, tunings=tunings, table=table)
            rows += found
            written(rows)
            advance(f"{ratio:g}, seed {seed}: " + ", ".join(map(str, found)))
    return rows


def compared(
    bench: Bench, cases: Sequence[Case], ratio: float, *, tools: Sequence[str], tunings: int, table: bool
) -> list[Row]:
    """Compress and fine-tune by each tool; what is there is not run again.

    Args:
        bench: The conditions.
        cases: Of one share of the MACs and one seed; AIMET's first.
        ratio: That share.
        tools: Whose networks are fine-tuned.
        tunings: So many fine-tunings of each.
        table: Run none.
    """
    rows = []
    results: list[Result] = []
    for case in cases:
        if results and results[0].error is not None:
            case = replace(case, rival=None)  # Where AIMET has failed, its MACs are no measure.
        result = bench.laboratory.stored(case, results)
        if result is None and not table:
            request = bench.laboratory.request(case, results)
            assert request is not None  # The rival was run before.
            result = bench.laboratory.run(request)
        if result is None:
            continue
        results.append(result)
        is_tuned = result.error is None and case.tool in tools
        tuned = list(fine_tuned(bench, case, result, tunings, table=table)) if is_tuned else []
        rows.append(Row(ratio, case.tool, case.seed, result, tuple(tuned)))
    return rows


def fine_tuned(bench: Bench, case: Case, result: Result, tunings: int, *, table: bool) -> Iterator[Tuned]:
    """Fine-tune a compressed network from several seeds, or find what came of it before."""
    for seed in range(tunings):
        tuning = bench.tuning(case, seed, distilled=True)
        tuned = stored(tuning, bench.folder)
        if tuned is None and not table:
            tuned = bench.run(case, result, tuning)
            keep(tuning, tuned, bench.folder)
        if tuned is not None:
            yield tuned


def main() -> None:
    """Run what is asked for; print the table and write it."""
    parser = argparse.ArgumentParser(description="Three tools at three shares of the MACs.")
    parser.add_argument("--ratios", type=float, nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--plan", choices=PLANS, default="both", help="of AIMET and ours (default both)")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="to fine-tune (default all)")
    add_conditions(parser)
    parser.add_argument("--seeds", type=int, default=1, help="to compress from (default 1)")
    parser.add_argument("--tunings", type=int, default=2, help="of each compressed network (default 2)")
    given = parser.parse_args()
    bench = bench_of(given)
    head = (
        f"{NETWORK} on CIFAR-10, {given.epochs} epochs of distilled fine-tuning at lr {given.lr:g}, "
        f"{given.threads} thread{'s' if given.threads > 1 else ''}."
    )

    def write(rows: Sequence[Row]) -> None:
        name = "field" if given.plan == "both" else f"field-{given.plan}"
        (given.folder / f"{name}.md").write_text(as_markdown(rows, head))
        (given.folder / f"{name}.csv").write_text(as_csv(rows))

    rows = run(
        bench,
        NETWORK,
        given.ratios,
        range(given.seeds),
        plan=given.plan,
        tools=given.tools,
        tunings=given.tunings,
        table=given.table,
        written=write,
    )
    print(as_markdown(rows, head))


if __name__ == "__main__":
    main()
