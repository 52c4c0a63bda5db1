"""What ends a study before it has all its trials: a candidate that is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress_search.exceptions import ConfigError
from compress_search.results import Candidate, within
from compress_search.search.settings import SearchSettings
from compress_search.target import band_of


@dataclass(frozen=True, kw_only=True)
class StopWhen:
    """A study ends as soon as one feasible candidate, finalists included, is as good as this.

    Attributes:
        max_drop: The largest drop of accuracy (0.01 is one point) that it may have.
        mac_ratio: The largest MAC ratio that it may have; ``None`` is any that is feasible.
    """

    max_drop: float = 0.0
    mac_ratio: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if not _is_number(self.max_drop):
            faults.append(f"max_drop is {self.max_drop!r}; it must be a number (0.01 is one point).")
        if self.mac_ratio is not None and not (_is_number(self.mac_ratio) and 0 < self.mac_ratio <= 1):
            faults.append(
                f"mac_ratio is {self.mac_ratio!r}; it must be in (0, 1], MACs kept / MACs, or none for any "
                "that is feasible."
            )
        if faults:
            raise ConfigError(faults, source="stop_when")

    def check(self, settings: SearchSettings) -> None:
        """Make sure that a feasible candidate can be as good as this.

        Raises:
            ConfigError: None can.
        """
        low, _ = band_of(settings.target, settings.tolerance)
        if self.mac_ratio is not None and self.mac_ratio < low:
            raise ConfigError(
                [
                    f"stop_when.mac_ratio is {self.mac_ratio!r}, but feasible candidates have {low:.4g} or "
                    "more. Raise it, leave it out, or lower the target."
                ],
                source="stop_when",
            )

    def met_by(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """Return the first candidate that is good enough, if there is one."""
        return next(filter(self._is_met, candidates), None)

    def outlook(self, candidates: Iterable[Candidate]) -> str:
        """Say what ends the study, or what has."""
        asked = f"a drop of {self.max_drop:g} or less"
        if self.mac_ratio is not None:
            asked += f" and a mac_ratio of {self.mac_ratio:g} or less"
        met = self.met_by(candidates)
        if met is None:
            return f"It ends as soon as a feasible candidate has {asked} (stop_when)."
        return (
            f"No further trial is begun: trial {met.number} has a drop of {met.drop:.4f} and a mac_ratio of "
            f"{met.mac_ratio:.4f}; stop_when asks for {asked}. To search on all the same, leave it out."
        )

    def _is_met(self, candidate: Candidate) -> bool:
        if not candidate.feasible:
            return False
        assert candidate.drop is not None and candidate.mac_ratio is not None
        return within(candidate.drop, self.max_drop) and candidate.mac_ratio <= (self.mac_ratio or 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
