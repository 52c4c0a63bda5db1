"""Models as programs that run by themselves: ``torch.export`` and ONNX, each checked against the model."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from compress_search.fingerprint import seeded

logger = logging.getLogger("compress_search")

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Program:
    """An exported program and the inputs that it must be right for."""

    exported: ExportedProgram
    examples: tuple[Tensor, ...]


def write_program(path: Path, model: nn.Module, example: Tensor) -> Program:
    """Write a model as a ``torch.export`` program: for any batch size if the model allows that.

    Args:
        path: The file to write.
        model: The model, in evaluation mode and on the CPU.
        example: ``(batch, ...)``. A program for one batch size takes this one.

    Returns:
        The program, which was loaded again and gave the model's outputs.

    Raises:
        AssertionError: The loaded program gives other outputs than the model.
        Exception: ``torch.export`` cannot export the model; it raises many types.
    """
    # A dimension of size 1 is taken for a constant, so the program is traced with two examples.
    pair = torch.cat([example[:1], example[:1]])
    try:
        exported = torch.export.export(model, (pair,), dynamic_shapes=({0: Dim("batch")},))
        program = Program(exported, (example[:1], torch.cat([example, pair])))
    except Exception as error:
        logger.info("The program takes batches of %d only: %s", len(example), brief(error))
        program = Program(torch.export.export(model, (example,)), (example,))
    torch.export.save(program.exported, path)
    loaded = read_program(path).module()
    for inputs in program.examples:
        _compare(outputs_of(loaded, inputs), outputs_of(model, inputs))
    return program


def read_program(path: Path) -> ExportedProgram:
    """Read a ``torch.export`` program.

    Args:
        path: The file.

    Returns:
        The program.

    Raises:
        Exception: The file is none; ``torch.export.load`` raises many types.
    """
    with _quiet_pytorch():
        return torch.export.load(path)


def write_onnx(path: Path, program: Program, model: nn.Module) -> Path:
    """Write a program as one ONNX file, and compare it with the model where onnxruntime is installed.

    Args:
        path: The file to write.
        program: What :func:`write_program` made.
        model: The model it was made from.

    Returns:
        The path.

    Raises:
        AssertionError: The ONNX model gives other outputs than the model.
        Exception: A package is missing, or an operation has no counterpart; many types.
    """
    with _quiet_pytorch():
        onnx_program = torch.onnx.export(program.exported, dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(path, external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        logger.info("%s was not compared with the model: onnxruntime is not installed", path.name)
        return path
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for inputs in program.examples:
        outputs = [torch.from_numpy(output) for output in session.run(None, {name: inputs.numpy()})]
        _compare(outputs, outputs_of(model, inputs))
    return path


def outputs_of(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The tensors that a model returns, in whatever they are wrapped."""
    with seeded(0), torch.no_grad():
        return [leaf for leaf in tree_leaves(model(inputs)) if isinstance(leaf, Tensor)]


@contextmanager
def _quiet_pytorch() -> Iterator[None]:
    """Keep PyTorch from telling users of its own code.

    PyTorch 2.11 reads the weights of a program from a buffer that it must not write to, and copies trees by a
    class that it has deprecated; it warns of both as if the caller could help it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


def _compare(outputs: list[Tensor], expected: list[Tensor]) -> None:
    """Make sure that two runtimes agree.

    They may add up in another order, so half of the digits have to agree, measured by the largest value.

    Raises:
        AssertionError: They do not agree.
    """
    assert len(outputs) == len(expected), f"it returns {len(outputs)} tensors, the model {len(expected)}"
    for output, wanted in zip(outputs, expected, strict=True):
        tolerance = 0.0
        if wanted.is_floating_point() and wanted.numel():
            tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max().item()
        torch.testing.assert_close(output, wanted, rtol=0, atol=tolerance, equal_nan=True)


def brief(error: BaseException) -> str:
    """Write an error in one line, without the colours of a terminal; those of exporters run over pages."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
