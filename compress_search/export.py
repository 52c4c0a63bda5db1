"""Export: a candidate as files to ship.

The plan and the weights need the original model's code and this package to load; a ``torch.export`` program
needs PyTorch alone, ONNX needs neither. Whatever is written is loaded again and compared with the model in
memory before the folder appears.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compress_search.exceptions import StudyError, WorkspaceError
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.programs import brief, outputs_of, write_onnx, write_program
from compress_search.reports.provenance import (
    ONNX_FILE,
    PLAN_FILE,
    PROGRAM_FILE,
    WEIGHTS_FILE,
    loading_code,
    package_versions,
    program_loading_code,
)
from compress_search.results import MADE_AGAIN, Candidate
from compress_search.workspace import new_folder, write_json_atomically

logger = logging.getLogger("compress_search")

FORMAT = "compress_search.candidate"
VERSION = 1
SUMMARY_FILE = "candidate.json"
_FILES = frozenset({PLAN_FILE, WEIGHTS_FILE, PROGRAM_FILE, ONNX_FILE, SUMMARY_FILE})

Made = TypeVar("Made")


@dataclass(frozen=True)
class ExportFiles:
    """Where the parts of an exported candidate lie.

    Attributes:
        folder: The folder that holds them.
        plan: The plan, JSON.
        weights: The weights, safetensors.
        program: The ``torch.export`` program, or ``None`` if it could not be made.
        onnx: The ONNX model, or ``None`` if it was not asked for or could not be made.
        summary: ``candidate.json``: numbers, stages, versions, checksums, and how to load the rest.
    """

    folder: Path
    plan: Path
    weights: Path
    program: Path | None
    onnx: Path | None
    summary: Path


def export_candidate(
    candidate: Candidate, folder: Path, *, example_input: Tensor | None, onnx: bool = False
) -> ExportFiles:
    """Write a candidate as files to ship, and prove that they load.

    Everything runs on the CPU. A form that cannot be made (the model cannot be exported, a package is
    missing, the original model is not known) is left out with a warning in the log.

    Args:
        candidate: A complete candidate.
        folder: Where to. It appears whole or not at all; an earlier export there is replaced.
        example_input: ``(batch, ...)``, something the model accepts. Without it only the plan and the
            weights are written.
        onnx: Whether to write ONNX too. It is checked with onnxruntime where that is installed.

    Returns:
        The files.

    Raises:
        StudyError: The candidate did not complete, or its plan and weights do not give its model again.
        PlanError: Its plan is gone or damaged.
        WorkspaceError: The folder holds something else than an export, or cannot be written.
    """
    try:
        with _replacing(folder) as new:
            _write_forms(candidate, new, example_input, onnx=onnx)
            write_json_atomically(new / SUMMARY_FILE, _summary(candidate, new, example_input))
    except OSError as error:
        raise WorkspaceError(
            f"Trial {candidate.number} cannot be exported to {str(folder)!r} ({error}). "
            "Choose another folder."
        ) from error
    program, onnx_model = folder / PROGRAM_FILE, folder / ONNX_FILE
    return ExportFiles(
        folder=folder,
        plan=folder / PLAN_FILE,
        weights=folder / WEIGHTS_FILE,
        program=program if program.is_file() else None,
        onnx=onnx_model if onnx_model.is_file() else None,
        summary=folder / SUMMARY_FILE,
    )


def _write_forms(candidate: Candidate, folder: Path, example_input: Tensor | None, *, onnx: bool) -> None:
    """Write the plan and the weights, load them again, and write the forms that run by themselves."""
    candidate.plan.save(folder / PLAN_FILE)
    _copy_weights(candidate, folder / WEIGHTS_FILE)
    if candidate.build_model is None or example_input is None:
        what = "the original model" if candidate.build_model is None else "an example input"
        _warn(candidate, f"as plan and weights alone: {what} is not known. Open the study with its task")
        return
    original = candidate.build_model().cpu()
    model = candidate.load_model(original)
    shipped = apply_plan(original, CompressionPlan.load(folder / PLAN_FILE)).eval()
    shipped.load_state_dict(load_file(folder / WEIGHTS_FILE))
    example = example_input.detach().cpu()
    try:
        wanted = outputs_of(model, example)
    except Exception as error:
        _warn(candidate, f"as plan and weights alone: the model does not run on the CPU ({brief(error)})")
        return
    _check_equal(candidate, outputs_of(shipped, example), wanted)
    program = _attempt(candidate, folder / PROGRAM_FILE, lambda path: write_program(path, model, example))
    if onnx and program is None:
        _warn(candidate, f"without {ONNX_FILE}: it is made from {PROGRAM_FILE}, which could not be made")
    elif onnx and program is not None:
        _attempt(candidate, folder / ONNX_FILE, lambda path: write_onnx(path, program, model))


def _copy_weights(candidate: Candidate, path: Path) -> None:
    try:
        shutil.copyfile(candidate.weights, path)
        load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise _damaged(candidate, error) from error


def _check_equal(candidate: Candidate, shipped: list[Tensor], wanted: list[Tensor]) -> None:
    """Make sure that what was loaded again gives the same outputs, to the last bit."""
    try:
        torch.testing.assert_close(shipped, wanted, rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        raise _damaged(candidate, error) from error


def _damaged(candidate: Candidate, error: Exception) -> StudyError:
    return StudyError(
        f"The weights of trial {candidate.number} do not give its model again ({brief(error)}). {MADE_AGAIN}"
    )


def _attempt(candidate: Candidate, path: Path, write: Callable[[Path], Made]) -> Made | None:
    """Write one form; where that fails, say why and leave nothing behind."""
    try:
        return write(path)
    except Exception as error:
        # Exporters fail in as many ways as there are models, and the rest of the export is still good.
        path.unlink(missing_ok=True)
        _warn(candidate, f"without {path.name}: {brief(error)}")
        return None


def _summary(candidate: Candidate, folder: Path, example_input: Tensor | None) -> dict[str, Any]:
    last = candidate.stages[-1] if candidate.stages else None
    files = sorted(path.name for path in folder.iterdir())
    load = {"plan and weights": loading_code(PLAN_FILE, WEIGHTS_FILE).splitlines()}
    if PROGRAM_FILE in files:
        load["program"] = program_loading_code(PROGRAM_FILE).splitlines()
    example = None
    if example_input is not None:
        example = {"shape": list(example_input.shape), "dtype": str(example_input.dtype)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "trial": candidate.number,
        "finalist_of": candidate.finalist_of,
        "search_params": dict(candidate.params),
        "accuracy": candidate.accuracy,
        "drop": candidate.drop,
        "mac_ratio": candidate.mac_ratio,
        "feasible": candidate.feasible,
        "macs": last.macs if last else None,
        "params": last.params if last else None,
        "seconds": candidate.seconds,
        "stages": [stage.to_dict() for stage in candidate.stages],
        "example_input": example,
        "sha256": {name: _sha256(folder / name) for name in files},
        "load": load,
        "versions": package_versions(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder``, and of an earlier export in it."""
    strangers = sorted({p.name for p in folder.iterdir()} - _FILES) if folder.is_dir() else []
    if strangers:
        raise WorkspaceError(
            f"{str(folder)!r} holds what is no part of an export ({', '.join(strangers[:5])}). "
            "An export replaces its whole folder: choose a new one."
        )
    target = folder.resolve()
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with new_folder(target) as new:
            yield new
            if target.is_dir():
                os.rename(target, aside)
    except BaseException:
        if aside.is_dir() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _warn(candidate: Candidate, how: str) -> None:
    logger.warning("Trial %d is exported %s.", candidate.number, how)
