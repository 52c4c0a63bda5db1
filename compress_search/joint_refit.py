"""Refitting layers that lead to one another together, by what comes of the last of them.

Where the outputs of a layer were pruned, least squares layer by layer lets those that stay be what they were.
But nobody hears them except the next layer, so they may become anything that helps the next layer to put out
what it did. Minimising the error of the last layer's output over the weights of all of them is the block
reconstruction of Li et al. 2021, *BRECQ: Pushing the limit of post-training quantization by block
reconstruction*, section 3.2. Deviations: nothing is quantised; a block is a chain of layers, each of which
leads to the next (:mod:`compress_search.following`); its input is that of the compressed net, so that errors
do not add up; and squared errors all count alike: to weigh them by the Fisher information of the block's
outputs made less than 1 % of difference. No labels are looked at, and nothing after the block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search.following import Following

logger = logging.getLogger("compress_search")

LONGEST = 4
"""So many layers at most are refitted together: a bottleneck has as many when one of them was factorised."""

_ROUNDS = 4
"""How often each example is looked at. On ResNet-20 pruned to 0.438 of its MACs with 1,024 images, one round
lowered the divergence by 16 %, two by 21 % and four by 26 %."""

_EXAMPLES_A_STEP = 16
"""How many examples a step looks at, more or less."""

_PIECE_BYTES = 2**25
"""The layers are given so many bytes of examples at a time, as these are kept, or one example; what they give
on the way is a few times as much."""

_RATE = 0.06
"""The size of the largest steps, relative to the root mean square of a tensor of weights. There, the
divergence was 3 % higher with 0.03, and the same with 0.1."""

_WARM_UP = 10
"""Over so many steps at most the steps grow to their size; from then on they shrink along a cosine."""

_MOMENTA = (0.9, 0.99)
"""Of Adam: there are too few steps for its usual memory."""

_SEED = 0
"""Of the order of the examples."""


@dataclass(frozen=True)
class Link:
    """A layer of a chain.

    Attributes:
        layer: Its name.
        following: What follows it.
    """

    layer: str
    following: Following


@dataclass(frozen=True)
class Example:
    """What goes into a chain and what should come of it.

    Attributes:
        inputs: What the first layer is given in the compressed model, ``(batch, ...)``.
        wanted: What should come of it in the end, clamped.
        beside: What is added to the last layer's output before it is clamped, if anything.
        held_out: Whether it serves to judge by, and not to fit.
    """

    inputs: Tensor
    wanted: Tensor
    beside: Tensor | None
    held_out: bool


def given_to_next(model: nn.Module, links: Sequence[Link], inputs: Tensor) -> Tensor:
    """What comes of some inputs after a chain of layers; the inputs themselves where it has none.

    Args:
        model: The model, in evaluation mode.
        links: The layers, each of which leads to the next.
        inputs: ``(batch, ...)``, what the first is given.
    """
    for link in links:
        inputs = _after(model, link, inputs, None)
    return inputs


def refit_together(model: nn.Module, links: Sequence[Link], examples: Sequence[Example]) -> None:
    """Lower the squared error of what comes of a chain of layers, in place.

    The weights of the layers, and those of the normalisations that follow them, go downhill together, from
    where they are, by Adam (Kingma and Ba 2015). They stay as they were where the error on the examples that
    are held out, or on all if none is, is not lower in the end.

    Args:
        model: The compressed model, in evaluation mode.
        links: The layers, each of which leads to the next.
        examples: What it is fitted to, each with one or more examples.
    """
    fitted = [
        piece for example in examples if not example.held_out for piece in _pieces(example, _EXAMPLES_A_STEP)
    ]
    judged = [example for example in examples if example.held_out] or examples
    judged = [piece for example in judged for piece in _pieces(example, len(example.inputs))]
    parameters = _parameters(model, links)
    if not fitted or not parameters:
        return
    before = [parameter.detach().clone() for parameter in parameters]
    unchanged = _error(model, links, judged)
    try:
        with _learning(parameters), torch.enable_grad():
            _descend(model, links, fitted, parameters)
        is_better = _error(model, links, judged) < unchanged  # NaN is no gain either.
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("%s are not refitted together: no gradients (%s).", _names(links), error)
        is_better = False
    if not is_better:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    # It may hold the weights as they were.
    torch.clear_autocast_cache()


def _descend(
    model: nn.Module, links: Sequence[Link], pieces: Sequence[Example], parameters: Sequence[nn.Parameter]
) -> None:
    scale = sum(float(piece.wanted.float().square().sum()) for piece in pieces)
    scale /= sum(len(piece.inputs) for piece in pieces)
    rates = [_RATE * float(parameter.detach().float().square().mean().sqrt()) for parameter in parameters]
    steps = list(_steps(pieces))
    groups = [{"params": [own], "lr": rate} for own, rate in zip(parameters, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=_MOMENTA, eps=1e-12)
    for number, step in enumerate(steps):
        growing = min(1.0, (number + 1) / min(_WARM_UP, len(steps)))
        share = growing * (1 + math.cos(math.pi * number / len(steps))) / 2
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = share * rate
        count = sum(len(piece.inputs) for piece in step)
        for piece in step:
            loss = _squared_error(model, links, piece) / (count * max(scale, torch.finfo(torch.float32).tiny))
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()


def _steps(pieces: Sequence[Example]) -> Iterator[list[Example]]:
    """Enough pieces for a step, in random order, again and again."""
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_ROUNDS):
        step: list[Example] = []
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            step.append(pieces[place])
            if sum(len(piece.inputs) for piece in step) >= _EXAMPLES_A_STEP:
                yield step
                step = []
        if step:
            yield step


def _pieces(example: Example, most: int) -> Iterator[Example]:
    """At most so many examples at a time, and no more than there is memory for."""
    tensors = [tensor for tensor in (example.inputs, example.wanted, example.beside) if tensor is not None]
    bytes_of_one = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
    size = max(1, min(most, _PIECE_BYTES // bytes_of_one))
    for start in range(0, len(example.inputs), size):
        part = slice(start, start + size)
        beside = None if example.beside is None else example.beside[part]
        yield Example(example.inputs[part], example.wanted[part], beside, example.held_out)


def _error(model: nn.Module, links: Sequence[Link], examples: Sequence[Example]) -> float:
    with torch.no_grad():
        return sum(float(_squared_error(model, links, example)) for example in examples)


def _squared_error(model: nn.Module, links: Sequence[Link], example: Example) -> Tensor:
    inputs = given_to_next(model, links[:-1], example.inputs)
    return (_after(model, links[-1], inputs, example.beside) - example.wanted).float().square().sum()


def _after(model: nn.Module, link: Link, inputs: Tensor, beside: Tensor | None) -> Tensor:
    outputs: Tensor = model.get_submodule(link.layer)(inputs)
    return link.following.clamped(link.following.after(model, outputs, beside))


def _parameters(model: nn.Module, links: Sequence[Link]) -> list[nn.Parameter]:
    """The weights of the layers and of what normalises them, those excepted that other modules share."""
    names = [name for link in links for name in (link.layer, *link.following.normalisations)]
    own = [model.get_submodule(name) for name in names]
    others = {id(p) for module in model.modules() if module not in own for p in module.parameters(False)}
    found = {id(p): p for module in own for p in module.parameters() if id(p) not in others}
    return [parameter for parameter in found.values() if parameter.is_floating_point()]


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Record gradients of these parameters within the block, and leave none behind."""
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, (required, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _names(links: Sequence[Link]) -> str:
    return ", ".join(link.layer for link in links)
