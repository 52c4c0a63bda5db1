"""Which channels a user wants kept, whatever is pruned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from torch import nn

from compress_search.exceptions import ModelError
from compress_search.methods.coupling import CoupledGroup
from compress_search.plain_text import nearest_names
from compress_search.profile import COUNTED_LAYERS
from compress_search.surgery import channel_count

KeptChannels = Mapping[str, Collection[int]]
"""Output channels that must stay, by the name of the layer that makes them."""

NO_CHANNELS: KeptChannels = MappingProxyType({})


def channels_to_keep(wanted: KeptChannels, model: nn.Module) -> dict[str, frozenset[int]]:
    """Make sure that the model has the channels that a user wants kept.

    Args:
        wanted: Indices of output channels by layer name. A layer that has several names may be called by
            any of them.
        model: The model.

    Returns:
        The same by the first name of each layer.

    Raises:
        ModelError: A name is not that of a convolution or linear layer, the nearest names are given; or an
            index is not that of one of its output channels. All faults at once.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, COUNTED_LAYERS)
    }
    first_names = {module: name for name, module in reversed(layers.items())}
    kept: dict[str, frozenset[int]] = {}
    faults = []
    for name, channels in wanted.items():
        if name not in layers:
            remedy = nearest_names(name, layers, otherwise="Layers")
            faults.append(f"keep_channels names {name!r}, which is no convolution or linear layer. {remedy}")
            continue
        number = channel_count(layers[name], "outputs")
        wrong = [str(channel) for channel in channels if not 0 <= channel < number]
        if wrong:
            faults.append(
                f"keep_channels names channel {', '.join(wrong)} of {name!r}, which has {number} output "
                f"channels. Give indices in [0, {number - 1}]."
            )
        first = first_names[layers[name]]
        kept[first] = kept.get(first, frozenset()) | frozenset(channels)
    if faults:
        raise ModelError("\n".join(faults))
    return kept


def protected_blocks(group: CoupledGroup, kept: Mapping[str, frozenset[int]]) -> frozenset[int]:
    """Indices of the blocks of a group that hold a channel to be kept.

    Args:
        group: Coupled channels.
        kept: What :func:`channels_to_keep` returned.
    """
    return frozenset(
        block
        for member in group.members
        if member.side == "outputs" and member.layer in kept
        for block, channels in enumerate(member.blocks)
        if not kept[member.layer].isdisjoint(channels)
    )
