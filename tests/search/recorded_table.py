"""A runner whose candidates were recorded: real ratios and accuracies of the digits study, in no time."""

from __future__ import annotations

import csv
from pathlib import Path

from compress_search.recipe import Compress
from compress_search.results import Reference, StageResult

TABLE = Path(__file__).parents[2] / "studies" / "benchmarks" / "digits_candidates.csv"


def read_table():
    """Return the original's accuracy, and the rows as mappings of numbers."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    original = next(line for line in lines if line.startswith("# The original: accuracy "))
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    accuracy = float(original.split("accuracy ")[1].split(",")[0])
    return accuracy, [{name: float(value) for name, value in row.items()} for row in rows]


class RecordedRunner:
    """Answers with the recorded candidate whose asked ratios are nearest, the first one before the second."""

    def __init__(self, rows, reference):
        self.rows = rows
        self.macs = reference.macs

    def achieved_ratio(self, stages):
        (stage,) = stages
        return self._nearest(stage.mac_ratio, 1.0)["achieved_ssvd"]

    def run(self, recipe, *, after_stage=None, after_epoch=None):
        asked = {stage.method: stage.mac_ratio for stage in recipe.stages if isinstance(stage, Compress)}
        row = self._nearest(asked.get("spatial_svd", 1.0), asked.get("channel_pruning", 1.0))
        results = []
        for position, stage in enumerate(recipe.stages):
            ended = position >= len(recipe.stages) - 2
            ratio = row["mac_ratio"] if ended else row["achieved_ssvd"]
            results.append(
                StageResult(
                    key=f"{row['c_ssvd']:.4f}-{row['c_cp']:.6f}-{position}",
                    name=stage.name,
                    accuracy=row["accuracy"],
                    macs=round(ratio * self.macs),
                    params=1,
                    mac_ratio=ratio,
                    seconds=1.0,
                )
            )
            after_stage(stage, results[-1])
        return tuple(results)

    def _nearest(self, first, second):
        return min(self.rows, key=lambda row: (abs(row["c_ssvd"] - first), abs(row["c_cp"] - second)))


def recorded():
    """Return the reference and a runner of the table."""
    accuracy, rows = read_table()
    reference = Reference(accuracy=accuracy, macs=828_736, params=1)
    return reference, RecordedRunner(rows, reference)


def area_under_front(trials, low, high):
    """Mean over the budgets from ``low`` to ``high`` of the best accuracy within each, or 0."""
    area, best, at = 0.0, 0.0, low
    for ratio, accuracy in sorted((t.values[1], t.values[0]) for t in trials):
        if accuracy > best and ratio < high:
            area += best * (max(ratio, low) - at)
            best, at = accuracy, max(ratio, low)
    return (area + best * (high - at)) / (high - low)
