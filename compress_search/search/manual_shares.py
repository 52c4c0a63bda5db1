"""What of the shares of the manual selection a study cannot use, known before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress_search.exceptions import ConfigError
from compress_search.search.settings import METHOD_CHOICE, SearchSettings, methods_of
from compress_search.search.variables import ends

_MANUAL = "manual"
_FACTORISING = ("spatial_svd", "weight_svd")


def check_manual_shares(settings: SearchSettings) -> None:
    """Make sure that a study uses the shares that it is given, and can use them in all stages of a trial.

    A layer that a method factorises consists of parts from then on, whose names begin with the layer's: only
    a pattern can fit both the layer and its parts.

    Raises:
        ConfigError: No trial can have the manual selection; or a name means a layer that the first of two
            methods factorises, and would mean nothing to the second. All faults at once.
    """
    faults = []
    selections = _values_of(settings, "selection")
    if settings.shares and _MANUAL not in selections:
        faults.append(
            f"shares is given, but selection is {' or '.join(map(repr, selections))}, which does not use it. "
            f"Choose selection={_MANUAL!r}, or leave shares out."
        )
    for first, *others in map(methods_of, map(str, _values_of(settings, METHOD_CHOICE))):
        if first not in _FACTORISING or not others:
            continue
        faults += [
            f"shares names {name!r}, which {first} factorises, so that {others[0]} would not find it. Write "
            f"a pattern that fits its parts too, such as {name + '*'!r}, or search with one method."
            for name, share in settings.shares.items()
            if share < 1 and not name.endswith("*")
        ]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), source="search settings")


def _values_of(settings: SearchSettings, name: str) -> Sequence[Any]:
    """What a setting can be in a trial."""
    return ends(settings.variables[name]) if name in settings.variables else (settings.plain_value(name),)
