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
        _update_with_tensor(digest, tensor)
    return digest.hexdigest()[:20]


def data_fingerprint(loader: Iterable[Any]) -> str:
    """Hash a data loader by its length and its first batch, drawn under a fixed seed.

    A loader whose first batch differs even under a fixed seed (say, augmentation by another random
    library) is hashed by its length alone.

    Returns:
        20 hexadecimal digits.
    """
    first, second = (_first_batch_hash(loader) for _ in range(2))
    length = len(loader.dataset) if hasattr(loader, "dataset") else None  # type: ignore[arg-type]
    return content_hash([length, first if first == second else None])


@contextmanager
def seeded(seed: int, loader: Iterable[Any] | None = None) -> Iterator[None]:
    """Fix every random source in the block, and restore its state afterwards.

    Args:
        seed: Seed of torch (all devices), numpy's global generator and :mod:`random`.
        loader: A loader whose own ``generator`` is to be seeded as well.
    """
    generator = getattr(loader, "generator", None)
    generator_state = generator.get_state() if generator is not None else None
    numpy_state, random_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        if generator is not None:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(random_state)
            if generator is not None:
                generator.set_state(generator_state)


def _first_batch_hash(loader: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    with seeded(0, loader):
        for part in _tensors_of(next(iter(loader), None)):
            _update_with_tensor(digest, part)
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


def _update_with_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    contiguous = tensor.detach().cpu().contiguous()
    digest.update(contiguous.reshape(-1).view(torch.uint8).numpy().tobytes())
