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
        sized = rows > 0
        costs = self._all_terms.of(np.where(sized, rows, self._unsized)) + ~sized @ self._dense
        changed = sized & ((rows < np.array(list(self.full.values()))) | (self._dense > 0))
        for tie in self.ties:
            holders = np.array([[unit in holder for holder in tie.holders] for unit in self.full])
            unchanged = (~(changed @ holders)).sum(axis=1)
            costs -= tie.cost * np.maximum(unchanged - 1, 0)
        return costs

    def changes(self, row: Integers, place: int, sizes: Integers) -> Integers:
        """By how much the cost changes, ``(sizes,)``, when one unit takes another size.

        The same as the difference of what :meth:`of_rows` says, in the time of the few terms that the unit
        is in.

        Args:
            row: ``(units,)``, the sizes before; 0 stands for a unit left as it is.
            place: Position of the unit in :attr:`full`.
            sizes: ``(sizes,)``, what it is to take; 0 stands for leaving it as it is.
        """
        rows = np.tile(row, (len(sizes) + 1, 1))
        rows[1:, place] = sizes
        if self.ties:
            costs = self.of_rows(rows)
        else:
            terms, units = self._terms_of_unit[place]
            values = np.where(rows > 0, rows, self._unsized)[:, units]
            costs = terms.of(values) + (rows[:, place] == 0) * self._dense[place]
        changes: Integers = costs[1:] - costs[0]
        return changes

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
    def _dense(self) -> Integers:
        return np.array([self.dense.get(unit, 0) for unit in self.full], dtype=np.int64)

    @cached_property
    def _unsized(self) -> Integers:
        """The sizes at which the terms say what a unit costs that is left as it is, ``dense`` aside."""
        return np.array([0 if unit in self.dense else full for unit, full in self.full.items()], np.int64)

    @cached_property
    def _all_terms(self) -> _Terms:
        return _Terms.from_terms(self.terms, {unit: place for place, unit in enumerate(self.full)})

    @cached_property
    def _terms_of_unit(self) -> list[tuple[_Terms, Integers]]:
        """For each unit the terms that it is in, and the positions of all units that these need."""
        found = []
        for unit in self.full:
            terms = [term for term in self.terms if any(unit in form.slopes for form in term.forms)]
            needed = {name for term in terms for form in term.forms for name in form.slopes}
            units = [place for place, name in enumerate(self.full) if name in needed]
            places = {name: place for place, name in enumerate(n for n in self.full if n in needed)}
            found.append((_Terms.from_terms(terms, places), np.array(units, dtype=np.int64)))
        return found


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
class _Terms:
    """Terms as arrays. Axes: the position of a form in its term, units, terms."""

    slopes: npt.NDArray[np.float64]
    constants: npt.NDArray[np.float64]
    scale: Integers
    divisor: Integers

    @classmethod
    def from_terms(cls, terms: Sequence[CostTerm], places: Mapping[str, int]) -> _Terms:
        depth = max((len(term.forms) for term in terms), default=0)
        slopes = np.zeros((depth, len(places), len(terms)))
        constants = np.ones((depth, len(terms)))
        scale, divisor = (np.ones(len(terms), dtype=np.int64) for _ in range(2))
        for column, term in enumerate(terms):
            # Reduced, so that the product before the division stays far from the largest integer.
            common = math.gcd(term.scale, term.divisor)
            scale[column], divisor[column] = term.scale // common, term.divisor // common
            for level, form in enumerate(term.forms):
                constants[level, column] = form.constant
                for unit, slope in form.slopes.items():
                    slopes[level, places[unit], column] = slope
        return cls(slopes, constants, scale, divisor)

    def of(self, values: Integers) -> Integers:
        """Their sum ``(rows,)`` at the sizes ``(rows, units)``."""
        total = np.tile(self.scale, (len(values), 1))
        for slopes, constants in zip(self.slopes, self.constants, strict=True):
            # Channel counts are small, so floats hold them exactly; and only floats multiply fast.
            total *= (values.astype(np.float64) @ slopes + constants).astype(np.int64)
        whole: Integers = (total // self.divisor).sum(axis=1)
        return whole
