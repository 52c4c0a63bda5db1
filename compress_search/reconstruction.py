"""Reconstruction: refit a compressed model's layers by least squares, in forward order.

Each layer is given the weights with which its outputs, computed from the inputs that the *compressed* net
now feeds it, come nearest to what the *original* layer put out. Errors of earlier layers are so made good
by later ones instead of adding up (He et al. 2017, section 3.2; Zhang et al. 2016, section 3.3,
"asymmetric"). Where it is known what follows a layer (:mod:`compress_search.following`), what comes of its
outputs there is to be what came of the original's.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress_search.activations import activation_bytes, pieces_within_memory
from compress_search.calibration import warn_of_few_rows
from compress_search.following import NOTHING_KNOWN, Following, Place, find_following, noting
from compress_search.free_memory import give_back_free_memory
from compress_search.joint_refit import LONGEST, Example, Link, given_to_next, refit_together
from compress_search.least_squares import PrimalRegression, Regression, regression_of
from compress_search.memory_layout import has_safe_gradient
from compress_search.patches import add_to_weights
from compress_search.pausing import Notes, PausablePass, passes_keep_apart, pausing_after, pausing_before
from compress_search.profile import first_given, inference_mode_of

logger = logging.getLogger("compress_search")

_HELD_OUT = 4
"""One batch in so many is held out to choose the ridge by."""

_WAITING_BYTES = 2**29
"""What the activations of all forward passes that wait for a refit may take together.

Batches that do not fit start again from the input for the next refit: time in place of memory.
"""


_KEPT_BYTES = 2**26
"""What the inputs and outputs of a layer that are looked at again may take together. At high resolution that
is few examples, but each has many rows."""

_CHAIN_BYTES = 2**27
"""What goes into layers that are refitted together and what should come of them may take this. On ResNet-20
half of it would do nearly as well."""

_ROUNDS = 2
"""How often a layer before a clamp is fitted again. On ResNet-20 pruned to half of its MACs one round lowered
the divergence by 4.7 %, and three by 6.9 %, each going as far as it asks for and no further."""

_STRETCH = 1.5
"""Each round goes further by this than it asks for: like all such bounds from above, its steps are short."""


@dataclass(frozen=True)
class Refit:
    """One layer to be refitted.

    Attributes:
        layer: Its name in the compressed model.
        source: Name of the layer of the original model whose outputs it should reproduce.
        outputs: Indices of the original layer's output channels that it still has; ``None`` for all.
        calls: How often both layers run in one forward pass.
        following: What follows both layers, by names that hold in both models.
    """

    layer: str
    source: str
    outputs: tuple[int, ...] | None = None
    calls: int = 1
    following: Following = NOTHING_KNOWN

    @property
    def link(self) -> Link:
        """The layer as part of a chain."""
        return Link(self.layer, self.following)


@dataclass(frozen=True)
class Visit:
    """One call of a layer that is about to be refitted, on a part of a batch.

    Attributes:
        batch: Number of the batch.
        share: Share of all examples that it has.
        inputs: What the compressed model feeds the layer.
        outputs: What the layer makes of it with its present weights.
        wanted: What the original layer put out.
        beside: What the outputs are added to, in the compressed model and in the original, if that is known.
        start: Of a layer to which others lead, what the first of them is given.
    """

    batch: int
    share: float
    inputs: Tensor
    outputs: Tensor
    wanted: Tensor
    beside: tuple[Tensor, Tensor] | None = None
    start: Tensor | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether it serves to choose the ridge."""
        return self.batch % _HELD_OUT == _HELD_OUT - 1


class Road(Protocol):
    """A way of coming by the inputs of one layer after the other."""

    def visits(self, refit: Refit, leading: Sequence[Refit] = ()) -> Iterator[Visit]:
        """Yield all calls of a layer, with the weights that the layers have now.

        Args:
            refit: Of the layer.
            leading: Of the layers that lead to it and that may change again.
        """

    def close(self) -> None:
        """Let go of everything that is held between the layers."""


def refit_in_forward_order(
    model: nn.Module, original: nn.Module, refits: Sequence[Refit], batches: Sequence[Tensor]
) -> None:
    """Refit layers of ``model``, in place, one after the other in the order given.

    Takes about the time of one forward pass of each model, beside the least squares. Each batch's passes wait
    at the layer that is refitted, and go on with its new weights. Memory for waiting is bounded: batches that
    do not fit run again from the input, as do all for a layer that is called more than once, and where a
    model's ``forward`` does not stand several passes at a time.

    A layer that shares a parameter with another module keeps its weights: what is best for one of them is not
    for the other, and each refit would undo the one before.

    Args:
        model: The compressed model.
        original: The model before compression.
        refits: What to refit, in forward order.
        batches: Calibration inputs, each ``(batch, ...)``; none leaves the model as it is.

    Raises:
        ModelError: Inputs or outputs of a layer are not finite.
    """
    refits = [refit for refit in refits if not _shares_parameters(model, model.get_submodule(refit.layer))]
    if not batches or not refits:
        return
    with inference_mode_of(model), inference_mode_of(original):
        example = batches[0][:1].to(next(original.parameters()).device)
        refits = with_following(refits, original, example)
        road = _road(model, original, refits, batches)
        try:
            refit_on(road, model, refits)
        finally:
            road.close()


def _shares_parameters(model: nn.Module, layer: nn.Module) -> bool:
    """Whether another module of the model holds a parameter of the layer."""
    own = {id(parameter) for parameter in layer.parameters(False)}
    return any(
        id(parameter) in own
        for module in model.modules()
        if module is not layer
        for parameter in module.parameters(False)
    )


def with_following(refits: Sequence[Refit], original: nn.Module, example: Tensor) -> list[Refit]:
    """The same refits, each with what follows its layer in the original.

    Args:
        refits: The refits.
        original: The model before compression.
        example: ``(batch, ...)``, on its device.
    """
    found = find_following(original, example)
    return [replace(refit, following=found.get(refit.source, NOTHING_KNOWN)) for refit in refits]


def refit_on(road: Road, model: nn.Module, refits: Sequence[Refit]) -> None:
    """Refit layers with the inputs that a road gives; see :func:`refit_in_forward_order`."""
    few: list[str] = []
    for chain in chains_of(model, refits):
        give_back_free_memory()
        few += _refit_alone(road, model, chain[0]) if len(chain) == 1 else _refit_chain(road, model, chain)
    warn_of_few_rows(few)


def _refit_alone(road: Road, model: nn.Module, refit: Refit) -> list[str]:
    """Refit one layer by least squares, as the clamp sees it; return its name if it has too few rows."""
    layer = model.get_submodule(refit.layer)
    kept = _KeptVisits()
    regression = _solve(road, model, refit, (), kept.add)
    if isinstance(regression, PrimalRegression) and kept.show_what_follows(refit.following):
        fitted = regression
        if not kept.are_all:
            fitted = PrimalRegression(layer, refit.layer)
            for visit in kept.visits:
                fitted.add_inputs(visit.inputs, held_out=visit.is_held_out)
        if not fitted.is_underdetermined:
            _refine(model, layer, refit, fitted, kept.visits)
    return [refit.layer] if regression is not None and regression.is_underdetermined else []


def _refit_chain(road: Road, model: nn.Module, chain: Sequence[Refit]) -> list[str]:
    """Refit layers one after the other, then together; return the names of those with too few rows."""
    kept = _KeptExamples(model, chain[-1])
    regressions = {
        refit.layer: _solve(road, model, refit, chain[:place], kept.add if refit is chain[-1] else None)
        for place, refit in enumerate(chain)
    }
    few = [name for name, found in regressions.items() if found is not None and found.is_underdetermined]
    is_solved = not few and None not in regressions.values()
    # Their Gram matrices are not needed any more, and the gradients take memory of their own.
    regressions.clear()
    if is_solved:
        give_back_free_memory()
        refit_together(model, [refit.link for refit in chain], kept.examples)
    return few


def _solve(
    road: Road,
    model: nn.Module,
    refit: Refit,
    leading: Sequence[Refit],
    see: Callable[[Visit], None] | None,
) -> Regression | None:
    """Refit one layer by least squares, and let somebody see its visits; ``None`` where there are none."""
    layer = model.get_submodule(refit.layer)
    regression: Regression | None = None
    for visit in road.visits(refit, leading):
        residual = _residual(model, layer, refit, visit)
        if regression is None:
            assert isinstance(layer.weight, nn.Parameter)
            rows = round(refit.calls * residual.numel() / len(layer.weight) / visit.share)
            regression = regression_of(layer, refit.layer, rows=rows)
        regression.add(visit.inputs, residual, held_out=visit.is_held_out)
        if see is not None:
            see(visit)
    if regression is not None:
        _change(layer, regression)
    return regression


def chains_of(model: nn.Module, refits: Sequence[Refit]) -> list[Sequence[Refit]]:
    """Divide refits, in their order, into layers that are refitted together and layers by themselves.

    Layers are refitted together if each leads to the next and one of them but the last has lost outputs.

    Args:
        model: The compressed model.
        refits: The refits, each with what follows its layer.
    """
    chains: list[Sequence[Refit]] = []
    end = len(refits)
    while end:
        leading = refits[end - 1].following.leading
        length = 1
        while (
            length < min(LONGEST, len(leading) + 1, end)
            and leading[-length] == refits[end - 1 - length].layer
            and all(_can_be_chained(model, refit) for refit in refits[end - 1 - length : end])
        ):
            length += 1
        chain = refits[end - length : end]
        if all(refit.outputs is None for refit in chain[:-1]):
            chain = chain[-1:]
        chains.insert(0, chain)
        end -= len(chain)
    return chains


def _can_be_chained(model: nn.Module, refit: Refit) -> bool:
    layer = model.get_submodule(refit.layer)
    weight = layer.weight
    full = isinstance(weight, nn.Parameter) and weight.dtype in (torch.float32, torch.float64)
    return full and refit.layer == refit.source and refit.calls == 1 and has_safe_gradient(layer)


def _residual(model: nn.Module, layer: nn.Module, refit: Refit, visit: Visit) -> Tensor:
    """What the outputs lack so that, followed by what follows, they are the original's before a clamp."""
    residual = _kept(layer, visit.wanted, refit.outputs).sub(visit.outputs)
    if visit.beside is not None:
        ours, theirs = visit.beside
        residual += refit.following.before(model, _kept(layer, theirs, refit.outputs).sub(ours))
    return residual


def _change(layer: nn.Module, regression: Regression) -> None:
    for features, change in regression.changes():
        add_to_weights(layer, features, change)
    # It may hold the weights as they were.
    torch.clear_autocast_cache()


class _KeptVisits:
    """The visits of one refit, to be looked at again: all, or as many as memory allows."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self.are_all = True
        self._bytes = 0

    def add(self, visit: Visit) -> None:
        """Keep a visit, if there is room for it."""
        tensors = [visit.inputs, visit.outputs, visit.wanted, *(visit.beside or ())]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._bytes + size > _KEPT_BYTES:
            self.are_all = False
            return
        self._bytes += size
        self.visits.append(visit)

    def show_what_follows(self, following: Following) -> bool:
        """Whether there is a clamp, and everything is known of what comes before it."""
        summed = following.other is not None
        return following.bounds is not None and all((v.beside is not None) == summed for v in self.visits)


class _KeptExamples:
    """What a chain of layers is refitted to: all visits of the last of them, or as many as memory allows.

    Args:
        model: The compressed model.
        refit: Of the last layer.
    """

    def __init__(self, model: nn.Module, refit: Refit) -> None:
        self.examples: list[Example] = []
        self._model = model
        self._refit = refit
        # Room for those to judge by is not taken by those that come before them.
        held_out = _CHAIN_BYTES // _HELD_OUT
        self._room = {True: held_out, False: _CHAIN_BYTES - held_out}

    def add(self, visit: Visit) -> None:
        """Keep as many examples of a visit as there is room for."""
        layer, refit = self._model.get_submodule(self._refit.layer), self._refit
        if (visit.beside is None) != (refit.following.other is None):
            return
        beside, other = (None, None) if visit.beside is None else visit.beside
        assert visit.start is not None
        start, outputs, wanted = visit.start, visit.outputs, visit.wanted
        tensors = {t.data_ptr(): t for t in (start, outputs, beside) if t is not None}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        fitting = self._room[visit.is_held_out] * len(outputs) // max(size, 1)
        if fitting < len(outputs):
            if fitting == 0:
                return
            size = size * fitting // len(outputs)
            # Copies: a view would keep all of the tensor in memory.
            start, wanted = start[:fitting].clone(), wanted[:fitting].clone()
            beside = None if beside is None else beside[:fitting].clone()
            other = None if other is None else other[:fitting]
        self._room[visit.is_held_out] -= size
        other = None if other is None else _kept(layer, other, refit.outputs)
        wanted = refit.following.after(self._model, _kept(layer, wanted, refit.outputs), other)
        self.examples.append(Example(start, refit.following.clamped(wanted), beside, visit.is_held_out))


def _refine(
    model: nn.Module, layer: nn.Module, refit: Refit, regression: PrimalRegression, kept: Sequence[Visit]
) -> None:
    """Fit again what the clamp that follows lets through.

    Where the original is clamped, everything on that side of the bound is right; what is on the wrong side
    has to come back to the bound and no further. These targets depend on the present outputs, so it takes
    rounds; of the weights of all rounds those stay that have the least error after the clamp.

    Args:
        model: The compressed model.
        layer: The layer, refitted without regard to the clamp.
        refit: What it is refitted to.
        regression: Has seen the inputs of all visits that are kept, and of these alone.
        kept: Calls of the layer.
    """
    following = refit.following
    assert following.bounds is not None
    best_error, best = math.inf, layer.state_dict()
    for number in range(_ROUNDS + 1):
        regression.forget_residuals()
        error = 0.0
        for visit in kept:
            outputs = layer(visit.inputs)
            lack = _residual(model, layer, refit, replace(visit, outputs=outputs))
            beside = None if visit.beside is None else visit.beside[0]
            have, want = (following.after(model, part, beside) for part in (outputs, outputs + lack))
            apart = have.clamp(*following.bounds) - want.clamp(*following.bounds)
            error += float(apart.float().square().sum())
            if number < _ROUNDS:
                change = before_clamp(have, want, following.bounds).sub_(have).mul_(_STRETCH)
                regression.add_residual(
                    visit.inputs, following.before(model, change), held_out=visit.is_held_out
                )
        if error >= best_error:
            layer.load_state_dict(best)
            torch.clear_autocast_cache()
            return
        best_error, best = error, copy.deepcopy(layer.state_dict())
        if number < _ROUNDS:
            _change(layer, regression)


def before_clamp(have: Tensor, want: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The values nearest to those that are had which are clamped to what is wanted.

    Args:
        have: Present values before a clamp.
        want: The original's, of the same shape.
        bounds: Of the clamp.
    """
    low, high = bounds
    below = torch.where(want <= low, have.clamp_max(low), want)
    return torch.where(want >= high, have.clamp_min(high), below)


def _road(model: nn.Module, original: nn.Module, refits: Sequence[Refit], batches: Sequence[Tensor]) -> Road:
    device = next(model.parameters()).device
    example = batches[0][:1].to(device)
    sides = [
        (model, list(dict.fromkeys(refit.layer for refit in refits))),
        (original, list(dict.fromkeys(refit.source for refit in refits))),
    ]
    given, wanted = (activation_bytes(net, names, example) for net, names in sides)
    pieces = pieces_within_memory(batches, max(given.peak, wanted.peak))
    again = RunAgain(model, original, pieces)
    examples = [example, pieces[-1][-1][-1:].to(device)]
    for net, names in sides:
        if not passes_keep_apart(net, [net.get_submodule(name) for name in names], examples):
            logger.info("Passes cannot wait for each other: every refit runs the models from their input.")
            return again
    places = {refit.following.other for refit in refits if refit.following.other is not None}
    return WaitAndGoOn(again, given.before, wanted.after, places)


class RunAgain:
    """Runs both models from the input for every layer.

    Args:
        model: The compressed model.
        original: The model before compression.
        pieces: The parts of each batch.
    """

    def __init__(self, model: nn.Module, original: nn.Module, pieces: Sequence[Sequence[Tensor]]) -> None:
        self.model = model
        self.original = original
        self.pieces = pieces
        self.device = next(model.parameters()).device
        self._examples = sum(len(piece) for batch in pieces for piece in batch)

    def share(self, piece: Tensor) -> float:
        """Share of all examples that a piece has."""
        return len(piece) / self._examples

    def visits(self, refit: Refit, leading: Sequence[Refit] = ()) -> Iterator[Visit]:
        """See :meth:`Road.visits`."""
        layer, source = self.model.get_submodule(refit.layer), self.original.get_submodule(refit.source)
        first = self.model.get_submodule((*leading, refit)[0].layer)
        places = [] if refit.following.other is None else [refit.following.other]
        ours: Notes = {}
        theirs: Notes = {}
        with noting(self.model, places, ours), noting(self.original, places, theirs):
            for number, batch in enumerate(self.pieces):
                for piece in batch:
                    inputs = piece.to(self.device)
                    wanted = _calls(self.original, source, inputs, refit.calls)
                    given = _calls(self.model, first, inputs, refit.calls)
                    beside = _taken(refit, ours, theirs)
                    for (_, target), (start, output) in zip(wanted, given, strict=True):
                        seen = given_to_next(self.model, [one.link for one in leading], start)
                        outputs = layer(seen) if leading else output
                        yield Visit(number, self.share(piece), seen, outputs, target, beside, start)

    def close(self) -> None:
        """See :meth:`Road.close`; there is nothing."""


@dataclass
class _Waiting:
    """Where one piece of a batch is in one model.

    Attributes:
        model: The model.
        number: Number of the batch.
        piece: The piece.
        running: Its pass; ``None`` where it has to start from the input.
        bytes: What its activations take while it waits.
        before: Name of the layer that it waits before, and what that is given, if it is one that leads to
            others which are refitted with it.
    """

    model: nn.Module
    number: int
    piece: Tensor
    running: PausablePass | None = None
    bytes: int = 0
    before: tuple[str, Tensor] | None = None

    @property
    def notes(self) -> Notes:
        """What was noted down in its pass."""
        return {} if self.running is None else self.running.notes


class WaitAndGoOn:
    """Lets all passes wait at one layer after the other, as far as memory allows.

    Args:
        again: The road to take where this one cannot be taken.
        before: Bytes that one example's activations take when a layer of the compressed model begins.
        after: Bytes that they take when a layer of the original has ended.
        places: Where the tensors can be had that the layers' outputs are added to.
    """

    def __init__(
        self,
        again: RunAgain,
        before: dict[str, int],
        after: dict[str, int],
        places: Collection[Place] = (),
    ) -> None:
        self._again = again
        self._places = places
        self._before = before
        self._after = after
        self._sides = [
            [_Waiting(net, number, piece) for number, batch in enumerate(again.pieces) for piece in batch]
            for net in (again.original, again.model)
        ]

    def visits(self, refit: Refit, leading: Sequence[Refit] = ()) -> Iterator[Visit]:
        """See :meth:`Road.visits`; passes of the compressed model wait before the first that leads to it."""
        if refit.calls > 1:
            # Some of its calls would lie behind a pass that waits, made with the weights it had before.
            self.close()
            yield from self._again.visits(refit)
            return
        model, original = self._again.model, self._again.original
        layer, first = model.get_submodule(refit.layer), (*leading, refit)[0].layer
        links = [one.link for one in leading]
        with ExitStack() as hooks:
            # What a layer is given is noted down before the pass waits there.
            for net in (model, original):
                hooks.enter_context(noting(net, self._places, {}))
            hooks.enter_context(pausing_before(model.get_submodule(first)))
            hooks.enter_context(pausing_after(original.get_submodule(refit.source)))
            for theirs, ours in zip(*self._sides, strict=True):
                wanted = self._go_on(theirs)
                held = ours.before if leading else None
                start = held[1] if held is not None and held[0] == first else self._go_on(ours)
                beside = _taken(refit, ours.notes, theirs.notes)
                if wanted is not None and start is not None:
                    inputs = given_to_next(model, links, start)
                    ours.before = first, start
                    share = self._again.share(ours.piece)
                    yield Visit(ours.number, share, inputs, layer(inputs), wanted, beside, start)
                    del inputs
                # Nothing here may outlive the pass that it belongs to.
                del wanted, held, start, beside
                self._wait(theirs, self._after.get(refit.source))
                self._wait(ours, self._before.get(first))

    def close(self) -> None:
        """See :meth:`Road.close`; ends all passes."""
        for side in self._sides:
            for waiting in side:
                self._drop(waiting)

    def _go_on(self, waiting: _Waiting) -> Tensor | None:
        """Run as far as the layer, from where the pass waits or else from the input."""
        waiting.before = None
        value = None if waiting.running is None else waiting.running.resume()
        if value is None:
            # It may have passed the layer already, where layers do not run in the order of the refits.
            waiting.running = PausablePass(waiting.model, waiting.piece.to(self._again.device))
            value = waiting.running.resume()
        return value

    def _wait(self, waiting: _Waiting, per_example: int | None) -> None:
        """Keep the pass if its activations fit into what is left of the memory."""
        waiting.bytes = 0
        held = sum(one.bytes for side in self._sides for one in side)
        size = None if per_example is None else per_example * len(waiting.piece)
        if size is None or held + size > _WAITING_BYTES:
            self._drop(waiting)
        else:
            waiting.bytes = size

    def _drop(self, waiting: _Waiting) -> None:
        if waiting.running is not None:
            waiting.running.drop()
        waiting.running, waiting.bytes, waiting.before = None, 0, None


def _taken(refit: Refit, ours: Notes, theirs: Notes) -> tuple[Tensor, Tensor] | None:
    """What the outputs are added to, taken out of the notes; ``None`` if it was not seen in both models."""
    if refit.following.other is None:
        return None
    beside = ours.pop(refit.following.other, None), theirs.pop(refit.following.other, None)
    return None if beside[0] is None or beside[1] is None else beside


class _Reached(Exception):
    """The layer of interest has run; what comes after it need not."""


def _calls(model: nn.Module, layer: nn.Module, batch: Tensor, calls: int) -> list[tuple[Tensor, Tensor]]:
    """Run the model as far as the last call of a layer; return the input and output of each call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = first_given(inputs, kwargs)
        if len(seen) + 1 == calls:
            seen.append((given, output))
            raise _Reached
        # What follows may overwrite them in place.
        seen.append((given.clone(), output.clone()))

    hook = layer.register_forward_hook(record, with_kwargs=True)
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen


def _kept(layer: nn.Module, outputs: Tensor, kept: tuple[int, ...] | None) -> Tensor:
    """The output channels that the compressed layer still has."""
    if kept is None:
        return outputs
    axis = outputs.ndim - 1 if isinstance(layer, nn.Linear) else 1
    return outputs.index_select(axis, torch.as_tensor(kept, device=outputs.device))
