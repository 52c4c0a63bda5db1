"""Whether a network uses what is put in the place of its layers: tried, not assumed.

A network may hold on to a layer in a list that PyTorch does not know of, read a layer's weight, or give it
more than an input. Nothing says so from the outside, but one forward pass shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compress_search.fingerprint import seeded
from compress_search.plan import FactoriseLayer
from compress_search.profile import inference_mode_of
from compress_search.weight_sharing import copy_sharing_weights


def faults_of_factorising(
    model: nn.Module, example_input: Tensor, edits: Sequence[FactoriseLayer]
) -> dict[str, str]:
    """Find the layers that a network cannot do without.

    All are tried at once, in one forward pass; one by one only if that fails.

    Args:
        model: The model. It is not changed.
        example_input: ``(batch, ...)``; its first example is run.
        edits: What is to replace each layer, at any rank.

    Returns:
        What goes wrong, by layer name; nothing for the layers that can be replaced.
    """
    if not edits:
        return {}
    tried, _ = copy_sharing_weights(model)
    # The parts begin with random weights, and not at the cost of the user's random numbers.
    with seeded(0):
        stand_ins = [_StandIn(tried, edit) for edit in edits]
        try:
            # No hooks: with them, PyTorch's transformers would not take their short cut past the modules.
            with inference_mode_of(tried):
                tried(example_input[:1])
        except Exception as error:
            if len(edits) == 1:
                fault = f"the network fails without it ({type(error).__name__}: {error})"
                return {edits[0].layer: fault}
            alone = [faults_of_factorising(model, example_input, [edit]) for edit in edits]
            return {layer: fault for found in alone for layer, fault in found.items()}
    return {stand_in.layer: stand_in.fault for stand_in in stand_ins if stand_in.fault}


class _StandIn:
    """Takes the place of a layer as its parts will, but computes what the layer did.

    So the rest of the network sees nothing of random weights: where it goes by values, as detectors do with
    their boxes, it goes the same way.

    Args:
        model: A copy of the model; the layer is replaced in it.
        edit: What replaces it.
    """

    def __init__(self, model: nn.Module, edit: FactoriseLayer) -> None:
        self.layer = edit.layer
        old = model.get_submodule(edit.layer)
        edit.apply(model)
        new = model.get_submodule(edit.layer)
        self._compute, self._parts = old.forward, new.forward
        self._is_reached = self._is_bypassed = False
        old.forward, new.forward = self._bypassed, self._forward

    @property
    def fault(self) -> str:
        """What went wrong in a pass that ran to its end; empty if nothing did."""
        if self._is_bypassed:
            return "the network goes on using it where it is replaced"
        return "" if self._is_reached else "the network passes over what replaces it"

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._is_reached = True
        given: Tensor = self._parts(*args, **kwargs)
        wanted: Tensor = self._compute(*args, **kwargs)
        if given.shape != wanted.shape:
            raise RuntimeError(f"its parts give {tuple(given.shape)} in place of {tuple(wanted.shape)}")
        return wanted

    def _bypassed(self, *args: Any, **kwargs: Any) -> Tensor:
        self._is_bypassed = True
        outputs: Tensor = self._compute(*args, **kwargs)
        return outputs
