"""Compress a model as one stage says: analyse, choose the size of every layer, apply.

Usable without any study::

    from compress_search import Compress, compress

    compressed = compress(model, example_input, batches, Compress(method="spatial_svd", mac_ratio=0.5))
    compressed.model, compressed.step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress_search.calibration import with_best_batchnorm
from compress_search.disk_space import write_when_there_is_room
from compress_search.exceptions import ConfigError
from compress_search.fingerprint import content_hash, model_fingerprint
from compress_search.memory_layout import in_quickest_layout
from compress_search.methods import METHODS
from compress_search.methods.method import Analysis, Compressed, Sizes
from compress_search.progress import Progress
from compress_search.recipe import Compress
from compress_search.selection import SELECTORS
from compress_search.selection.choices import budget_within_reach, size_choices
from compress_search.selection.request import SelectionRequest
from compress_search.selection.sensitivity import (
    Found,
    Score,
    cells_of_errors,
    measure_by_divergence,
    measure_by_score,
)
from compress_search.selection.table import Cell, SensitivityTable
from compress_search.selection.table_store import TableStore

_TABLE_FORMAT = 4
"""Part of the name of every table. Raise it when the same settings would give other numbers than before."""


@dataclass(frozen=True)
class TableSource:
    """Where sensitivity tables come from.

    Attributes:
        calibration: Inputs to compress with, each ``(batch, ...)``; empty for the data-free mode.
        data: Fingerprint of the data that ``calibration`` and ``score`` take.
        score: The user's own judgement, for ``sensitivity="score"``.
        store: Where tables are kept; ``None`` keeps none.
        progress: Where to show the measurement.
    """

    calibration: Sequence[Tensor]
    data: str = ""
    score: Score | None = None
    store: TableStore | None = None
    progress: Progress | None = None


def compress(
    model: nn.Module,
    example_input: Tensor,
    batches: Sequence[Tensor],
    stage: Compress,
    *,
    score: Score | None = None,
    table: SensitivityTable | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a model without any study, and without training.

    Args:
        model: The trained model. It is not changed.
        example_input: ``(batch, ...)``, something ``model(example_input)`` accepts.
        batches: Unlabelled calibration inputs, each ``(batch, ...)``; empty for the data-free mode.
        stage: What to do. Its ``samples`` is of no effect: all batches are used.
        score: Evaluates a model, higher is better; for ``sensitivity="score"``.
        table: A table that :func:`measure_sensitivity` measured of this model; measured anew where it is
            needed and ``None``.
        progress: Where to show what takes long.

    Returns:
        The compressed model, and what was done, for a plan.

    Raises:
        ConfigError: The table is that of another model, or the stage has a ``per_layer_fine_tune``.
        RatioError: The ratio cannot be reached.
        ModelError: The model cannot be analysed, or its weights or activations are not finite.
    """
    if stage.per_layer_fine_tune is not None:
        raise ConfigError(
            [
                f"per_layer_fine_tune is {stage.per_layer_fine_tune!r}, but compress() has no data to train "
                "on. Leave it out here, or search with create_study(..., per_layer_fine_tune=...): its task "
                "has training data."
            ]
        )
    analysis = analyse(model, example_input, stage)
    batches = in_quickest_layout(model, batches)
    source = TableSource(batches, score=score, progress=progress)
    sizes = choose_sizes(analysis, stage, source, table=table)
    return apply(analysis, sizes, batches)


def measure_sensitivity(
    model: nn.Module,
    example_input: Tensor,
    batches: Sequence[Tensor],
    stage: Compress,
    *,
    score: Score | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Measure how much the output suffers when each layer, or group of channels, alone is compressed.

    Args:
        model: The trained model. It is not changed.
        example_input: ``(batch, ...)``, something ``model(example_input)`` accepts.
        batches: Unlabelled calibration inputs, each ``(batch, ...)``.
        stage: The method, and how to measure. Its ratio is of no effect.
        score: Evaluates a model, higher is better; for ``sensitivity="score"``.
        progress: Where to show it.

    Returns:
        A table for :func:`compress`, at any ratio; ``table.to_dataframe()`` shows it.

    Raises:
        ConfigError: ``sensitivity="score"`` without a score.
        EvaluationError: The score failed at a cell.
        ModelError: The model cannot be analysed, or its weights or activations are not finite.
    """
    analysis = analyse(model, example_input, stage)
    source = TableSource(in_quickest_layout(model, batches), score=score, progress=progress)
    return sensitivity_table(analysis, stage, source)


def analyse(model: nn.Module, example_input: Tensor, stage: Compress) -> Analysis:
    """Look at a model as a stage's method does.

    Raises:
        ModelError: See :meth:`compress_search.methods.method.Method.analyse`.
    """
    method = METHODS[stage.method]
    return method.analyse(model, example_input, ignore=stage.ignore, keep_channels=stage.keep_channels)


def choose_sizes(
    analysis: Analysis, stage: Compress, source: TableSource, *, table: SensitivityTable | None = None
) -> Sizes:
    """Choose the size of every unit.

    Args:
        analysis: The method's view of the model.
        stage: What to do.
        source: Where a table comes from, if the selector needs one.
        table: A table to use in place of measuring one.

    Raises:
        RatioError: The ratio cannot be reached.
        ConfigError: The table is that of another model.
    """
    selector = SELECTORS[stage.selection]
    request = SelectionRequest(
        ratio=stage.mac_ratio,
        cost=stage.cost,
        round_to=stage.round_to,
        least_share=stage.least_share,
        shares=stage.shares,
    )
    if selector.needs_table and table is None:
        # Said before the table is measured, which can take hours.
        budget_within_reach(analysis, request, size_choices(analysis, request))
        table = sensitivity_table(analysis, stage, source)
    if table is not None and table.fingerprint != fingerprint_of(analysis, stage):
        raise ConfigError(
            [
                "The sensitivity table was measured on another model, method or selection of layers: its "
                f"fingerprint is {table.fingerprint!r}, and here it would be "
                f"{fingerprint_of(analysis, stage)!r}. Measure it again with measure_sensitivity."
            ]
        )
    return selector.select(analysis, request, table)


def apply(analysis: Analysis, sizes: Sizes, batches: Sequence[Tensor]) -> Compressed:
    """Build the compressed model, with the BatchNorm statistics that diverge least."""
    compressed = analysis.apply(sizes, batches)
    model = with_best_batchnorm(compressed.model, analysis.model, batches)
    return Compressed(model, compressed.step)


def sensitivity_table(analysis: Analysis, stage: Compress, source: TableSource) -> SensitivityTable:
    """Measure how much the output suffers when each unit alone is compressed, or read what was measured.

    Args:
        analysis: The method's view of the model.
        stage: How to measure: its ``sensitivity``, ``scoring_samples`` and ``on_cell_error``.
        source: What to measure with.

    Raises:
        ConfigError: ``sensitivity="score"`` without a score.
        EvaluationError: The score failed at a cell.
    """
    if stage.sensitivity == "score" and source.score is None:
        raise ConfigError(["sensitivity is 'score', but there is no score; give score=..., or 'divergence'."])
    fingerprint = fingerprint_of(analysis, stage)
    if stage.sensitivity == "divergence" and not source.calibration:
        return SensitivityTable(cells_of_errors(analysis), fingerprint)
    if source.store is None:
        return SensitivityTable(_measure(analysis, stage, source, {}, lambda _: None), fingerprint)
    store, identity = source.store, _identity(fingerprint, stage, source)

    def keep(cells: Sequence[Cell]) -> None:
        say = (source.progress or Progress()).say
        write_when_there_is_room(lambda: store.append(identity, cells), store.workspace.root, say=say)

    with store.measuring(identity):
        known = store.cells(identity)
        cells = _measure(analysis, stage, source, known, keep)
    return SensitivityTable(cells, fingerprint)


def stored_table(analysis: Analysis, stage: Compress, source: TableSource) -> SensitivityTable:
    """Read what :func:`sensitivity_table` has stored so far, and measure nothing; it may have no cells."""
    fingerprint = fingerprint_of(analysis, stage)
    known = {} if source.store is None else source.store.cells(_identity(fingerprint, stage, source))
    units = {unit.name: place for place, unit in enumerate(analysis.units)}
    cells = [cell for cell in known.values() if cell.unit in units]
    return SensitivityTable(tuple(sorted(cells, key=lambda c: (units[c.unit], c.size))), fingerprint)


def fingerprint_of(analysis: Analysis, stage: Compress) -> str:
    """Hash what a table's units and sizes depend on: the model, the method, and what is left alone."""
    left = {"ignore": list(stage.ignore), "keep_channels": stage.keep_channels}
    return content_hash({"model": model_fingerprint(analysis.model), "method": stage.method, **left})


def _identity(fingerprint: str, stage: Compress, source: TableSource) -> dict[str, Any]:
    return {
        "format": _TABLE_FORMAT,
        "fingerprint": fingerprint,
        "data": source.data,
        "samples": stage.samples,
        "sensitivity": stage.sensitivity,
        "scoring_samples": stage.scoring_samples,
        "probes": stage.probes,
    }


def _measure(
    analysis: Analysis,
    stage: Compress,
    source: TableSource,
    known: Mapping[tuple[str, int], Cell],
    found: Found,
) -> tuple[Cell, ...]:
    progress = source.progress or Progress()
    if stage.sensitivity == "score":
        assert source.score is not None
        return measure_by_score(
            analysis,
            source.calibration,
            source.score,
            on_error=stage.on_cell_error,
            known=known,
            found=found,
            progress=progress,
        )
    scoring = last_samples(source.calibration, stage.scoring_samples)
    return measure_by_divergence(
        analysis,
        source.calibration,
        scoring,
        probes=stage.probes,
        known=known,
        found=found,
        progress=progress,
    )


def last_samples(batches: Sequence[Tensor], samples: int) -> list[Tensor]:
    """Take the last so many samples, or all if there are fewer."""
    taken: list[Tensor] = []
    for batch in reversed(batches):
        if samples <= 0:
            break
        taken.insert(0, batch[-samples:])
        samples -= len(batch)
    return taken
