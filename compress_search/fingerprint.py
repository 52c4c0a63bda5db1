"""Fingerprints: short hashes that say whether two models, data sets or settings are the same."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
    """Hash a data loader by its length and its first batch, drawn under a fixed seed.

    A loader whose first batch differs even under a fixed seed (say, augmentation by another random
    library) is hashed by its length alone.

    Returns:
        20 hexadecimal digits.
    """
    first, second = (_first_batch_hash(loader) for _ in range(2))
    return content_hash([_length_of(loader), first if first == second else None])


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


def _first_batch_hash(loader: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    with seeded(0, loader):
        for part in _tensors_of(next(iter(loader), None)):
            update_with_tensor(digest, part)
    return digest.hexdigest()


def _tensors_of(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _tensors_of(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors_of(value)


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Let a digest of :mod:`hashlib` take in a tensor: its type, its shape, and its bytes in their order."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    contiguous = tensor.detach().cpu().contiguous()
    digest.update(contiguous.reshape(-1).view(torch.uint8).numpy())
