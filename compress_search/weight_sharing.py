"""Copies of a model that share its weights, for as long as nobody needs their own.

The weights of VGG-16 take half a gigabyte. A copy that is only to be traced, or of which a part is about to
be replaced, needs none of them twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn


def copy_sharing_weights(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    """Copy a model, but not the memory of its parameters.

    Args:
        model: The model.

    Returns:
        The copy, whose parameters are others in the same memory and must not be changed in place; its buffers
        are its own. And a function that gives those parameters that the copy still has memory of their own.
    """
    # A subclass may be more than its values; it is left to the copy.
    sharing = {
        id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter
    }
    shared = set(sharing.values())
    # Weight norm of the old kind, and pruning masks, leave what they computed last in an attribute: after a
    # pass with gradients that is no leaf, and only leaves can be copied.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    copied = copy.deepcopy(model, sharing | computed)

    def part() -> None:
        for parameter in copied.parameters():
            if parameter in shared:
                parameter.data = parameter.data.clone()
                shared.remove(parameter)

    return copied, part
