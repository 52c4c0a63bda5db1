"""A study's answer: which candidate to ship, in words and as files."""

from __future__ import annotations

from pathlib import Path

from compress_search.accuracy_scale import AccuracyScale
from compress_search.exceptions import StudyError
from compress_search.results import Candidate
from compress_search.search.study import CompressionStudy


def choose(study: CompressionStudy, max_drop: float | None) -> tuple[Candidate, str]:
    """Pick the model to ship.

    Args:
        study: The study.
        max_drop: Largest acceptable drop of accuracy; ``None`` asks for the most accurate candidate.

    Returns:
        The candidate, and why it is this one. If none is within ``max_drop``, the most accurate one.

    Raises:
        StudyError: No candidate is feasible.
    """
    if max_drop is None:
        return study.best(), "the most accurate one in the band"
    most_accurate = study.best()
    try:
        return study.best(max_drop=max_drop), f"the fewest MACs within a drop of {max_drop:g}"
    except StudyError:
        return most_accurate, f"none drops at most {max_drop:g}, so the most accurate one"


def print_answer(study: CompressionStudy, max_drop: float | None) -> int:
    """Print the front and the choice, test and export the chosen model, and write the report.

    Returns:
        The exit status: 0, or 1 if no trial is feasible.
    """
    reference = study.reference
    scale = AccuracyScale.of([reference.accuracy])
    print(
        f"Original: validation accuracy {scale.accuracy(reference.accuracy)}, {reference.macs:,} MACs, "
        f"{reference.params:,} parameters.\n"
    )
    try:
        chosen, why = choose(study, max_drop)
    except StudyError as error:
        print(f"{error}\n\nReport    {shorten(study.report().page)}")
        return 1
    assert chosen.mac_ratio is not None
    print(f"Front of the study {study.name!r}:\n{study.front()}\n")
    origin = "" if chosen.finalist_of is None else f", a finalist of trial {chosen.finalist_of}"
    print(
        f"Chosen: trial {chosen.number}{origin} ({why}).\n"
        f"Validation accuracy {scale.accuracy(chosen.accuracy)} (drop {scale.drop(chosen.drop)}), "
        f"mac_ratio {chosen.mac_ratio:.4f}."
    )
    if study.task is not None and study.task.test is not None:
        score = study.test(chosen)
        tested, before = scale.accuracy(score.candidate), scale.accuracy(score.original)
        print(f"Test accuracy {tested}; the original's {before}.")
    exported = study.export(chosen)
    report = study.report(chosen)
    print()
    for label, path in (
        ("Report", report.page),
        ("Plot", report.plot),
        ("Picture", report.picture),
        ("Model", exported.folder),
    ):
        print(f"{label:<10}{shorten(path)}")
    return 0


def shorten(path: Path) -> Path:
    """Return a path relative to the current folder, if it lies there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
