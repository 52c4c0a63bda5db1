"""What the dashboard says of a trial and of a study, as Markdown.

Whatever comes from outside (names of layers, values of settings, messages of exceptions, paths) is escaped:
it is shown as it is, and means nothing to Markdown or to a browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from compress_search.plain_text import duration
from compress_search.plan import CompressionPlan
from compress_search.reports.answer import summary_of, why_no_answer
from compress_search.reports.formatting import count, ratio
from compress_search.reports.layers import LayerRow
from compress_search.reports.plan_changes import plan_changes
from compress_search.reports.provenance import loading_code
from compress_search.reports.trials import stage_names
from compress_search.results import ParetoFront, Reference
from compress_search.search.trial_history import TrialHistory
from compress_search.stage_files import PLAN, WEIGHTS

_MEANS_SOMETHING = re.compile(r"[\\`*_\[\]<>&~|@!]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown reads as something else within a line: its signs, HTML, and what looks like a link."""


def escape_markdown(text: str) -> str:
    """Write text so that Markdown shows it as it is, on one line."""
    return _MEANS_SOMETHING.sub(r"\\\g<0>", " ".join(text.split()))


def trial_note(
    history: TrialHistory,
    *,
    reference: Reference,
    folder: Path | None = None,
    plan: CompressionPlan | None = None,
    layers: Sequence[LayerRow] | None = None,
) -> str:
    """Write what a trial is: its stages, what was reused, its layers, how to load it.

    Args:
        history: Everything that is known of it.
        reference: The original model's numbers.
        folder: Where the plan and weights of its last finished stage lie, if they are still there.
        plan: That plan, if it can be read.
        layers: The table of its layers with MACs, if the task is known.
    """
    return "\n\n".join(_paragraphs(history, reference, folder, plan, layers)) + "\n"


def study_note(front: ParetoFront, *, name: str) -> str:
    """Write what a study is after, and how far it is."""
    commands = [f"compress-search status {name}", f"compress-search report {name}"]
    chosen = front.most_accurate
    if chosen is not None:
        commands.append(f"compress-search export {name} --trial {chosen.number}")
        found = (
            f"Most accurate in the band: **trial {chosen.number}**, {chosen.accuracy:.4f} at "
            f"{ratio(chosen.mac_ratio)} of the MACs (original: {front.reference.accuracy:.4f})."
        )
    else:
        found = escape_markdown(why_no_answer(front))
    return "\n\n".join(
        [f"## {escape_markdown(name)}", escape_markdown(summary_of(front)), found, _code("\n".join(commands))]
    )


def _paragraphs(
    history: TrialHistory,
    reference: Reference,
    folder: Path | None,
    plan: CompressionPlan | None,
    layers: Sequence[LayerRow] | None,
) -> Iterator[str]:
    yield f"**{escape_markdown(history.headline)}**"
    if history.facts:
        yield "\n".join(f"* {escape_markdown(fact)}" for fact in history.facts)
    if history.stages or history.ahead:
        yield "### Stages"
        yield _stages(history, reference)
    if layers is not None:
        yield "### Layers"
        yield _layers(layers)
    elif plan is not None:
        yield "### Layers"
        yield _changes(plan)
        yield "MACs of each layer are in `layers.csv` below, where the study's task can be made."
    if folder is not None:
        yield "### Load it"
        yield _code(loading_code(folder / PLAN, folder / WEIGHTS), "python")
        yield "`original` is the model that was compressed."
    elif history.folder is not None:
        yield f"Its plan and weights have been removed from {escape_markdown(str(history.folder))}."
    if history.traceback:
        yield "### The end of its traceback"
        yield _code("\n".join(history.traceback))


def _stages(history: TrialHistory, reference: Reference) -> str:
    original = (f"{reference.accuracy:.4f}", ratio(1.0), count(reference.macs), count(reference.params))
    rows = [("original model", "", *original)]
    for label, stage in zip(stage_names(history.stages), history.stages, strict=True):
        time = f"reused, saved {duration(stage.seconds)}" if stage.reused else duration(stage.seconds)
        numbers = (f"{stage.accuracy:.4f}", ratio(stage.mac_ratio), count(stage.macs), count(stage.params))
        rows.append((label, time, *numbers))
    for place, label in enumerate(history.ahead):
        epochs = place == 0 and history.epochs is not None
        done = f"{history.epochs} of {history.of_epochs} epochs done" if epochs else "not finished"
        rows.append((label, done, "", "", "", ""))
    header = ("stage", "time", "accuracy", "mac_ratio", "MACs", "parameters")
    return _table(header, rows, numbers=(2, 3, 4, 5))


def _layers(rows: Sequence[LayerRow]) -> str:
    header = ("layer", "what was done", "left alone because", "MACs before", "MACs after", "ratio")
    cells = []
    for row in rows:
        macs = (count(row.macs_before), count(row.macs_after), f"{row.ratio:.2f}")
        cells.append((row.layer, row.done, row.left_alone, *macs))
    return _table(header, cells, numbers=(3, 4, 5))


def _changes(plan: CompressionPlan) -> str:
    changes = plan_changes(plan)
    cells = [(change.module, "; ".join(change.done), "; ".join(change.left_alone)) for change in changes]
    return _table(("layer", "what was done", "left alone because"), cells)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Write a table; the columns at ``numbers`` are aligned to the right."""
    rule = ["--:" if place in numbers else "---" for place in range(len(header))]
    lines = [header, rule, *([escape_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str, language: str = "") -> str:
    # A fence ends at as many backticks as it began with.
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
