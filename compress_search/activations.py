"""How much memory a forward pass holds, measured on one example, and batches cut to a bounded share of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_search.profile import inference_mode_of

_PASS_BYTES = 2**27
"""What the activations of one forward pass may take (128 MB), or one example where that takes more."""


@dataclass(frozen=True)
class ActivationBytes:
    """Memory that one example's activations take.

    Attributes:
        before: Bytes held when a layer begins, the input of the model included, by layer name; of layers that
            ran.
        after: Bytes held when it has ended.
        peak: The most bytes held after any operation. What an operation takes for itself is not seen.
    """

    before: dict[str, int]
    after: dict[str, int]
    peak: int


def activation_bytes(model: nn.Module, layers: Collection[str], example: Tensor) -> ActivationBytes:
    """Measure a forward pass.

    Args:
        model: The model; run in evaluation mode.
        layers: Names of the layers at which to measure; of several calls the last counts.
        example: ``(1, ...)``, on the model's device.
    """
    watcher = _LiveStorages([example, *model.parameters(), *model.buffers()])
    own = example.numel() * example.element_size()
    before: dict[str, int] = {}
    after: dict[str, int] = {}

    def note(counts: dict[str, int], name: str) -> Any:
        return lambda *_: counts.__setitem__(name, own + watcher.live())

    with ExitStack() as hooks:
        for name in layers:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(note(before, name)).remove)
            hooks.callback(layer.register_forward_hook(note(after, name)).remove)
        with inference_mode_of(model), watcher:
            model(example)
    return ActivationBytes(before, after, own + watcher.peak)


def pieces_within_memory(batches: Sequence[Tensor], peak: int) -> list[list[Tensor]]:
    """Cut batches so that the activations of each piece fit into a bounded memory.

    Args:
        batches: Each ``(batch, ...)``.
        peak: Bytes that the activations of one example take.

    Returns:
        The pieces of each batch.
    """
    size = examples_within_memory(peak)
    return [list(torch.split(batch, size)) for batch in batches]


def examples_within_memory(peak: int) -> int:
    """How many examples' activations fit into the bounded memory of a forward pass; at least one.

    Args:
        peak: Bytes that the activations of one example take.
    """
    return max(1, _PASS_BYTES // max(1, peak))


def _weakly(storage: torch.UntypedStorage) -> tuple[StorageWeakRef, int]:
    return StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of every tensor that an operation gives."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def live(self) -> int:
        """Bytes of the tensors that still exist."""
        # A weak reference keeps the address from being given to another tensor.
        self._storages = {
            address: (storage, size)
            for address, (storage, size) in self._storages.items()
            if not storage.expired()  # type: ignore[no-untyped-call]
        }
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._storages:
                    self._storages[storage._cdata] = _weakly(storage)
                    self.peak = max(self.peak, self.live())
        return output
