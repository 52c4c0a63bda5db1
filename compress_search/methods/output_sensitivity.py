"""How much the network's output cares for errors in a layer's output, channel by channel.

A small change ``dz`` of the logits moves the softmax distribution by ``dz^T (diag(p) - p p^T) dz / 2`` nats
of Kullback-Leibler divergence. Seen from an inner layer that is the generalised Gauss-Newton matrix, which
here is the Fisher matrix: the second moment of the gradients of ``log p(y)`` with labels ``y`` drawn from the
model itself, so that no labels of the data are needed (Martens 2020, *New insights and perspectives on the
natural gradient method*, sections 5 and 9). It is kept for one position of one layer at a time, which is the
output factor of K-FAC (Grosse and Martens 2016, *A Kronecker-factored approximate Fisher matrix for
convolution layers*, section 3.1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.calibration import run
from compress_search.divergence import are_logits, leaves_of
from compress_search.patches import output_rows
from compress_search.profile import inference_mode_of

logger = logging.getLogger("compress_search")

_EXAMPLES = 256
"""How many examples are looked at: the matrices are small, so more would say little more."""

_GRAPH_ELEMENTS = 2**24
"""About how many elements of layers' outputs one backward pass goes through (64 MB in float32); what lies
between the layers is kept too, a few times as much."""


def output_sensitivities(
    model: nn.Module, layers: Collection[str], batches: Sequence[Tensor], *, seed: int = 0
) -> dict[str, Tensor]:
    """Measure how much the output suffers from errors in layers' outputs.

    If each row ``e`` of a layer's output is off by an error that does not depend on the other rows, the
    output's divergence (see :func:`compress_search.divergence.divergence_of`) is about the mean over rows and
    examples of ``e @ S @ e``.

    Args:
        model: The model. It is not changed.
        layers: Names of convolutions and linear layers.
        batches: Calibration inputs, each ``(batch, ...)``; the first few hundred examples are looked at.
        seed: Fixes the labels that are drawn.

    Returns:
        ``S`` for each layer, ``(groups, channels / groups, channels / groups)`` in float64. Empty where the
        model cannot be differentiated, or computes in half precision, in which gradients vanish.
    """
    weights = next(model.parameters())
    if weights.dtype in (torch.float16, torch.bfloat16) or not layers or not batches:
        return {}
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    scale = 0.0
    try:
        for piece in _pieces(model, layers, batches):
            scale += _add_gradients(model, layers, piece.to(weights.device), generator, sums)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("All outputs of a layer are taken to matter alike: no gradients (%s).", error)
        return {}
    for total in sums.values():
        total.div_(max(scale, torch.finfo(total.dtype).tiny))
    return {name: mean for name, mean in sums.items() if torch.isfinite(mean).all()}


def _add_gradients(
    model: nn.Module,
    layers: Collection[str],
    piece: Tensor,
    generator: torch.Generator,
    sums: dict[str, Tensor],
) -> float:
    """Add the second moments of the gradients of one piece; return what they are to be divided by."""
    probes: list[tuple[str, Tensor]] = []

    def add_probe(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            # A sum is new memory, so that a following activation in place does no harm.
            probe = torch.zeros_like(output, requires_grad=True)
            probes.append((name, probe))
            return output + probe

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(add_probe(name)) for name in layers]
    try:
        with inference_mode_of(model), torch.enable_grad():
            outputs = model(piece)
            score, scale = _score(outputs, generator)
            gradients = torch.autograd.grad(score, [probe for _, probe in probes], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    for (name, _), gradient in zip(probes, gradients, strict=True):
        if gradient is not None:
            rows = output_rows(model.get_submodule(name), gradient)
            moment = rows.mT.matmul(rows)
            # In place: of a layer of 4,096 outputs each copy would take 134 MB.
            sums[name] = sums[name].add_(moment) if name in sums else moment.double()
            del moment
    return scale


def _score(outputs: Any, generator: torch.Generator) -> tuple[Tensor, float]:
    """A random function of the outputs whose gradients have the Gauss-Newton matrix as second moment.

    Returns:
        The function's value, and what second moments are to be divided by.
    """
    values = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if len(values) == 1 and are_logits(values[0]):
        log_shares = values[0].log_softmax(1)
        labels = torch.multinomial(log_shares.detach().double().exp().cpu(), 1, generator=generator)
        return log_shares.gather(1, labels.to(log_shares.device)).sum(), 2.0 * len(values[0])
    signs = [torch.randint(2, v.shape, generator=generator).to(v.device, v.dtype) * 2 - 1 for v in values]
    energy = sum(float(value.detach().double().square().sum()) for value in values)
    return torch.stack([(v * s).sum() for v, s in zip(values, signs, strict=True)]).sum(), energy


def _pieces(model: nn.Module, layers: Collection[str], batches: Sequence[Tensor]) -> list[Tensor]:
    """The first examples, in pieces whose gradients fit into a bounded memory."""
    elements = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    hooks = [model.get_submodule(name).register_forward_hook(count) for name in layers]
    try:
        run(model, [batches[0][:1]])
    finally:
        for hook in hooks:
            hook.remove()
    size = max(1, _GRAPH_ELEMENTS // max(1, elements))
    pieces, left = [], _EXAMPLES
    for batch in batches:
        pieces += list(torch.split(batch[:left], size)) if left else []
        left -= min(left, len(batch))
    return pieces
