"""The table of a benchmark: Markdown for people, CSV for programs, and what was wanted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import COMPRESS_SEARCH, Case, Effort, Result, asked_ratio
from benchmarks.csv_text import csv_text

COLUMNS = (
    "tool",
    "steps",
    "settings",
    "MACs of",
    "accuracy",
    "drop (points)",
    "MAC ratio",
    "asked",
    "seconds",
    "of them selection",
    "CPU seconds",
    "evaluations",
    "image forwards",
    "GB",
)
_TEXTS = 4
"""So many columns are text; the others are numbers, and stand to the right."""


@dataclass(frozen=True)
class Wanted:
    """What issue 4 wants of one of our cases beside its rival.

    Attributes:
        share_of_drop: Most that may be lost, as a share of what the rival loses.
        times_faster: The rival's time / ours, at least.
    """

    share_of_drop: float
    times_faster: float


def as_markdown(
    cases: Sequence[Case], results: Mapping[str, Result], wanted: Mapping[str, Wanted], head: str
) -> str:
    """The table with what comes of it.

    Args:
        cases: In the order of the rows.
        results: By name of case; a case without one has no row.
        wanted: By name of one of our cases.
        head: A line above the table.
    """
    present = [case for case in cases if case.name in results]
    original = next((results[case.name] for case in present), None)
    lines = [head, ""]
    if original is not None:
        lines += [
            f"The original: {original.original_accuracy:.2%}, {original.original_macs:,} MACs.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * _TEXTS + "--:|" * (len(COLUMNS) - _TEXTS),
        ]
    lines += ["| " + " | ".join(_texts(case, results[case.name])) + " |" for case in present]
    versions = sorted({r.effort.version for r in results.values() if r.effort is not None})
    if versions:
        lines += ["", "Versions: " + "; ".join(versions) + "."]
    return "\n".join([*lines, "", *findings(cases, results, wanted), ""])


def as_csv(cases: Sequence[Case], results: Mapping[str, Result]) -> str:
    """Every number of every case that was run, one row a case."""
    return csv_text([_record(case, results[case.name]) for case in cases if case.name in results])


def findings(cases: Sequence[Case], results: Mapping[str, Result], wanted: Mapping[str, Wanted]) -> list[str]:
    """Compare each of our cases with its rival, as far as both were run and neither failed."""
    lines = []
    for case in cases:
        ours, rival = results.get(case.name), results.get(case.rival or "")
        if case.tool != COMPRESS_SEARCH or ours is None or rival is None or ours.drop is None:
            continue
        if rival.drop is None or ours.effort is None or rival.effort is None:
            continue
        goal = wanted.get(case.name)
        share = f"{ours.drop / rival.drop:.2f}" if rival.drop > 0 else "no share"
        times = rival.effort.seconds / ours.effort.seconds
        forwards = rival.effort.image_forwards / ours.effort.image_forwards
        lines.append(
            f"* {case.name} beside {case.rival}: loses {share} of its {rival.drop:.2f} points"
            + (f" (wanted: at most {goal.share_of_drop})" if goal else "")
            + f", {times:.1f} times as fast"
            + (f" (wanted: at least {goal.times_faster:g})" if goal else "")
            + f", {forwards:.1f} times fewer image forwards."
        )
    return lines


def _texts(case: Case, result: Result) -> list[str]:
    steps = ", ".join(f"{step.method.replace('_', ' ')} {step.mac_ratio:g}" for step in case.steps)
    settings = ", ".join(f"{name}={value}" for name, value in case.settings.items())
    row = [case.tool, steps, settings, case.rival or ""]
    if result.accuracy is None or result.effort is None or result.mac_ratio is None:
        return [*row, f"failed: {result.error}".replace("|", "/"), *[""] * (len(COLUMNS) - len(row) - 1)]
    effort = result.effort
    return [
        *row,
        f"{result.accuracy:.2%}",
        f"{result.drop:.2f}",
        f"{result.mac_ratio:.4f}",
        "" if case.rival else f"{asked_ratio(case):.4f}",
        f"{effort.seconds:.1f}",
        "" if effort.selection_seconds is None else f"{effort.selection_seconds:.1f}",
        f"{effort.cpu_seconds:.1f}",
        "" if effort.evaluations is None else str(effort.evaluations),
        f"{effort.image_forwards:,.0f}",
        f"{effort.peak_gigabytes:.1f}",
    ]


def _record(case: Case, result: Result) -> dict[str, Any]:
    effort = dict.fromkeys(Effort.__dataclass_fields__) if result.effort is None else vars(result.effort)
    return {
        "case": case.name,
        "tool": case.tool,
        "network": case.network,
        "steps": " then ".join(f"{step.method} {step.mac_ratio:g}" for step in case.steps),
        "settings": "; ".join(f"{name}={value}" for name, value in case.settings.items()),
        "rival": case.rival,
        "seed": case.seed,
        "accuracy": result.accuracy,
        "drop_points": result.drop,
        "macs": result.macs,
        "mac_ratio": result.mac_ratio,
        "asked_ratio": asked_ratio(case),
        "original_accuracy": result.original_accuracy,
        "original_macs": result.original_macs,
        **effort,
        "error": result.error,
    }
