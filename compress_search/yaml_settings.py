"""From YAML text to a checked settings dataclass, with every fault collected rather than the first one."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from compress_search.exceptions import ConfigError

T = TypeVar("T")

_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    types.NoneType: "null",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, save that 1e-3 is a number and that a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                # A list or a mapping, of which PyYAML says that it can be no key.
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float: without this, `lr: 1e-3` would be a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, *, source: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document.
        source: Where it came from, for the error.

    Raises:
        ConfigError: It is not YAML; the error says in which line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{where}{error.problem or error.context}."], source=source) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"It is not YAML: {error}."], source=source) from error


def apply_overrides(values: MutableMapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set ``key=value`` pairs in a nested mapping, in place.

    Args:
        values: What the YAML file said.
        overrides: Such as ``"target=0.4"`` or ``"fine_tune.epochs=3"``; a value is read as YAML.

    Returns:
        The faults found, one text each.
    """
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            faults.append(f"{override!r} does not read key=value; write, for example, fine_tune.epochs=3.")
            continue
        try:
            value = parse_yaml(text, source=override)
        except ConfigError as error:
            faults += [f"{override!r}: {fault}" for fault in error.faults]
            continue
        place = values
        for part in path[:-1]:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[path[-1]] = value
    return faults


def unknown_keys(values: Mapping[Any, Any], known: Collection[str], *, prefix: str = "") -> list[str]:
    """Find the keys that mean nothing.

    Returns:
        One fault a key, with the nearest known key or with all of them.
    """
    faults = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = (
                f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}."
            )
            faults.append(f"{prefix}{key} is not a known key; {remedy}")
    return faults


def build(
    settings: type[T], values: Mapping[str, Any], faults: list[str], *, stand_in: Mapping[str, Any]
) -> T:
    """Make a settings dataclass from what a YAML file said.

    Args:
        settings: A dataclass that raises :class:`ConfigError` for values out of range.
        values: Values by field name; there are no unknown ones.
        faults: Wrong types and ranges and missing fields are added here, one text each.
        stand_in: Sound values for the fields without a default. They take the place of faulty ones, so
            that the ranges of the other fields are checked all the same.

    Returns:
        The settings; of use only if no fault was added.
    """
    arguments = dict(stand_in)
    hints = typing.get_type_hints(settings)
    for item in dataclasses.fields(settings):  # type: ignore[arg-type]
        if item.name in values:
            try:
                arguments[item.name] = converted(values[item.name], hints[item.name], item.name)
            except ConfigError as error:
                faults += error.faults
        elif _is_required(item):
            faults.append(f"{item.name} is missing.")
    try:
        return settings(**arguments)
    except ConfigError as error:
        faults += error.faults
        return settings(**stand_in)


def converted(value: Any, hint: Any, name: str) -> Any:
    """Turn a YAML value into what a type hint asks for.

    Args:
        value: What the file said.
        hint: A field's type hint.
        name: What the faults are to call it.

    Raises:
        ConfigError: It cannot be that; all its faults are in the message.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _converted_to_one_of(value, typing.get_args(hint), name)
    if origin is tuple:
        if isinstance(value, list):
            return _converted_items(value, typing.get_args(hint), name)
    elif origin is Mapping and isinstance(value, dict):
        return _converted_values(value, typing.get_args(hint)[1], name)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return _converted_fields(value, hint, name)
    elif _is_instance(value, hint):
        return hint(value) if hint in (float, Path) else value
    quoted = " Remove the quotes." if isinstance(value, str) and _holds_number(value, hint) else ""
    raise ConfigError([f"{name} is {value!r}; it must be {_in_words(hint)}.{quoted}"])


def _converted_to_one_of(value: Any, hints: Sequence[Any], name: str) -> Any:
    if isinstance(value, dict):
        # A mapping can only mean the nested settings; their own faults say more than "none of these".
        nested = [hint for hint in hints if dataclasses.is_dataclass(hint)]
        if nested:
            likest = max(nested, key=lambda hint: len(value.keys() & _field_names(hint)))
            return converted(value, likest, name)
    for hint in hints:
        try:
            return converted(value, hint, name)
        except ConfigError:
            continue
    # A whole number is a number.
    hints = [hint for hint in hints if hint is not int or float not in hints]
    raise ConfigError(
        [f"{name} is {value!r}; it must be {' or '.join(dict.fromkeys(map(_in_words, hints)))}."]
    )


def _converted_items(value: list[Any], hints: Sequence[Any], name: str) -> tuple[Any, ...]:
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = [hints[0]] * len(value)
    if len(hints) != len(value):
        raise ConfigError([f"{name} has {len(value)} items; it must have {len(hints)}."])
    return tuple(
        converted(item, hint, f"{name}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _converted_values(value: dict[Any, Any], hint: Any, name: str) -> dict[str, Any]:
    """Convert each value of a mapping; its keys are texts, as a layer's name may be a number in YAML."""
    return {str(key): converted(item, hint, f"{name}.{key}") for key, item in value.items()}


def _converted_fields(value: dict[Any, Any], hint: type[T], name: str) -> T:
    known = _field_names(hint)
    faults = unknown_keys(value, known, prefix=f"{name}.")
    own: list[str] = []
    # Settings without a default cannot be made of what is sound alone; a fault stands for each of them.
    required = {item.name: None for item in dataclasses.fields(hint) if _is_required(item)}  # type: ignore[arg-type]
    settings = build(hint, {k: v for k, v in value.items() if k in known}, own, stand_in=required)
    faults += [f"{name}.{fault}" for fault in own]
    if faults:
        raise ConfigError(faults)
    return settings


def _field_names(settings: Any) -> set[str]:
    return {item.name for item in dataclasses.fields(settings)}


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _is_instance(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return hint in (bool, Any)
    if hint is float:
        return isinstance(value, int | float)
    if hint is Path:
        return isinstance(value, str | Path)
    if hint is Any:
        return True
    return isinstance(value, typing.get_origin(hint) or hint)


def _holds_number(text: str, hint: Any) -> bool:
    return hint in (int, float) and isinstance(yaml.load(text, _Loader), int | float)


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return (
            f"a list of {len(typing.get_args(hint))} items" if ... not in typing.get_args(hint) else "a list"
        )
    if typing.get_origin(hint) is not None or dataclasses.is_dataclass(hint):
        return "a mapping"
    return _TYPE_WORDS.get(hint, str(hint))
