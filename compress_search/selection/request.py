"""What is asked of a selector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress_search.exceptions import ConfigError, RatioError
from compress_search.methods.cost import COST_KINDS


@dataclass(frozen=True, kw_only=True)
class SelectionRequest:
    """The budget, and what the sizes must keep to.

    Attributes:
        ratio: Cost to keep / cost of the model, in (0, 1]. It is never exceeded.
        cost: What is counted, one of :data:`compress_search.methods.cost.COST_KINDS`.
        round_to: Ranks and channels are multiples of this. Units that are too small for it stay as they are.
        least_share: Every unit keeps at least this share of what it costs, in [0, 1); for coupled channels,
            of their number.
        shares: For ``manual``: the share that a unit keeps, in (0, 1], by its name or by a pattern such as
            ``"layer3.*"``; 1.0 leaves it as it is.

    Raises:
        RatioError: A ratio or share is out of range.
        ConfigError: Another setting is.
    """

    ratio: float
    cost: str = "macs"
    round_to: int = 1
    least_share: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RatioError(f"The ratio to keep must be in (0, 1], not {self.ratio}.")
        if not 0 <= self.least_share < 1:
            raise RatioError(f"least_share must be in [0, 1), not {self.least_share}.")
        wrong = [f"{name!r}: {share}" for name, share in self.shares.items() if not 0 < share <= 1]
        if wrong:
            raise RatioError(
                f"Each of the shares must be in (0, 1], which these are not: {', '.join(wrong)}."
            )
        if self.cost not in COST_KINDS:
            raise ConfigError([f"cost is {self.cost!r}; it must be one of {', '.join(COST_KINDS)}."])
        if self.round_to < 1:
            raise ConfigError([f"round_to is {self.round_to}; it must be at least 1."])
