"""Measuring the sensitivity table, in a fraction of the time that compressing unit by unit would take.

No compressed model is built: each unit is imitated on the dense model by other parameters, and all its
sizes share one factorisation. What runs before the unit runs once for all its sizes
(:mod:`compress_search.replay`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.divergence import Divergence, divergence_of
from compress_search.exceptions import EvaluationError
from compress_search.methods.method import Analysis, Imitation, Unit
from compress_search.profile import inference_mode_of
from compress_search.progress import Progress
from compress_search.replay import Prefix
from compress_search.selection.table import Cell

logger = logging.getLogger("compress_search")

CANDIDATES = 10
"""Number of shares at which each unit is looked at, its full size included."""

Score = Callable[[nn.Module], float]
"""The user's own judgement of a model; higher is better."""

Found = Callable[[Sequence[Cell]], None]
"""Told of cells as soon as they are measured."""


def candidate_sizes(analysis: Analysis, unit: Unit) -> tuple[int, ...]:
    """The sizes at which a unit keeps 10 %, 20 %, ... of what it costs, ascending, without the full size.

    The largest is the one that costs no more than the unit left as it is.
    """
    shares = [number / CANDIDATES for number in range(1, CANDIDATES + 1)]
    sizes = {analysis.size_at(unit, share) for share in shares}
    return tuple(sorted(size for size in sizes if size is not None and size < unit.full_size))


def measure_by_divergence(
    analysis: Analysis,
    calibration: Sequence[Tensor],
    scoring: Sequence[Tensor],
    *,
    known: Mapping[tuple[str, int], float],
    found: Found,
    progress: Progress,
) -> tuple[Cell, ...]:
    """Measure by how far the output moves from the original's, without labels.

    Args:
        analysis: A method's view of the model.
        calibration: Inputs to compress with, each ``(batch, ...)``; none is the data-free mode.
        scoring: Inputs to measure the divergence on, each ``(batch, ...)``.
        known: Losses that were measured before, by unit and size.
        found: Told of the cells of each unit.
        progress: Where to show each unit.

    Returns:
        All cells; losses as in :func:`compress_search.divergence.divergence_of`.
    """
    model, device = analysis.model, next(analysis.model.parameters()).device
    batches = [batch.to(device) for batch in scoring]
    with inference_mode_of(model):
        wanted = [model(batch) for batch in batches]

    def losses(imitation: Imitation) -> dict[int, float]:
        total = dict.fromkeys(imitation.parameters, Divergence())
        for batch, target in zip(batches, wanted, strict=True):
            prefix = Prefix(model, batch, imitation.layers)
            for size, parameters in imitation.parameters.items():
                total[size] += divergence_of(prefix.rerun(parameters), target)
        return {size: divergence.mean for size, divergence in total.items()}

    return _measure(analysis, calibration, losses, known=known, found=found, progress=progress)


def measure_by_score(
    analysis: Analysis,
    calibration: Sequence[Tensor],
    score: Score,
    *,
    on_error: str,
    known: Mapping[tuple[str, int], float],
    found: Found,
    progress: Progress,
) -> tuple[Cell, ...]:
    """Measure by how much the user's own score drops.

    Args:
        analysis: A method's view of the model.
        calibration: Inputs to compress with, each ``(batch, ...)``; none is the data-free mode.
        score: Evaluates a model; higher is better.
        on_error: What to do when the score of a cell fails or is not finite: ``"stop"`` raises, and keeps
            what was measured; ``"skip"`` goes on without the cell.
        known: Losses that were measured before, by unit and size.
        found: Told of each cell.
        progress: Where to show each unit.

    Returns:
        All cells; losses as drops of the score.

    Raises:
        EvaluationError: A score failed; the unit and size are named.
    """
    model = copy.deepcopy(analysis.model).eval()
    whole = score(model)

    def losses(imitation: Imitation) -> dict[int, float]:
        measured: dict[int, float] = {}
        for size, parameters in imitation.parameters.items():
            if (imitation.unit, size) in known:
                continue
            before = _exchange(model, parameters)
            try:
                measured[size] = whole - _finite_score(score, model)
            except Exception as error:
                fault = (
                    f"The score of the cell {imitation.unit!r} at size {size} failed: "
                    f"{type(error).__name__}: {error}."
                )
                if on_error == "stop":
                    raise EvaluationError(
                        f"{fault} The cells that were measured are kept. Mend the evaluation and start "
                        "again, or go on without such cells: on_cell_error: skip."
                    ) from error
                logger.warning("%s It is left out of the table.", fault)
            finally:
                _exchange(model, before)
            if size in measured:
                found([Cell(imitation.unit, size, measured[size])])
        return measured

    return _measure(analysis, calibration, losses, known=known, found=lambda _: None, progress=progress)


def cells_of_errors(analysis: Analysis) -> tuple[Cell, ...]:
    """All cells without any data: the relative errors of the compressed layers stand for the losses."""
    imitations = analysis.imitations(_all_sizes(analysis), [])
    return tuple(Cell(i.unit, size, error) for i in imitations for size, error in i.errors.items())


def _measure(
    analysis: Analysis,
    calibration: Sequence[Tensor],
    losses: Callable[[Imitation], Mapping[int, float]],
    *,
    known: Mapping[tuple[str, int], float],
    found: Found,
    progress: Progress,
) -> tuple[Cell, ...]:
    sizes = _all_sizes(analysis)
    wanted = {name: own for name, own in sizes.items() if any((name, size) not in known for size in own)}
    cells = dict(known)
    with progress.bar("sensitivity", len(sizes), done=len(sizes) - len(wanted)) as advance:
        for imitation in analysis.imitations(wanted, calibration) if wanted else ():
            measured = [Cell(imitation.unit, size, loss) for size, loss in losses(imitation).items()]
            found(measured)
            cells |= {(cell.unit, cell.size): cell.loss for cell in measured}
            advance(f"{imitation.unit}, {len(measured)} sizes")
    return tuple(
        Cell(name, size, cells[name, size]) for name in sizes for size in sizes[name] if (name, size) in cells
    )


def _all_sizes(analysis: Analysis) -> dict[str, tuple[int, ...]]:
    sizes = {unit.name: candidate_sizes(analysis, unit) for unit in analysis.units}
    return {name: own for name, own in sizes.items() if own}


def _finite_score(score: Score, model: nn.Module) -> float:
    value = float(score(model))
    if not math.isfinite(value):
        raise EvaluationError(f"it returned {value}")
    return value


def _exchange(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give a model other values for some parameters, in place; return the ones it had."""
    before = {}
    with torch.no_grad():
        for name, value in parameters.items():
            parameter = model.get_parameter(name)
            before[name] = parameter.detach().clone()
            parameter.copy_(value)
    return before
