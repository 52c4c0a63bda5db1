"""Forward passes that wait in the middle, so that what comes later can still be changed.

A pass runs in a greenlet: a call stack of its own within the same thread. A hook of the layer of interest
hands over to whoever started the pass; the stack stays as it is, with just the activations that the rest of
the pass still needs, until the pass is told to go on. Many passes can wait at once, whatever the model's
``forward`` looks like. Threads would do the same, but each would need pools of further threads for its
operations, and PyTorch's states of that thread.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compress_search.profile import first_given


class CannotPauseError(Exception):
    """The model's forward pass is within a block that must not be left for another pass."""


Notes = dict[Hashable, Any]
"""What of a pass is wanted later on, under names."""


class _Running(greenlet):  # type: ignore[misc]
    """The call stack of a pass.

    Attributes:
        notes: What was noted down on its way.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.notes: Notes = {}


class PausablePass:
    """One forward pass of one batch, which waits at :func:`pausing_before` and :func:`pausing_after`.

    Args:
        model: The model, in the mode that it is to run in until the pass has ended.
        batch: ``(batch, ...)``, on the model's device.
    """

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        self._greenlet = _Running(lambda: model(batch))
        self._greenlet.gr_context = contextvars.copy_context()
        self._state: _ThreadState | None = None

    @property
    def notes(self) -> Notes:
        """What was written to :func:`notes_of_pass` in this pass so far."""
        notes: Notes = self._greenlet.notes
        return notes

    def resume(self) -> Tensor | None:
        """Go on to the next pause.

        Returns:
            What the layer waited at was given, or has given; ``None`` where the pass has ended.

        Raises:
            CannotPauseError: The pass waits in a ``torch.inference_mode`` of the model's own.
            Exception: Whatever the model raises.
        """
        outside = _ThreadState.now()
        if self._state is not None:
            self._state.restore()
        try:
            value = self._greenlet.switch()
        finally:
            self._state = _ThreadState.now()
            outside.restore()
        if self._greenlet.dead:
            return None
        if torch.is_inference_mode_enabled() != outside.inference:
            self.drop()
            raise CannotPauseError
        assert isinstance(value, Tensor)
        return value

    def drop(self) -> None:
        """End the pass where it is, and let go of its activations."""
        if self._state is not None and not self._greenlet.dead:
            outside = _ThreadState.now()
            self._greenlet.throw()
            outside.restore()


@contextmanager
def pausing_before(layer: nn.Module) -> Iterator[None]:
    """Let passes that reach the layer within the block wait there; each hands over the layer's input."""
    hook = layer.register_forward_pre_hook(
        lambda _, inputs, kwargs: _hand_over(first_given(inputs, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def pausing_after(layer: nn.Module) -> Iterator[None]:
    """Let passes that leave the layer within the block wait there; each hands over the layer's output."""
    hook = layer.register_forward_hook(lambda _, inputs, output: _hand_over(output))
    try:
        yield
    finally:
        hook.remove()


def notes_of_pass(outside: Notes) -> Notes:
    """Where a hook can note down something for whoever started the pass that it is called in.

    Args:
        outside: What is returned outside of any :class:`PausablePass`.
    """
    if isinstance(getcurrent(), _Running):
        notes: Notes = getcurrent().notes
        return notes
    return outside


def _hand_over(value: Tensor) -> None:
    # Outside of any pass, the layer is run for its own sake. A variable for the current greenlet would keep
    # it alive on its own stack, out of the garbage collector's sight.
    if isinstance(getcurrent(), _Running):
        parent = getcurrent().parent
        assert parent is not None
        parent.switch(value)


def passes_keep_apart(model: nn.Module, layers: Sequence[nn.Module], examples: Sequence[Tensor]) -> bool:
    """Whether passes that wait for each other give what they give one after the other.

    A ``forward`` that leaves activations in its module, for other modules to find, does not.

    Args:
        model: The model, in evaluation mode.
        layers: Where the passes wait, in turn.
        examples: One batch a pass, each ``(batch, ...)``, on the model's device.
    """
    try:
        alone = [_inputs_of(model, layers, [example])[0] for example in examples]
        together = _inputs_of(model, layers, examples)
    except CannotPauseError:
        return False
    return all(
        (one is None) == (other is None) and (one is None or other is None or _is_same(one, other))
        for trace, others in zip(alone, together, strict=True)
        for one, other in zip(trace, others, strict=True)
    )


def _inputs_of(
    model: nn.Module, layers: Sequence[nn.Module], examples: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """Sums of each layer's input in each pass, where all passes go from layer to layer together."""
    passes: list[PausablePass | None] = [PausablePass(model, example) for example in examples]
    traces: list[list[Tensor | None]] = [[] for _ in examples]
    try:
        for layer in layers:
            with pausing_before(layer):
                for number, one in enumerate(passes):
                    inputs = None if one is None else one.resume()
                    if inputs is None:
                        passes[number] = None
                    traces[number].append(None if inputs is None else _sums(inputs))
    finally:
        for one in passes:
            if one is not None:
                one.drop()
    return traces


def _sums(values: Tensor) -> Tensor:
    values = values.double()
    return torch.stack([values.sum(), values.abs().sum()])


def _is_same(sums: Tensor, others: Tensor) -> bool:
    """Whether two inputs are the same up to what a GPU may round otherwise the second time."""
    return bool(((sums - others).abs() <= 1e-4 * sums[1]).all())


@dataclass(frozen=True)
class _ThreadState:
    """What PyTorch keeps for each thread, and so not for each pass.

    Attributes:
        gradients: Whether gradients are recorded.
        inference: Whether an inference mode is on. It can be read, but not set.
        autocast: For each kind of device, whether automatic casts are on, and to which type.
    """

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, bool, Any], ...]

    @classmethod
    def now(cls) -> _ThreadState:
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        autocast = tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    def restore(self) -> None:
        torch.set_grad_enabled(self.gradients)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
