"""How far a model's outputs are from another's, without labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

_ROUNDING = 1e-3
"""How far outputs may be apart that differ by rounding alone, relative to the largest of them."""


@dataclass(frozen=True)
class Divergence:
    """A divergence that is summed up batch by batch.

    Attributes:
        total: Sum over what was seen so far.
        scale: What it is relative to: the number of examples, or the energy of the wanted outputs.
    """

    total: float = 0.0
    scale: float = 0.0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(self.total + other.total, self.scale + other.scale)

    @property
    def mean(self) -> float:
        """The divergence; 0 where nothing was seen."""
        return self.total / self.scale if self.scale else 0.0


def divergence_of(outputs: Any, wanted: Any) -> Divergence:
    """Compare one batch of outputs with what they should be.

    Args:
        outputs: A tensor, or tensors in lists, tuples, mappings or dataclasses.
        wanted: The same of the reference model.

    Returns:
        For outputs ``(batch, classes)`` the Kullback-Leibler divergence of the softmax distributions in
        nats; for any others the squared error, relative to the reference's energy. Of several tensors, the
        floating point ones are compared, all by their squared error.
    """
    given = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    right = [leaf for leaf in leaves_of(wanted) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if len(right) == 1 and are_logits(right[0]):
        return Divergence(_kullback_leibler(given[0], right[0]), len(right[0]))
    total = sum(float((g - r).double().square().sum()) for g, r in zip(given, right, strict=True))
    return Divergence(total, sum(float(r.double().square().sum()) for r in right))


def leaves_of(outputs: Any) -> list[Any]:
    """The values in lists, tuples, mappings and dataclasses, whether PyTorch was told of these or not.

    Args:
        outputs: What a model put out.
    """
    leaves: list[Any] = []
    for leaf in tree_leaves(outputs):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += leaves_of([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def are_logits(outputs: Tensor) -> bool:
    """Whether outputs are taken for the logits of a classifier: ``(batch, classes)``, two classes or more."""
    return outputs.ndim == 2 and outputs.shape[1] > 1


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let GPUs multiply with all bits of float32 in the block, so that outputs can be compared.

    By default their convolutions round factors to 10 bits (TF32), but not those of every shape. Where only
    the number of channels or the layout is another, outputs could then differ by more than is allowed.
    """
    cudnn: Any = torch.backends.cudnn  # Replaced by an object when it is imported.
    convolutions, products = cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def are_same_but_for_rounding(outputs: Any, wanted: Any) -> bool:
    """Whether outputs differ by no more than another order of the same operations makes.

    Args:
        outputs: A tensor, or tensors in lists, tuples, mappings or dataclasses.
        wanted: The same, computed otherwise.
    """
    given, right = leaves_of(outputs), leaves_of(wanted)
    return len(given) == len(right) and all(map(_is_close, given, right))


def _is_close(given: Any, wanted: Any) -> bool:
    if not isinstance(given, Tensor) or not isinstance(wanted, Tensor):
        return type(given) is type(wanted)
    if given.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(given, wanted)
    return bool((given - wanted).abs().max() <= _ROUNDING * wanted.abs().max())


def _kullback_leibler(outputs: Tensor, wanted: Tensor) -> float:
    # In float32 the difference of two nearly equal distributions is lost in rounding.
    target = wanted.double().log_softmax(1)
    given = outputs.double().log_softmax(1)
    found: Tensor = functional.kl_div(given, target, reduction="sum", log_target=True)
    # A half-precision model whose outputs overflow is infinitely far away, not undefined.
    return float(torch.nan_to_num(found, nan=torch.inf))
