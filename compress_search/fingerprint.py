"""Fingerprints: short hashes that say whether two models, data sets or settings are the same."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

_EXAMPLES = 16


def content_hash(value: Any) -> str:
    """Hash a JSON-able value; the order of the keys of its mappings does not matter.

    Returns:
        20 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def model_fingerprint(model: nn.Module) -> str:
    """Hash a model's class, module structure, parameters and buffers.

    Returns:
        20 hexadecimal digits.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__qualname__}({module.extra_repr()});".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        update_with_tensor(digest, tensor)
    return digest.hexdigest()[:20]


def data_fingerprint(loader: Iterable[Any]) -> str:
    """Hash a data loader by its length, its first batch, and examples of its data set.

    Its length is that of its data set, and how many examples a pass draws, if those are fewer or more.

    Batch and examples are drawn under a fixed seed. What lies in memory as tensors (a list of batches, a data
    set of tensors) is hashed whole. Of another data set that can be indexed it is 16 evenly spaced examples;
    of any other loader the first batch alone.

    What differs even under a fixed seed (say, augmentation by another random library) has no say: see
    :func:`is_repeatable`.

    Returns:
        20 hexadecimal digits.
    """
    examples = _hash_in_memory(loader) or _repeatable(_examples_hash, loader)
    parts = [_length_of(loader), _repeatable(_first_batch_hash, loader), examples]
    # Only where it says something: most loaders draw each example once, and keep the hash that they had.
    return content_hash(parts if (drawn := _drawn_of(loader)) is None else [*parts, drawn])


def is_repeatable(loader: Iterable[Any]) -> bool:
    """Whether a loader yields the same first batch again under the same seed."""
    return _repeatable(_first_batch_hash, loader) is not None


def _repeatable(hash_of: Callable[[Any], str | None], loader: Any) -> str | None:
    """A hash of what is drawn from a loader; ``None`` if it is another one the second time."""
    first, second = (hash_of(loader) for _ in range(2))
    return first if first == second else None


def begun(loader: Iterable[Any]) -> Iterator[Any]:
    """Begin a pass through a loader that draws its random numbers from the seeds of now.

    Worker processes that persist were seeded when they were started: they are started anew.
    """
    if getattr(loader, "persistent_workers", False):
        loader._iterator = None  # type: ignore[attr-defined]
    return iter(loader)


@contextmanager
def seeded(seed: int, loader: Iterable[Any] | None = None) -> Iterator[None]:
    """Fix every random source in the block, and restore its state afterwards.

    Args:
        seed: Seed of torch (all devices), numpy's global generator and :mod:`random`.
        loader: A loader whose own generators, and those of its samplers, are to be seeded as well.
    """
    generators = [(generator, generator.get_state()) for generator in _generators_of(loader)]
    numpy_state, random_state = np.random.get_state(), random.getstate()
    # By default fork_rng would start every GPU of the machine, even for work on the CPU.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else ()
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator, _ in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(random_state)
            for generator, state in generators:
                generator.set_state(state)


def _generators_of(source: Any) -> Iterator[torch.Generator]:
    """Find the random generators of a loader, and of the samplers that it draws from."""
    if source is None:
        return
    generator = getattr(source, "generator", None)
    if isinstance(generator, torch.Generator):
        yield generator
    for part in ("sampler", "batch_sampler"):
        yield from _generators_of(getattr(source, part, None))


def _length_of(loader: Any) -> int | None:
    """Number of examples if the loader has a data set, of batches otherwise; ``None`` for a stream."""
    try:
        return len(getattr(loader, "dataset", loader))
    except TypeError:
        return None


def _drawn_of(loader: Any) -> int | None:
    """How many examples a pass draws (batches, if their size is not known), if not as many as there are."""
    if not isinstance(loader, DataLoader):
        return None
    try:
        count = len(loader.dataset)  # type: ignore[arg-type]
        drawn = len(loader) if loader.batch_size is None else len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:  # A stream.
        return None
    if loader.drop_last and loader.batch_size is not None:
        drawn -= drawn % loader.batch_size
    return None if drawn == count else drawn


def _first_batch_hash(loader: Iterable[Any]) -> str:
    with seeded(0, loader):
        return _hash_of([next(begun(loader), None)])


def _hash_in_memory(loader: Any) -> str | None:
    """Hash all that a loader yields or draws from, if it lies in memory as tensors."""
    if isinstance(loader, list | tuple):
        return _hash_of(loader)
    data = getattr(loader, "dataset", None)
    return _hash_of(data.tensors) if isinstance(data, TensorDataset) else None


def _examples_hash(loader: Any) -> str | None:
    """Hash examples of what a loader draws from; ``None`` if they cannot be asked for."""
    data = getattr(loader, "dataset", None)
    try:
        count = len(data)  # type: ignore[arg-type]
        with seeded(0):
            return _hash_of(_examples_at(range(0, count, max(1, count // _EXAMPLES)), data, loader))
    except Exception:
        # Whatever a data set raises that is a stream, or wants to be asked for whole batches.
        return None


def _examples_at(places: Sequence[int], data: Any, loader: Any) -> Iterable[Any]:
    if getattr(loader, "num_workers", 0) == 0:
        return (data[place] for place in places)
    # Files that a data set opens when it is first asked must not be shared with workers forked later.
    return DataLoader(
        Subset(data, places),
        num_workers=1,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _hash_of(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        _update_with(digest, value)
    return digest.hexdigest()


def _update_with(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        update_with_tensor(digest, value)
    elif isinstance(value, dict):
        for key, part in value.items():
            _update_with(digest, key)
            _update_with(digest, part)
    elif isinstance(value, list | tuple):
        for part in value:
            _update_with(digest, part)
    elif hasattr(value, "tobytes"):  # Arrays of numpy, images of Pillow.
        digest.update(value.tobytes())
    elif isinstance(value, int | float | str):
        digest.update(f"{value!r};".encode())


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Let a digest of :mod:`hashlib` take in a tensor: its type, its shape, and its bytes in their order."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    contiguous = tensor.detach().cpu().contiguous()
    digest.update(contiguous.reshape(-1).view(torch.uint8).numpy())
