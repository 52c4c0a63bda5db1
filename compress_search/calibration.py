"""What calibration data says of a model: Gram matrices, divergence of outputs, BatchNorm statistics.

Everything streams over the batches: memory grows with the layers, not with the number of samples.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from compress_search.activations import activation_bytes, examples_within_memory, pieces_within_memory
from compress_search.divergence import Divergence, divergence_of
from compress_search.exceptions import ModelError
from compress_search.moments import MomentSums
from compress_search.profile import CONVOLUTIONS, first_given, inference_mode_of
from compress_search.sampled_rows import RowSampling, SampledRows, most_rows

logger = logging.getLogger("compress_search")

_GRAM_ELEMENTS = 2**27
"""How many elements of Gram matrices are accumulated in one pass (1 GB in float64)."""

_COMPARED = 4
"""One batch in so many decides between two sets of BatchNorm statistics, as many are a first sample."""

_JOINED = 32
"""So many batches of one example are joined for BatchNorm statistics, or as many as memory allows."""

WIDEST = 8192
"""Of layers with more input features than this, rows are kept in place of a Gram matrix (0.5 GB in float64 at
this width)."""

InputMoments = Tensor | SampledRows
"""What is kept of a layer's inputs: a Gram matrix, or of a wide layer some rows."""


def gram_matrices(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]
) -> dict[str, InputMoments]:
    """Accumulate the second moments of layers' input patches.

    One pass over the batches serves as many layers as fit into a bounded memory.

    Args:
        model: The model.
        layers: For layers of the model by name, the convolution or linear layer that says how the inputs
            become rows, see :func:`compress_search.patches.input_patches`: the layer itself, or another one
            in its place.
        batches: Calibration inputs, each ``(batch, ...)``.

    Returns:
        For each layer of at most :data:`WIDEST` features ``(groups, features + 1, features + 1)`` in float64:
        the mean over the rows of the outer product of ``(row, 1)`` with itself. The last column holds the
        mean of the rows. For each wider layer a sample of its rows.

    Raises:
        ModelError: A layer's input is not finite.
    """
    example = batches[0][:1].to(next(model.parameters()).device)
    peak = activation_bytes(model, [], example).peak
    pieces = [piece for batch in pieces_within_memory(batches, peak) for piece in batch]
    grams: dict[str, InputMoments] = {}
    for names in _passes({name: moment_elements(layer) for name, layer in layers.items()}):
        grams |= _gram_matrices(model, {name: layers[name] for name in names}, pieces)
    return grams


def moment_elements(layer: nn.Module) -> int:
    """Number of elements of a layer's Gram matrices, or of the rows that are kept in their place.

    Args:
        layer: A convolution or a linear layer.
    """
    groups, features = _groups_and_features(layer)
    return most_rows(groups * features) * groups * features if is_wide(layer) else groups * features**2


def is_wide(layer: nn.Module) -> bool:
    """Whether a layer's Gram matrices would be too large.

    Args:
        layer: A convolution or a linear layer.
    """
    groups, features = _groups_and_features(layer)
    return groups * features**2 > WIDEST**2


def _groups_and_features(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1, weight[0].numel()


def _passes(sizes: Mapping[str, int]) -> list[list[str]]:
    """Divide layers into passes of at most ``_GRAM_ELEMENTS`` elements, or of a single layer."""
    passes: list[list[str]] = []
    filled = 0
    for name, elements in sizes.items():
        if not passes or filled + elements > _GRAM_ELEMENTS:
            passes.append([])
            filled = 0
        passes[-1].append(name)
        filled += elements
    return passes


def _gram_matrices(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]
) -> dict[str, InputMoments]:
    wide = {name: RowSampling(layer) for name, layer in layers.items() if is_wide(layer)}
    sums = {name: MomentSums(layer, has_bias=True) for name, layer in layers.items() if name not in wide}

    def accumulate(name: str) -> Callable[[Any, Any, Any, Any], None]:
        moments = sums.get(name) or wide[name]
        return lambda module, inputs, kwargs, output: moments.add(first_given(inputs, kwargs))

    hooks = [
        model.get_submodule(name).register_forward_hook(accumulate(name), with_kwargs=True) for name in layers
    ]
    try:
        run(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    grams = {name: check_finite(total.gram(), layer=name) for name, total in sums.items()}
    samples = {name: sampling.sample() for name, sampling in wide.items()}
    for name, sample in samples.items():
        check_finite(sample.values, layer=name)
    few = [name for name, gram in grams.items() if sums[name].rows < gram.shape[-1]]
    few += [name for name, sample in samples.items() if wide[name].seen < sample.values.shape[-1]]
    warn_of_few_rows([name for name in layers if name in few])
    return {name: gram.div_(sums[name].rows) for name, gram in grams.items()} | samples


def warn_of_few_rows(layers: Sequence[str]) -> None:
    """Say which layers have fewer calibration rows than input features, if any."""
    if layers:
        logger.warning(
            "There are fewer calibration rows than input features in: %s. A ridge keeps the fit sane; more "
            "calibration samples would serve it better.",
            ", ".join(layers),
        )


def _is_finite(values: Tensor) -> bool:
    # Unlike torch.isfinite, this needs no copy of what can be the largest thing in memory.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def check_finite(matrix: Tensor, *, layer: str) -> Tensor:
    """Return ``matrix`` if it is finite.

    Raises:
        ModelError: It is not; the layer is named.
    """
    if not _is_finite(matrix):
        raise ModelError(
            f"The inputs or outputs of layer {layer!r} are not finite (NaN or infinity) on the calibration "
            "data. Check the model's weights and the calibration inputs."
        )
    return matrix


def check_weights(model: nn.Module) -> None:
    """Make sure that what a model computes with is finite and lies on one device.

    Parameters and the statistics of normalisations must be finite. Other buffers must not be NaN; infinity
    may be meant, as in the mask of an attention.

    Raises:
        ModelError: One is not finite, and is named; or there are several devices.
    """
    # What modules keep beside (get_extra_state) may be anything, and a tensor of it may lie anywhere.
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not name.endswith(_EXTRA_STATE_KEY_SUFFIX)
    }
    devices = sorted({str(tensor.device) for tensor in state.values()})
    if len(devices) > 1:
        raise ModelError(
            f"The model lies on several devices ({', '.join(devices)}). Put it on one: model.to(device)."
        )
    masks = _buffers_that_may_be_infinite(model)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if name in masks and not tensor.isnan().any():
            continue
        if not _is_finite(tensor):
            raise ModelError(
                f"The weights {name!r} are not finite: they hold NaN or infinity. Train the model again, or "
                "load other weights."
            )


def _buffers_that_may_be_infinite(model: nn.Module) -> set[str]:
    """Names of all buffers but the statistics of normalisations."""
    return {
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, _NormBase)
        for name in module._buffers
    }


def run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run the model over all batches for the sake of its hooks."""
    device = next(model.parameters()).device
    with inference_mode_of(model):
        for batch in batches:
            model(batch.to(device))


def divergence(model: nn.Module, reference: nn.Module, batches: Sequence[Tensor]) -> float:
    """How far a model's outputs are from the reference's, without labels.

    Args:
        model: The model.
        reference: The model it should imitate.
        batches: Inputs, each ``(batch, ...)``.

    Returns:
        See :func:`compress_search.divergence.divergence_of`; the mean over all examples.
    """
    device = next(model.parameters()).device
    total = Divergence()
    with inference_mode_of(model), inference_mode_of(reference):
        for batch in batches:
            total += divergence_of(model(batch.to(device)), reference(batch.to(device)))
    return total.mean


def with_best_batchnorm(model: nn.Module, reference: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Return the model with its BatchNorm statistics re-estimated, or as it is: whichever diverges less.

    After reconstruction the old statistics are often the better ones, so it is measured rather than assumed.

    Args:
        model: The compressed model. It is not changed.
        reference: The model before compression.
        batches: Calibration inputs; none leaves the model as it is.
    """
    if not batches or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    batches = _evenly_sized(model, batches)
    # A part of the batches is enough to tell which is nearer, and passes over all would cost more than the
    # compression itself. Another part is enough to tell that new statistics are worth a pass over all.
    part = max(1, len(batches) // _COMPARED)
    compared, others = batches[-part:], batches[:-part] or batches
    unchanged = divergence(model, reference, compared)
    for sample in (others[:part], batches):
        try:
            estimated = reestimated_batchnorm(model, sample)
        except ValueError as error:
            # One value a channel: a single example, or examples that cannot be joined as they differ in size.
            logger.info("The BatchNorm statistics stay as they are (%s).", error)
            return model
        if not divergence(estimated, reference, compared) < unchanged:  # NaN is no gain either.
            return model
    return estimated


def _evenly_sized(model: nn.Module, batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Join batches that are much smaller than others, or hold one example, with those next to them.

    All batches weigh alike in BatchNorm statistics, and of one example a map of one pixel has no variance.
    Batches of one size above 1 stay as they are, and so do those whose neighbours are of other shapes.
    """
    most = max(len(batch) for batch in batches)
    if most == 1:
        example = batches[0].to(next(model.parameters()).device)
        most = min(_JOINED, examples_within_memory(activation_bytes(model, [], example).peak))
    least = max(2, -(-most // 2))

    def join(parts: Sequence[Tensor]) -> Sequence[Tensor]:
        joined = torch.cat([*parts]) if len(parts) > 1 else parts[0]
        return joined.tensor_split(2) if len(joined) > most and len(joined) // 2 >= least else [joined]

    found: list[Tensor] = []
    small: list[Tensor] = []
    for batch in batches:
        if small and batch.shape[1:] != small[0].shape[1:]:
            found += join(small)
            small = []
        small.append(batch)
        if sum(len(part) for part in small) >= least:
            found += join(small)
            small = []
    if small and found and small[0].shape[1:] == found[-1].shape[1:]:
        small.insert(0, found.pop())
    return [*found, *join(small)] if small else found


def reestimated_batchnorm(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Return a copy whose BatchNorm layers hold the statistics of the calibration data.

    Args:
        model: The model. It is not changed.
        batches: Calibration inputs, each ``(batch, ...)`` with more than one value a channel.

    Raises:
        ValueError: A BatchNorm layer sees one value a channel, which has no variance.
    """
    estimated = copy.deepcopy(model).eval()
    device = next(estimated.parameters()).device
    layers = [m for m in estimated.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        # The first batch replaces the statistics; a layer that does not run keeps them.
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.zero_()
        layer.momentum = None  # PyTorch's word for a plain average over the batches.
        layer.train()
    with torch.no_grad():
        for batch in batches:
            estimated(batch.to(device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return estimated.eval()
