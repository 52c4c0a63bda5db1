"""Values that are computed when somebody asks for them, and then kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

V = TypeVar("V")


class OnDemand(Mapping[int, V]):
    """A mapping of known keys.

    The imitations of one layer can take 400 MB at each of ten sizes, of which three are looked at.

    Args:
        keys: The keys, each once.
        value_of: From a key to its value.
    """

    def __init__(self, keys: Sequence[int], value_of: Callable[[int], V]) -> None:
        self._keys = dict.fromkeys(keys)
        self._value_of = value_of
        self._values: dict[int, V] = {}

    def __getitem__(self, key: int) -> V:
        """The value, the same one each time."""
        if key not in self._keys:
            raise KeyError(key)
        if key not in self._values:
            self._values[key] = self._value_of(key)
        return self._values[key]

    def __iter__(self) -> Iterator[int]:
        """Go over the keys, in the order given."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._keys)
