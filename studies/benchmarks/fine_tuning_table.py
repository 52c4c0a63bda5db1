"""The table of fine-tunings: Markdown for people, CSV for programs, and who loses less."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.csv_text import csv_text
from benchmarks.tunings import Tuned, Tuning

Rows = Sequence[tuple[Tuning, Tuned]]
"""Each fine-tuning with what came of it."""

COLUMNS = (
    "case",
    "taught by",
    "MAC ratio",
    "before",
    "after",
    "lowest",
    "highest",
    "drop (points)",
    "seeds",
    "seconds",
    "CPU seconds",
)
_TEXTS = 2
"""So many columns are text; the others are numbers, and stand to the right."""


@dataclass(frozen=True)
class Line:
    """All seeds of one case that was taught in one way.

    Attributes:
        case: Name of the case.
        distilled: Whether the original network taught.
        runs: What came of each seed.
    """

    case: str
    distilled: bool
    runs: tuple[Tuned, ...]

    @property
    def drop(self) -> float:
        """Accuracy lost, in percentage points, the mean of the seeds."""
        return mean(run.drop for run in self.runs)

    @property
    def is_ours(self) -> bool:
        """Whether compress_search compressed the network."""
        return self.case.startswith("ours-")


def lines_of(rows: Rows) -> list[Line]:
    """Gather the seeds, in the order of the rows."""
    gathered: dict[tuple[str, bool], list[Tuned]] = {}
    for tuning, tuned in rows:
        gathered.setdefault((tuning.case, tuning.distilled), []).append(tuned)
    return [Line(case, distilled, tuple(runs)) for (case, distilled), runs in gathered.items()]


def as_markdown(rows: Rows, head: str) -> str:
    """The table with what comes of it.

    Args:
        rows: All of the same settings, distillation apart.
        head: A line above the table.
    """
    lines = lines_of(rows)
    if not lines:
        return head + "\n"
    texts = [head, "", f"The original: {lines[0].runs[0].original:.2%} of the test images.", ""]
    texts += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * _TEXTS + "--:|" * (len(COLUMNS) - _TEXTS)]
    texts += ["| " + " | ".join(_texts(line)) + " |" for line in lines]
    return "\n".join([*texts, "", *findings(lines), ""])


def as_csv(rows: Rows) -> str:
    """Every number of every fine-tuning, one row each."""
    return csv_text([_record(tuning, tuned) for tuning, tuned in rows])


def findings(lines: Sequence[Line]) -> list[str]:
    """Hold each of our cases, distilled, against every other tool's, however those were taught."""
    ours = [line for line in lines if line.is_ours and line.distilled]
    others = [line for line in lines if not line.is_ours]
    return [
        f"* {one.case}, distilled, loses {one.drop:.2f} points; {other.case}, {_teacher(other)}, "
        f"{other.drop:.2f}: {'less' if one.drop < other.drop else 'not less'} (wanted: less)."
        for one, other in itertools.product(ours, others)
    ]


def _record(tuning: Tuning, tuned: Tuned) -> dict[str, Any]:
    asked = dataclasses.asdict(tuning)
    settings = asked.pop("settings")
    return {**asked, **settings, **dataclasses.asdict(tuned), "drop_points": tuned.drop}


def _teacher(line: Line) -> str:
    return "distilled" if line.distilled else "labels alone"


def _texts(line: Line) -> list[str]:
    after = [run.after for run in line.runs]
    first = line.runs[0]
    return [
        line.case,
        "labels and the original" if line.distilled else "labels",
        f"{first.mac_ratio:.4f}",
        f"{first.before:.2%}",
        f"{mean(after):.2%}",
        f"{min(after):.2%}",
        f"{max(after):.2%}",
        f"{line.drop:.2f}",
        str(len(after)),
        f"{mean(run.seconds for run in line.runs):.0f}",
        f"{mean(run.cpu_seconds for run in line.runs):.0f}",
    ]
