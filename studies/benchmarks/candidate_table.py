"""A table of real candidates of the digits study, for comparing samplers without training anything.

Launch it with ``python studies/benchmarks/candidate_table.py``; it takes some ten minutes of one thread. Each line
is one candidate with the settings of ``configs/digits.yaml``: the ratios that were asked, what spatial SVD
achieved, and what the candidate ended as. The first ratios are those of the study's grid. For each of them the
second one is what is missing to several ratios within the band around 0.5, and to those from 0.3 to 0.8 in
steps of 0.05. ``tests/search/test_recorded_table.py`` replays every sampler on it.

The script can be stopped at any time: finished stages are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from compress_search.config import StudyConfig
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.search.space import ratio_grid
from compress_search.stages import StageRunner
from compress_search.workspace import Workspace, write_text_atomically

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "configs" / "digits.yaml"
TABLE = Path(__file__).with_name("digits_candidates.csv")
FOLDER = ROOT / "runs" / "benchmarks" / "candidates"

STEP = 0.05
WITHIN_THE_BAND = (0.495, 0.4975, 0.5, 0.5025, 0.505, 0.5075, 0.51)
ACROSS_THE_RANGE = tuple(round(0.3 + STEP * i, 2) for i in range(11))


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        c_ssvd: Asked of spatial SVD; 1 leaves it out.
        c_cp: Asked of channel pruning, relative to what spatial SVD left; 1 leaves it out.
        achieved_ssvd: MACs after spatial SVD / MACs of the original.
        mac_ratio: MACs at the end / MACs of the original.
        accuracy: At the end, on the 600 validation images.
    """

    c_ssvd: float
    c_cp: float
    achieved_ssvd: float
    mac_ratio: float
    accuracy: float


def points() -> Iterator[tuple[float, float]]:
    """Yield the ratio asked of spatial SVD and that of both methods together."""
    for target in sorted({*WITHIN_THE_BAND, *ACROSS_THE_RANGE}):
        for first in ratio_grid(target, STEP):
            # The target itself leaves nothing to prune; within the band one such candidate is enough.
            if first != target or target in ACROSS_THE_RANGE:
                yield first, target


def row_of(runner: StageRunner, first: float, target: float, tuning: FineTune, samples: int) -> Row:
    """Make one candidate, or find it."""
    svd = Compress(method="spatial_svd", mac_ratio=first, samples=samples)
    achieved = runner.achieved_ratio([svd]) if first < 1 else 1.0
    second = min(1.0, target / achieved)
    pruning = Compress(method="channel_pruning", mac_ratio=second, samples=samples)
    stages = [stage for stage in (svd, pruning) if stage.mac_ratio < 1]
    last = runner.run(Recipe(tuple(part for stage in stages for part in (stage, tuning))))[-1]
    return Row(first, second, achieved, last.mac_ratio, last.accuracy)


def as_csv(rows: list[Row], runner: StageRunner) -> str:
    """Write the table, after a line that says how it was made."""
    text = io.StringIO()
    original = runner.original
    text.write("# python studies/benchmarks/candidate_table.py\n")
    text.write(f"# The original: accuracy {original.accuracy!r}, {original.macs} MACs.\n")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.8g}" for name, value in asdict(row).items()} for row in rows)
    return text.getvalue()


def main() -> None:
    """Make every candidate, and write the table."""
    parser = argparse.ArgumentParser(description="Record real candidates of the digits study.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of the stages (default {FOLDER})")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"to write (default {TABLE})")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = StudyConfig.load(CONFIGURATION)
    task, settings = config.load_task(), config.search
    torch.set_num_threads(1)
    runner = StageRunner(
        task,
        Workspace(given.folder).prepare(),
        seed=settings.seed,
        device=torch.device("cpu"),
        progress=Progress(),
    )
    tuning, samples = settings.fine_tune, settings.samples
    rows = [row_of(runner, first, target, tuning, samples) for first, target in sorted(points())]
    write_text_atomically(given.table, as_csv(rows, runner))


if __name__ == "__main__":
    main()
