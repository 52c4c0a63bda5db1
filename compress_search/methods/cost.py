"""What a model of any sizes costs, exactly, as a formula that is read off the model once.

A factorised layer costs a rate times its rank. A pruned layer costs a constant times the input channels it
keeps times the output channels it keeps, and each of the two is linear in the sizes of the groups that reach
it. So MACs and parameters both are sums of products of linear forms in the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import nn

from compress_search.exceptions import ModelError

COST_KINDS = ("macs", "params")
"""What a budget can be counted in: MACs of the counted layers, or parameters of the whole model."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LinearForm:
    """``constant`` + the sum of ``slopes[unit]`` * size of the unit."""

    constant: int
    slopes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CostTerm:
    """``scale`` * the product of ``forms`` / ``divisor``; a whole number at all sizes."""

    scale: int
    divisor: int = 1
    forms: tuple[LinearForm, ...] = ()


@dataclass(frozen=True)
class Tie:
    """A tensor that several layers share: counted once, until sizing replaces it in some of them.

    Attributes:
        cost: The tensor's number of elements.
        holders: For each layer that has it, the units whose sizing gives that layer a tensor of its own.
    """

    cost: int
    holders: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a model as a function of the sizes of its units.

    Attributes:
        terms: They are summed. At the size 0 the terms of a unit in ``dense`` are 0.
        full: The full size of each unit.
        dense: For units that are replaced when they are sized (factorised layers): what is paid in place of
            their terms as long as they are not. A unit that is not listed costs, left as it is, what its
            full size costs.
        ties: Tensors that the terms count once for each layer that has them.
    """

    terms: tuple[CostTerm, ...]
    full: Mapping[str, int]
    dense: Mapping[str, int] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()

    def of(self, sizes: Mapping[str, int]) -> int:
        """The cost at some sizes; a unit that is not named stays as it is.

        Raises:
            ModelError: A name is no unit.
        """
        return int(self.of_rows(self.row(sizes)[None])[0])

    def row(self, sizes: Mapping[str, int]) -> Integers:
        """The sizes as ``(units,)`` in the order of :attr:`full`; 0 stands for a unit left as it is.

        Raises:
            ModelError: A name is no unit.
        """
        unknown = [name for name in sizes if name not in self.full]
        if unknown:
            raise ModelError(f"{unknown[0]!r} cannot be sized; what can be: {', '.join(self.full)}.")
        return np.array([sizes.get(name, 0) for name in self.full], dtype=np.int64)

    def of_rows(self, rows: Integers) -> Integers:
        """The costs ``(rows,)`` of many choices of sizes at once.

        Args:
            rows: ``(rows, units)`` in the order of :attr:`full`; 0 stands for a unit left as it is.
        """
        formula = self._formula
        sized = rows > 0
        values = np.where(sized, rows, formula.unsized).astype(np.float64)
        total = np.broadcast_to(formula.scale, (len(rows), len(formula.scale))).copy()
        for slopes, constants in zip(formula.slopes, formula.constants, strict=True):
            # Channel counts are small, so floats hold them exactly; and only floats multiply fast.
            total *= (values @ slopes + constants).astype(np.int64)
        costs: Integers = (total // formula.divisor).sum(axis=1) + ~sized @ formula.dense
        changed = sized & ((rows < formula.full) | (formula.dense > 0))
        for tie, holders in zip(self.ties, formula.holders, strict=True):
            unchanged = (~(changed @ holders > 0)).sum(axis=1)
            costs -= tie.cost * np.maximum(unchanged - 1, 0)
        return costs

    def size_at(self, unit: str, share: float) -> int | None:
        """The largest size at which a unit keeps at most ``share`` of what it costs, at least 1.

        The share of a factorised layer is that of its own cost; the share of coupled channels is that of
        their number. ``None`` where even the size 1 is as dear as the unit left as it is.
        """
        if unit not in self.dense:
            return max(1, int(share * self.full[unit]))
        if self.rates[unit] >= self.dense[unit]:
            return None
        return min(max(1, int(share * self.dense[unit] / self.rates[unit])), self.full[unit])

    @property
    def is_separable(self) -> bool:
        """Whether the cost is a sum of functions of one size each."""
        return not self.ties and all(
            len({unit for form in term.forms for unit in form.slopes}) <= 1 for term in self.terms
        )

    @cached_property
    def rates(self) -> Mapping[str, int]:
        """What each step of the size costs, for the units in :attr:`dense`."""
        rates = dict.fromkeys(self.dense, 0)
        for term in self.terms:
            for unit, slope in term.forms[0].slopes.items() if len(term.forms) == 1 else ():
                if unit in rates:
                    rates[unit] += term.scale * slope // term.divisor
        return rates

    @cached_property
    def _formula(self) -> _Formula:
        places = {unit: place for place, unit in enumerate(self.full)}
        depth = max((len(term.forms) for term in self.terms), default=0)
        slopes = np.zeros((depth, len(places), len(self.terms)))
        constants = np.ones((depth, len(self.terms)))
        scale, divisor = (np.ones(len(self.terms), dtype=np.int64) for _ in range(2))
        for column, term in enumerate(self.terms):
            # Reduced, so that the product before the division stays far from the largest integer.
            common = math.gcd(term.scale, term.divisor)
            scale[column], divisor[column] = term.scale // common, term.divisor // common
            for level, form in enumerate(term.forms):
                constants[level, column] = form.constant
                for unit, slope in form.slopes.items():
                    slopes[level, places[unit], column] = slope
        holders = [
            np.array([[unit in holder for holder in tie.holders] for unit in places], dtype=np.int64)
            for tie in self.ties
        ]
        dense = np.array([self.dense.get(unit, 0) for unit in places], dtype=np.int64)
        full = np.array(list(self.full.values()), dtype=np.int64)
        unsized = np.array([0 if unit in self.dense else self.full[unit] for unit in places], dtype=np.int64)
        return _Formula(slopes, constants, scale, divisor, dense, full, unsized, holders)


def ties_of(model: nn.Module, replacing: Callable[[str, str], frozenset[str]]) -> tuple[Tie, ...]:
    """Find the parameters that several modules share.

    Args:
        model: The model.
        replacing: From the name of a module and of its parameter to the units whose sizing gives that module
            a tensor of its own.
    """
    holders: dict[nn.Parameter, list[frozenset[str]]] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append(replacing(name, parameter_name))
    return tuple(Tie(p.numel(), tuple(found)) for p, found in holders.items() if len(found) > 1)


@dataclass(frozen=True)
class _Formula:
    """:class:`Cost` as arrays. Axes: the position of a form in its term, units, terms."""

    slopes: npt.NDArray[np.float64]
    constants: npt.NDArray[np.float64]
    scale: Integers
    divisor: Integers
    dense: Integers
    full: Integers
    unsized: Integers
    holders: Sequence[Integers]
