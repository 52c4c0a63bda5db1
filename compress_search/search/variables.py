"""Variables of a search beside the ratios: settings for which every trial chooses a value of its own."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna

Value = str | int | float | bool
_SCALARS = frozenset({str, int, float, bool})


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole numbers for a setting that takes only those.

    Attributes:
        low: The lowest value.
        high: The highest value.
        log: Whether to search the logarithm, so that 0.001 to 0.01 is as wide as 0.01 to 0.1.
        step: Distance of the values, counted from ``low``; ``None`` is every value.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None


@dataclass(frozen=True)
class Choice:
    """Some values, without an order.

    Attributes:
        choices: The values: texts, numbers, or true and false.
    """

    choices: tuple[Value, ...]

    def __post_init__(self) -> None:
        # JSON has no tuples. What is no list at all is left for `variable_faults` to name.
        choices: Any = self.choices
        if isinstance(choices, list):
            object.__setattr__(self, "choices", tuple(choices))


Variable = Range | Choice


def variable_to_dict(variable: Variable) -> dict[str, Any]:
    """Return a variable as JSON-able values, as it stands in a YAML file."""
    if isinstance(variable, Choice):
        return {"choices": list(variable.choices)}
    return {"low": variable.low, "high": variable.high, "log": variable.log, "step": variable.step}


def variable_from_dict(value: Mapping[str, Any]) -> Variable:
    """Read what :func:`variable_to_dict` wrote."""
    return Choice(**value) if "choices" in value else Range(**value)


def scalar_types(hint: Any) -> frozenset[type]:
    """Which of text, whole number, number and truth value a field's type hint allows; maybe none."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return _SCALARS.intersection(typing.get_args(hint) if is_union else (hint,))


def variable_faults(name: str, variable: Any, kinds: frozenset[type]) -> list[str]:
    """Say what is wrong with a variable of itself; whether its setting takes the values is not looked at.

    Args:
        name: Of the setting.
        variable: What was given.
        kinds: The setting's types, see :func:`scalar_types`.
    """
    if isinstance(variable, Choice):
        return _choice_faults(name, variable, kinds)
    if isinstance(variable, Range):
        return _range_faults(name, variable, kinds)
    return [
        f"{name} is to be searched over {variable!r}; give Range(low, high) or Choice((...)) in Python, "
        "{low: ..., high: ...} or {choices: [...]} in YAML."
    ]


def ends(variable: Variable) -> tuple[Value, ...]:
    """Return the values between which all others lie: both ends of a range, or every choice."""
    return variable.choices if isinstance(variable, Choice) else (variable.low, variable.high)


def typed(value: Any, kinds: frozenset[type]) -> Any:
    """Turn a whole number into what the setting has, so that 2 and 2.0 make one stage and not two."""
    if kinds.isdisjoint({int, float}) or isinstance(value, str | bool):
        return value
    return int(value) if _is_whole(kinds) else float(value)


def suggest(trial: optuna.Trial, name: str, variable: Variable, kinds: frozenset[type]) -> Any:
    """Let a trial choose a value, and record it under the setting's name."""
    if isinstance(variable, Choice):
        return typed(trial.suggest_categorical(name, variable.choices), kinds)
    high = _on_grid(variable, variable.high)
    if _is_whole(kinds):
        step = 1 if variable.step is None else int(variable.step)
        return trial.suggest_int(name, int(variable.low), int(high), step=step, log=variable.log)
    return trial.suggest_float(name, variable.low, high, step=variable.step, log=variable.log)


def value_near(variable: Variable, plain: Any, kinds: frozenset[type]) -> Value:
    """Return the value of a trial that is not to search: the plain one, as nearly as the variable has it.

    Args:
        variable: The variable.
        plain: The value without a search. If it lies outside, it is the middle of a range, geometric if the
            range is logarithmic, or the first choice.
        kinds: The setting's types, see :func:`scalar_types`.
    """
    if isinstance(variable, Choice):
        return plain if plain in variable.choices else variable.choices[0]
    low, high = variable.low, variable.high
    value: float = plain
    if not _is_number(plain, whole=False) or not low <= plain <= high:
        value = math.sqrt(low * high) if variable.log else (low + high) / 2
    value = _on_grid(variable, value, nearest=True)
    return round(value) if _is_whole(kinds) else value


def _is_whole(kinds: frozenset[type]) -> bool:
    return float not in kinds


def _on_grid(variable: Range, value: float, *, nearest: bool = False) -> float:
    """Move a value to a step of the range: the one below, or the nearest. Decimal, so that 0.1 * 3 is 0.3."""
    if variable.step is None:
        return value
    low, high, step = (Decimal(str(part)) for part in (variable.low, variable.high, variable.step))
    steps = (Decimal(str(value)) - low) / step
    count = round(steps) if nearest else int(steps)
    return float(low + min(count, int((high - low) / step)) * step)


def _range_faults(name: str, variable: Range, kinds: frozenset[type]) -> list[str]:
    if not kinds & {int, float}:
        return [f"{name} is no number, so that it cannot have a range; give choices: {{choices: [...]}}."]
    whole = _is_whole(kinds)
    log: Any = variable.log
    numbers = {"low": variable.low, "high": variable.high}
    if variable.step is not None:
        numbers["step"] = variable.step
    faults = [
        f"{name}.{part} is {value!r}; it must be {'a whole number' if whole else 'a number'}."
        for part, value in numbers.items()
        if not _is_number(value, whole=whole)
    ]
    if not isinstance(log, bool):
        faults.append(f"{name}.log is {log!r}; it must be true or false.")
    if faults:
        return faults
    low, high, step = variable.low, variable.high, variable.step
    if not low < high:
        faults.append(f"{name} has low {low!r} and high {high!r}; low must be less than high.")
    if variable.log and not low > 0:
        faults.append(
            f"{name} has low {low!r}; a logarithmic range begins above 0. Raise low, or remove log."
        )
    if step is not None and variable.log:
        faults.append(f"{name} has a step and is logarithmic; give step or log, not both.")
    if step is not None and low < high and not 0 < step <= high - low:
        faults.append(f"{name}.step is {step!r}; it must be above 0 and at most high - low, {high - low:g}.")
    return faults


def _choice_faults(name: str, variable: Choice, kinds: frozenset[type]) -> list[str]:
    choices: Any = variable.choices
    if not isinstance(choices, tuple) or not choices:
        return [f"{name}.choices is {choices!r}; it must be a list of at least one value."]
    words = " or ".join(word for kind, word in _TYPE_WORDS.items() if kind in kinds)
    faults = [
        f"{name}.choices has {value!r}; each must be {words}." for value in choices if not _fits(value, kinds)
    ]
    if not faults:
        twice = [value for i, value in enumerate(choices) if value in choices[:i]]
        faults = [f"{name}.choices has {value!r} twice; once is enough." for value in dict.fromkeys(twice)]
    return faults


_TYPE_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _fits(value: Any, kinds: frozenset[type]) -> bool:
    # True is a whole number to Python, and a whole number will do where any number does.
    return type(value) in kinds or (type(value) is int and float in kinds)


def _is_number(value: Any, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return not whole or float(value).is_integer()
