"""The loaders of a task: what their batches hold, how many examples they have, and what can be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from compress_search.fingerprint import begun


def inputs_of(loader: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the input tensors of a loader's batches, whether it yields ``inputs`` or ``(inputs, ...)``."""
    for batch in begun(loader):
        yield batch if isinstance(batch, Tensor) else batch[0]


def count_examples(loader: Iterable[Any]) -> int:
    """How many examples a pass through a loader has; they are counted where it does not say."""
    if isinstance(loader, DataLoader) and loader.batch_size is not None:
        # It makes batches of what its sampler names. Otherwise that may be batches already.
        try:
            drawn = len(loader.sampler)  # type: ignore[arg-type]
        except TypeError:  # A stream.
            pass
        else:
            return drawn - drawn % loader.batch_size if loader.drop_last else drawn
    return sum(len(labels) for _, labels in loader)


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Split a training batch, ``(inputs, targets, ...)`` or inputs alone."""
    if isinstance(batch, Tensor):
        return batch, None
    inputs, *others = batch
    return inputs, others[0] if others else None


class Batches(Enum):
    """What a loader has to yield."""

    INPUTS = auto()
    INPUTS_OR_PAIRS = auto()
    PAIRS = auto()
    ANY = auto()


BATCHES = {
    "train": Batches.INPUTS_OR_PAIRS,
    "validation": Batches.PAIRS,
    "test": Batches.PAIRS,
    "calibration": Batches.INPUTS,
}
"""Those that only an ``evaluate`` of the user's own reads may yield whatever that takes."""


def loader_faults(name: str, loader: Any, wanted: Batches) -> list[str]:
    """Find what is wrong with a loader, by its first batch.

    Args:
        name: What it is called in the task.
        loader: What was given for it.
        wanted: What it has to yield.
    """
    if iter_fault := _not_a_loader(name, loader):
        return [iter_fault]
    try:
        iterator = iter(loader)
        batch = next(iterator, None)
        # To begin with a DataLoader may start processes.
        is_new = isinstance(loader, DataLoader) or iter(loader) is not iterator
    except Exception as error:
        return [f"{name} raised when its first batch was drawn: {type(error).__name__}: {error}"]
    if batch is None:
        return [f"{name} is empty: it yields no batch."]
    if not is_new:
        return [
            f"{name} is a {type(loader).__name__} that gives the same iterator each time, which ends after "
            "one pass. Give a DataLoader or a list of batches."
        ]
    if wanted is Batches.ANY or (isinstance(batch, Tensor) and wanted is not Batches.PAIRS):
        return []
    least = 2 if wanted is Batches.PAIRS else 1
    if not isinstance(batch, list | tuple) or len(batch) < least or not isinstance(batch[0], Tensor):
        return [
            f"{name} yields {type(batch).__name__}; it must yield (inputs, targets) with a tensor of inputs."
        ]
    if wanted is not Batches.INPUTS and len(batch) > 1 and not isinstance(batch[1], Tensor):
        return [
            f"{name} yields targets that are a {type(batch[1]).__name__}; they must be a tensor: "
            "torch.as_tensor(targets)."
        ]
    return []


def _not_a_loader(name: str, loader: Any) -> str | None:
    if isinstance(loader, Iterator):
        return f"{name} is an iterator that ends after one pass. Give a DataLoader or a list of batches."
    if not isinstance(loader, Iterable):
        return f"{name} is a {type(loader).__name__}, which cannot be iterated. Give a DataLoader."
    return None
