"""Weights on the disk: safetensors files that appear whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress_search.exceptions import ModelError, WorkspaceError
from compress_search.workspace import write_bytes_atomically


def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write a model's parameters and buffers as a safetensors file, flushed to the disk.

    Tied tensors are written once under each of their names, so that
    ``model.load_state_dict(safetensors.torch.load_file(path))`` reads the file without knowing of ties.

    Args:
        model: The model, on any device.
        path: The file. Its folder is created.

    Raises:
        ModelError: The model's state holds something that is not a tensor.
    """
    write_bytes_atomically(Path(path), save(_state_of(model), metadata={"format": "pt"}))


def load_weights(
    model: nn.Module, path: Path | str, *, remedy: str = "Delete the file, and it is made again."
) -> None:
    """Read what :func:`save_weights` wrote into a model of the same architecture, in place.

    Args:
        model: The model; its tensors stay on their devices.
        path: The file.
        remedy: What to do where that fails, for the error.

    Raises:
        WorkspaceError: The file cannot be read.
        ModelError: The weights are those of another architecture.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WorkspaceError(f"The weights {str(path)!r} cannot be read ({error}). {remedy}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ModelError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {first} "
            f"They were saved from another architecture. {remedy}"
        ) from error


def file_checksum(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"The state of {type(model).__name__} holds {name!r}, a {type(value).__name__}. "
                "Only tensors can be stored: keep it out of the state_dict."
            )
    # safetensors refuses tensors that share memory or are not contiguous; fresh copies are neither.
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
