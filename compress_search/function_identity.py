"""Which function somebody gave: short texts that differ where the function would answer differently.

A stage that one loss trained must not be reused for another, and a study that one ``evaluate`` judged must
not go on with another. So a function is known by more than its name: by its code, by what it holds (defaults,
what it closes over, the settings and tensors of a module or an object, the arguments of a partial), by the
methods of its object that it uses, and by the functions and the plain values of its own module that it uses.
What it uses of other modules is known by name.

Lists and dictionaries that a function closes over, or that an object has as attributes, are no part of it:
they are where functions note down what they have seen, and would differ after the first call. Nor are
attributes whose names begin with an underscore.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress_search.fingerprint import content_hash, model_fingerprint, update_with_tensor

_KNOWN_BY_NAME = ("torch", "torchvision", "numpy", "compress_search")
"""Packages whose functions do what their names say, in any version that a study accepts."""

_PLAIN = (bool, int, float, str, bytes, type(None))
_SETTINGS = (tuple, Tensor, np.ndarray, nn.Module, FunctionType, functools.partial)
"""What an object holds to compute with, beside plain values."""


def function_identity(function: Any) -> str:
    """Name a function, with a hash of all that it does and holds.

    Args:
        function: Anything that can be called: a function, a lambda, a :func:`functools.partial`, a bound
            method, a module, an object with ``__call__``.

    Returns:
        Its name, for functions of libraries; otherwise its name and 10 hexadecimal digits. Comments and the
        way that its source is laid out do not matter.
    """
    if isinstance(function, FunctionType) and _is_known_by_name(function):
        return function.__qualname__
    return f"{name_of(function)} {content_hash(_described(function, ()))[:10]}"


def name_of(function: Any) -> str:
    """What a function is called; of a module, its settings as it prints them."""
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)})"
    if isinstance(function, nn.Module):
        return repr(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _is_known_by_name(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] in _KNOWN_BY_NAME


def _described(thing: Any, seen: tuple[int, ...]) -> Any:
    """What JSON can hold of a value: the same for what is the same, whichever process made it."""
    if isinstance(thing, float | bytes):
        return repr(thing)
    if isinstance(thing, _PLAIN):
        return thing
    if id(thing) in seen:
        return "itself"
    seen = (*seen, id(thing))
    if isinstance(thing, Tensor | np.ndarray):
        return _hash_of(thing)
    if isinstance(thing, Mapping):
        return sorted(([_described(k, seen), _described(v, seen)] for k, v in thing.items()), key=json.dumps)
    if isinstance(thing, list | tuple):
        return [_described(item, seen) for item in thing]
    if isinstance(thing, set | frozenset):
        return sorted((_described(item, seen) for item in thing), key=json.dumps)
    if isinstance(thing, functools.partial):
        return ["partial", _described(thing.func, seen), _described([thing.args, thing.keywords], seen)]
    if isinstance(thing, MethodType):
        owner = thing.__self__
        kind = owner if inspect.isclass(owner) else type(owner)
        used = _methods_used(kind, [thing.__func__], seen)
        return [_described(thing.__func__, seen), _described(owner, seen), *used]
    if isinstance(thing, FunctionType):
        return _of_function(thing, seen)
    if isinstance(thing, nn.Module):
        return _of_module(thing, seen)
    if inspect.isclass(thing) or inspect.ismodule(thing) or inspect.isbuiltin(thing):
        return thing.__name__
    return _of_object(thing, seen)


def _of_object(thing: Any, seen: tuple[int, ...]) -> Any:
    kind = type(thing)
    call = inspect.getattr_static(kind, "__call__", None)
    held = {
        name: _described(value, seen)
        for name, value in getattr(thing, "__dict__", {}).items()
        if not name.startswith("_") and isinstance(value, (*_PLAIN, *_SETTINGS))
    }
    if not isinstance(call, FunctionType):
        return [kind.__qualname__, None, held]
    return [kind.__qualname__, _described(call, seen), held, *_methods_used(kind, [call], seen)]


def _methods_used(kind: type, functions: Iterable[Any], seen: tuple[int, ...]) -> list[Any]:
    """The methods of a class that some functions of it use, and those that these use; nothing if none."""
    found: dict[str, Any] = {}
    ahead = [function for function in functions if isinstance(function, FunctionType)]
    own = {id(function) for function in ahead}
    while ahead:
        for name in _names_in(ahead.pop().__code__):
            method = inspect.getattr_static(kind, name, None)
            if isinstance(method, property):
                method = method.fget
            method = getattr(method, "__func__", method)  # Of static and class methods.
            known = name in found or id(method) in own or not isinstance(method, FunctionType)
            if not known and not _is_known_by_name(method):
                found[name] = method
                ahead.append(method)
    return [{name: _described(found[name], seen) for name in sorted(found)}] if found else []


def _hash_of(values: Tensor | np.ndarray[Any, Any]) -> str:
    digest = hashlib.sha256()
    if isinstance(values, Tensor):
        update_with_tensor(digest, values)
    else:
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _of_function(function: FunctionType, seen: tuple[int, ...]) -> Any:
    if _is_known_by_name(function):
        return function.__qualname__
    used = {}
    for name in sorted(_names_in(function.__code__)):
        value = function.__globals__.get(name, function)
        is_own = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if is_own or isinstance(value, _PLAIN):
            used[name] = _described(value, seen)
    held = [function.__defaults__, function.__kwdefaults__, _closed_over(function)]
    return [_source_of(function), _described(held, seen), used]


def _closed_over(function: FunctionType) -> list[Any]:
    values = []
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # It is not filled yet: the function stands further up than what it uses.
            continue
        if not isinstance(value, list | dict | set):
            values.append(value)
    return values


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names_in, inner))


def _source_of(function: FunctionType) -> Any:
    """The source without comments, layout and docstring, or the bytecode where there is none of its own."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _of_code(function.__code__)
    (body, *others) = tree.body
    if others or not isinstance(body, ast.FunctionDef) or body.name != function.__name__:
        # A lambda: the line that it stands on says more than what it does.
        return _of_code(function.__code__)
    if ast.get_docstring(body, clean=False) is not None:
        body.body = body.body[1:] or [ast.Pass()]
    return ast.unparse(body)


def _of_code(code: CodeType) -> Any:
    constants = [_of_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _of_module(module: nn.Module, seen: tuple[int, ...]) -> Any:
    plain = {
        f"{name}.{key}": _described(value, seen)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if not key.startswith("_") and key != "training"
    }
    forward = [
        _described(type(part).forward, seen)
        for part in module.modules()
        if isinstance(getattr(type(part), "forward", None), FunctionType)
    ]
    used = [
        methods
        for kind in dict.fromkeys(type(part) for part in module.modules())
        for methods in _methods_used(kind, [inspect.getattr_static(kind, "forward", None)], seen)
    ]
    return [repr(module), model_fingerprint(module), plain, forward, *used]
