"""The table of :mod:`benchmarks.field`: Markdown for people, CSV for programs, and who is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.cases import COMPRESS_SEARCH, Result
from benchmarks.csv_text import csv_text
from benchmarks.tunings import Tuned

COLUMNS = (
    "asked",
    "tool",
    "MAC ratio",
    "before fine-tuning",
    "after",
    "drop (points)",
    "networks",
    "fine-tunings",
    "CPU seconds to compress",
    "to fine-tune",
)
_TEXTS = 2
"""So many columns are text; the others are numbers, and stand to the right."""


@dataclass(frozen=True)
class Row:
    """What one tool made of the network at one share of the MACs, from one seed.

    Attributes:
        asked: The share of the MACs.
        tool: Which tool.
        seed: The seed.
        result: Of the compression.
        tuned: Of each fine-tuning; none while it is not run, and where the tool failed.
    """

    asked: float
    tool: str
    seed: int
    result: Result
    tuned: tuple[Tuned, ...]

    def __str__(self) -> str:
        if self.result.accuracy is None:
            return f"{self.tool} failed"
        after = f" to {mean(run.after for run in self.tuned):.4f}" if self.tuned else ""
        return f"{self.tool} {self.result.accuracy:.4f}{after}"


@dataclass(frozen=True)
class Line:
    """All seeds of one tool at one share of the MACs; those that failed are counted out.

    Attributes:
        asked: The share of the MACs.
        tool: Which tool.
        rows: The seeds that did not fail.
        error: The fault of one that did.
    """

    asked: float
    tool: str
    rows: tuple[Row, ...]
    error: str | None

    @property
    def before(self) -> list[float]:
        """The accuracy of each compressed network."""
        return [row.result.accuracy for row in self.rows if row.result.accuracy is not None]

    @property
    def after(self) -> list[float]:
        """The accuracy after each fine-tuning of them."""
        return [run.after for row in self.rows for run in row.tuned]


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Gather the seeds: from the most MACs to the fewest, the tools in the order of the rows."""
    gathered: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        gathered.setdefault((row.asked, row.tool), []).append(row)
    return [
        Line(
            asked,
            tool,
            tuple(row for row in found if row.result.error is None),
            next((row.result.error for row in found if row.result.error is not None), None),
        )
        for (asked, tool), found in sorted(gathered.items(), key=lambda item: -item[0][0])
    ]


def as_markdown(rows: Sequence[Row], head: str) -> str:
    """The table with what comes of it.

    Args:
        rows: All under the same conditions.
        head: A line above the table.
    """
    lines = lines_of(rows)
    if not lines:
        return head + "\n"
    original = rows[0].result
    texts = [head, ""]
    texts += [f"The original: {original.original_accuracy:.2%} of the test images.", ""]
    texts += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * _TEXTS + "--:|" * (len(COLUMNS) - _TEXTS)]
    texts += ["| " + " | ".join(_texts(line)) + " |" for line in lines]
    versions = sorted({row.result.effort.version for row in rows if row.result.effort is not None})
    return "\n".join([*texts, "", "Versions: " + "; ".join(versions) + ".", "", *findings(lines), ""])


def as_csv(rows: Sequence[Row]) -> str:
    """Every number of every fine-tuning, one row each; one for a network that has none."""
    return csv_text([_record(row, tuned) for row in rows for tuned in row.tuned or (None,)])


def findings(lines: Sequence[Line]) -> list[str]:
    """Hold ours against every other tool at the same share, before and after fine-tuning."""
    texts = []
    for ours in (line for line in lines if line.tool == COMPRESS_SEARCH):
        for other in (line for line in lines if line.asked == ours.asked and line.tool != ours.tool):
            for when, mine, theirs in (
                ("before", ours.before, other.before),
                ("after", ours.after, other.after),
            ):
                if mine and theirs:
                    texts.append(
                        f"* {ours.asked:g}, {when} fine-tuning, beside {other.tool}: "
                        f"{100 * (mean(mine) - mean(theirs)):+.2f} points, {_standing(mine, theirs)}."
                    )
    return texts


def _standing(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether the two are apart whatever the seed. One each has no spread."""
    if min(len(mine), len(theirs)) == 1:
        return "one each, so the spread is not known"
    if min(mine) > max(theirs):
        return "ahead with every seed"
    if max(mine) < min(theirs):
        return "behind with every seed"
    return "within the spread of the seeds"


def _texts(line: Line) -> list[str]:
    row = [f"{line.asked:g}", line.tool]
    if not line.rows:
        return [*row, f"failed: {line.error}".replace("|", "/"), *[""] * (len(COLUMNS) - len(row) - 1)]
    efforts = [row.result.effort for row in line.rows if row.result.effort is not None]
    tuned = [run for row in line.rows for run in row.tuned]
    return [
        *row,
        f"{mean(row.result.mac_ratio or 0.0 for row in line.rows):.4f}",
        _spread(line.before),
        _spread(line.after),
        f"{mean(run.drop for run in tuned):.2f}" if tuned else "",
        str(len(line.rows)),
        str(len(tuned)),
        f"{mean(effort.cpu_seconds for effort in efforts):.0f}",
        f"{mean(run.cpu_seconds for run in tuned):.0f}" if tuned else "",
    ]


def _spread(values: Sequence[float]) -> str:
    """The mean, and the lowest and the highest where there are several."""
    if not values:
        return ""
    text = f"{mean(values):.2%}"
    return text if len(values) == 1 else f"{text} ({100 * min(values):.2f}-{100 * max(values):.2f})"


def _record(row: Row, tuned: Tuned | None) -> dict[str, Any]:
    result, effort = row.result, row.result.effort
    return {
        "asked": row.asked,
        "tool": row.tool,
        "seed": row.seed,
        "mac_ratio": result.mac_ratio,
        "macs": result.macs,
        "original_accuracy": result.original_accuracy,
        "before": result.accuracy,
        "after": None if tuned is None else tuned.after,
        "drop_points": None if tuned is None else tuned.drop,
        "validation": None if tuned is None else tuned.validation,
        "compression_seconds": None if effort is None else effort.seconds,
        "compression_cpu_seconds": None if effort is None else effort.cpu_seconds,
        "fine_tuning_seconds": None if tuned is None else tuned.seconds,
        "fine_tuning_cpu_seconds": None if tuned is None else tuned.cpu_seconds,
        "image_forwards": None if effort is None else effort.image_forwards,
        "version": None if effort is None else effort.version,
        "error": result.error,
    }
