"""Which layers a user wants left alone."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from compress_search.exceptions import ModelError
from compress_search.plain_text import nearest_names
from compress_search.profile import ModelProfile


def layers_matching(patterns: Collection[str], profile: ModelProfile) -> frozenset[str]:
    """Return the counted layers that some pattern names, those among them that do not run.

    Args:
        patterns: Names, or patterns in which ``*`` stands for anything, as in ``"layer1.*"``. A name stands
            for all layers below it, too.
        profile: The model's cost, for its layers.

    Raises:
        ModelError: A pattern matches no layer; the nearest names are given, all faults at once.
    """
    # An auxiliary head is left alone anyway, but to ask for it is no fault.
    names = [layer.name for layer in (*profile.layers, *profile.idle)]
    found: set[str] = set()
    faults = []
    for pattern in patterns:
        matches = {n for n in names if fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")}
        found |= matches
        if not matches:
            remedy = nearest_names(pattern, names, otherwise="Layers")
            faults.append(f"ignore names {pattern!r}, which matches no convolution or linear layer. {remedy}")
    if faults:
        raise ModelError("\n".join(faults))
    return frozenset(found)
