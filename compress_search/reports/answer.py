"""The answer in words and numbers: the chosen model, or why there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from compress_search.accuracy_scale import AccuracyScale
from compress_search.reports.formatting import ratio, short_count
from compress_search.reports.target import target_text
from compress_search.results import Candidate, ParetoFront, format_param, param_names


@dataclass(frozen=True)
class AnswerFact:
    """One number of the answer: its name, its value, and what to compare it with."""

    name: str
    value: str
    note: str = ""


def summary_of(front: ParetoFront) -> str:
    """Say in one line what was asked for and how far the study is."""
    low, high = front.band
    searched = [candidate for candidate in front.candidates if candidate.finalist_of is None]
    states = Counter(candidate.state for candidate in searched)
    counts = ", ".join(f"{number} {state}" for state, number in states.most_common())
    feasible = sum(candidate.feasible for candidate in searched)
    trials = "1 trial" if len(searched) == 1 else f"{len(searched)} trials"
    found = f"{trials}: {counts}; {feasible} in the band." if states else "No trial yet."
    finalists = Counter(c.state for c in front.candidates if c.finalist_of is not None)
    if finalists:
        found += f" Finalists: {', '.join(f'{number} {state}' for state, number in finalists.most_common())}."
    return f"Target mac_ratio {target_text(front.target)}, band {low:.4g} to {high:.4g}. {found}"


def answer_facts(
    chosen: Candidate, front: ParetoFront, *, scale: AccuracyScale, test: tuple[float, float] | None
) -> list[AnswerFact]:
    """Gather the numbers of the chosen model.

    Args:
        chosen: A complete candidate.
        front: The study's candidates.
        scale: How accuracies are shown.
        test: Accuracy of the original and of the chosen model on the test data, if measured.
    """
    reference = front.reference
    facts = [
        AnswerFact(
            "validation accuracy",
            scale.accuracy(chosen.accuracy),
            f"original {scale.accuracy(reference.accuracy)}, drop {scale.drop(chosen.drop)}",
        ),
    ]
    if test is not None:
        original, own = test
        facts.append(
            AnswerFact(
                "test accuracy",
                scale.accuracy(own),
                f"original {scale.accuracy(original)}, drop {scale.drop(original - own)}",
            )
        )
    facts.append(AnswerFact("mac_ratio", ratio(chosen.mac_ratio), f"target {target_text(front.target)}"))
    if chosen.stages:
        last = chosen.stages[-1]
        facts += [
            AnswerFact("MACs per example", short_count(last.macs), f"of {short_count(reference.macs)}"),
            AnswerFact(
                "parameters",
                short_count(last.params),
                f"of {short_count(reference.params)}, ratio {ratio(last.params / reference.params)}",
            ),
        ]
    if chosen.finalist_of is not None:
        facts.append(AnswerFact("finalist of", f"trial {chosen.finalist_of}", "trained on for longer"))
    names = param_names([chosen])
    if names:
        facts.append(
            AnswerFact(
                "searched", " · ".join(format_param(chosen.params[n]) for n in names), " · ".join(names)
            )
        )
    return facts


def why_no_answer(front: ParetoFront) -> str:
    """Say why a study has no model to ship, and what to do."""
    candidates = front.candidates
    complete = [c for c in candidates if c.state == "complete" and c.mac_ratio is not None]
    low, high = front.band
    if not candidates:
        return "The study has no trial yet. Run some."
    if not complete:
        return (
            "No trial has completed. If trials failed or were pruned, their reasons are below: put right "
            "what they name, then run more trials."
        )
    if any(c.feasible for c in complete):
        return (
            "There are trials in the band, but none was chosen: none keeps the accuracy that was asked for. "
            "Allow a larger drop (max_drop), or run more trials."
        )
    nearest = min(complete, key=lambda c: max(low - (c.mac_ratio or 0.0), (c.mac_ratio or 0.0) - high))
    return (
        f"No complete trial has a mac_ratio in the band from {low:.4g} to {high:.4g}; the nearest is trial "
        f"{nearest.number} at {ratio(nearest.mac_ratio)}. Run more trials, or widen the tolerance."
    )
