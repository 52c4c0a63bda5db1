"""What differs between a stored study and what is asked for now, and which of it may be accepted.

Accepting touches nothing that is finished. The study goes on with the new value, and remembers from which
trial on. What was computed from other data, settings or weights is not taken for the new one, as stages are
known by the hash of all of these. Versions of packages are not among them, so stages outlive those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WORKSPACE = "workspace"
"""The field of the folder that a process works in."""

_JUDGED = "the finished trials are feasible or not by it"
_SPACE = "it is part of the search space, which is what makes the trials of a study comparable"
_NEVER = {
    "target": _JUDGED,
    "tolerance": _JUDGED,
    "methods": _SPACE,
    "variables": _SPACE,
    "step": _SPACE,
    "grid": _SPACE,
    "reference": "the network is of another size, and every ratio of the study is relative to the old one",
}
"""Fields that are never accepted, and why."""
_GRID = "grid"


@dataclass(frozen=True)
class Difference:
    """A field of a study that is not what is asked for.

    Attributes:
        field: Its name; of a nested one with dots: ``fine_tune.epochs``.
        stored: Its value in the study.
        asked: The value asked for.
    """

    field: str
    stored: Any
    asked: Any

    def __str__(self) -> str:
        return f"{self.field}: stored {self.stored!r}, asked {self.asked!r}"

    @property
    def why_never(self) -> str | None:
        """Why it cannot be accepted; ``None`` if it can."""
        if self.field == "sampler" and _GRID in (self.stored, self.asked):
            return "a grid's trials are its points, in order"
        return _NEVER.get(self.field.partition(".")[0])


@dataclass(frozen=True)
class Change:
    """A difference that was accepted.

    Attributes:
        field: See :class:`Difference`.
        before: The value until then.
        after: The value from then on.
        from_trial: Number of the first trial that had not begun.
    """

    field: str
    before: Any
    after: Any
    from_trial: int

    @property
    def course(self) -> str:
        """The two values, and which trials have which."""
        return f"{self.before} before trial {self.from_trial}, {self.after} from it on"

    def __str__(self) -> str:
        return f"{self.field}: {self.course}"


def differences(stored: Any, asked: Any, field: str = "") -> Iterator[Difference]:
    """Find the fields in which two JSON-able values differ.

    Args:
        stored: As the study has it.
        asked: As it is asked for.
        field: Name of the value.
    """
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for key in {**stored, **asked}:
            name = f"{field}.{key}" if field else str(key)
            yield from differences(stored.get(key, "nothing"), asked.get(key, "nothing"), name)
    elif stored != asked:
        yield Difference(field, stored, asked)
