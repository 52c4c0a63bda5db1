"""Measuring the sensitivity table, in a fraction of the time that compressing unit by unit would take.

No compressed model is built: each unit is imitated on the dense model by other parameters, and all its
sizes share one factorisation. What runs before the unit runs once for all its sizes, and is not run again for
the next unit (:mod:`compress_search.replay`). And only a few sizes of each unit are measured at all.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compress_search.divergence import Divergence, divergence_of
from compress_search.exceptions import EvaluationError
from compress_search.methods.method import Analysis, Imitation, Unit
from compress_search.profile import inference_mode_of
from compress_search.progress import Progress
from compress_search.replay import Prefixes, exchanged
from compress_search.selection.table import Cell

logger = logging.getLogger("compress_search")

CANDIDATES = 10
"""Number of shares at which each unit is looked at, its full size included."""

_LEAST = 1e-12
"""Errors and losses below this are rounding."""

_INPUT_ELEMENTS = 2**19
"""How many elements of inputs run at a time, unless a single batch has more: 170 images of 3 x 32 x 32."""

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
    probes: int,
    known: Mapping[tuple[str, int], Cell],
    found: Found,
    progress: Progress,
) -> tuple[Cell, ...]:
    """Measure by how far the output moves from the original's, without labels.

    Args:
        analysis: A method's view of the model.
        calibration: Inputs to compress with, each ``(batch, ...)``; none is the data-free mode.
        scoring: Inputs to measure the divergence on, each ``(batch, ...)``.
        probes: At how many sizes of each unit to measure; the others are filled in, see :func:`filled_in`.
        known: Cells that were found before, by unit and size.
        found: Told of the cells of each unit.
        progress: Where to show each unit.

    Returns:
        All cells; losses as in :func:`compress_search.divergence.divergence_of`.
    """
    model, device = analysis.model, next(analysis.model.parameters()).device
    batches = [batch.to(device) for batch in merged(scoring)]
    with inference_mode_of(model):
        wanted = [model(batch) for batch in batches]
    prefixes = Prefixes(model, batches, [layer.name for layer in analysis.profile.layers])

    def losses(imitation: Imitation) -> list[Cell]:
        probed = spread(sorted(imitation.parameters), probes)
        total = dict.fromkeys(probed, Divergence())
        for prefix, target in zip(prefixes.before(imitation.layers), wanted, strict=True):
            for size in probed:
                total[size] += divergence_of(prefix.rerun(imitation.parameters[size]), target)
        return filled_in(imitation, {size: divergence.mean for size, divergence in total.items()})

    return _measure(analysis, calibration, losses, known=known, found=found, progress=progress)


def merged(batches: Sequence[Tensor]) -> list[Tensor]:
    """Join small batches of one shape, so that fewer and larger operations do the same work."""
    joined: list[Tensor] = []
    for batch in batches:
        fits = bool(joined) and joined[-1].shape[1:] == batch.shape[1:] and joined[-1].dtype == batch.dtype
        if fits and joined[-1].numel() + batch.numel() <= _INPUT_ELEMENTS:
            joined[-1] = torch.cat([joined[-1], batch])
        else:
            joined.append(batch)
    return joined


def spread(sizes: Sequence[int], number: int) -> list[int]:
    """Take so many of the sizes, evenly, the ends of the list less often than its middle."""
    count = min(number, len(sizes))
    return [sizes[int((place + 0.5) * len(sizes) / count)] for place in range(count)]


def filled_in(imitation: Imitation, losses: Mapping[int, float]) -> list[Cell]:
    """Make cells of all sizes from the losses at some.

    The *shape* of the loss over the sizes is known without running the model: it nearly follows a power of
    the squared error of the compressed layers, which the factorisation gives at every size. So between
    measured sizes, the logarithm of the loss is interpolated linearly over the logarithm of the error, and
    beyond them extrapolated with the slope of the nearest two; of one measured size alone, with the slope 1.

    Args:
        imitation: The unit, with its errors.
        losses: Measured losses by size; at least one.
    """
    by_error = sorted((math.log(max(imitation.errors[size], _LEAST)), losses[size]) for size in losses)
    errors = np.array([error for error, _ in by_error])
    heights = np.log(np.maximum([loss for _, loss in by_error], _LEAST))
    cells = []
    for size, error in imitation.errors.items():
        if size in losses:
            cells.append(Cell(imitation.unit, size, losses[size]))
            continue
        height = _extended(math.log(max(error, _LEAST)), errors, heights)
        cells.append(Cell(imitation.unit, size, math.exp(height), measured=False))
    return cells


def _extended(at: float, known: npt.NDArray[np.float64], heights: npt.NDArray[np.float64]) -> float:
    """Interpolate, and extrapolate with the slope of the nearest two points, or 1."""
    first = int(np.clip(np.searchsorted(known, at) - 1, 0, max(len(known) - 2, 0)))
    last = min(first + 1, len(known) - 1)
    width = known[last] - known[first]
    slope = (heights[last] - heights[first]) / width if width > 0 else 1.0
    return float(heights[first] + slope * (at - known[first]))


def measure_by_score(
    analysis: Analysis,
    calibration: Sequence[Tensor],
    score: Score,
    *,
    on_error: str,
    known: Mapping[tuple[str, int], Cell],
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
        known: Cells that were found before, by unit and size.
        found: Told of each cell.
        progress: Where to show each unit.

    Returns:
        All cells; losses as drops of the score.

    Raises:
        EvaluationError: A score failed; the unit and size are named.
    """
    model = copy.deepcopy(analysis.model).eval()
    whole = score(model)

    def losses(imitation: Imitation) -> list[Cell]:
        measured = []
        for size, parameters in imitation.parameters.items():
            if (imitation.unit, size) in known:
                continue
            try:
                with exchanged(model, parameters):
                    cell = Cell(imitation.unit, size, whole - _finite_score(score, model))
                measured.append(cell)
                found([cell])
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
        return measured

    return _measure(analysis, calibration, losses, known=known, found=lambda _: None, progress=progress)


def cells_of_errors(analysis: Analysis) -> tuple[Cell, ...]:
    """All cells without any data: the relative errors of the compressed layers stand for the losses."""
    imitations = analysis.imitations(_all_sizes(analysis), [])
    return tuple(
        Cell(i.unit, size, error, measured=False) for i in imitations for size, error in i.errors.items()
    )


def _measure(
    analysis: Analysis,
    calibration: Sequence[Tensor],
    losses: Callable[[Imitation], Sequence[Cell]],
    *,
    known: Mapping[tuple[str, int], Cell],
    found: Found,
    progress: Progress,
) -> tuple[Cell, ...]:
    sizes = _all_sizes(analysis)
    wanted = {name: own for name, own in sizes.items() if any((name, size) not in known for size in own)}
    cells = dict(known)
    with progress.bar("sensitivity", len(sizes), done=len(sizes) - len(wanted)) as advance:
        for imitation in analysis.imitations(wanted, calibration) if wanted else ():
            new = losses(imitation)
            found(new)
            cells |= {(cell.unit, cell.size): cell for cell in new}
            advance(f"{imitation.unit}, {len(new)} sizes")
    return tuple(cells[name, size] for name in sizes for size in sizes[name] if (name, size) in cells)


def _all_sizes(analysis: Analysis) -> dict[str, tuple[int, ...]]:
    sizes = {unit.name: candidate_sizes(analysis, unit) for unit in analysis.units}
    return {name: own for name, own in sizes.items() if own}


def _finite_score(score: Score, model: nn.Module) -> float:
    value = float(score(model))
    if not math.isfinite(value):
        raise EvaluationError(f"it returned {value}")
    return value
