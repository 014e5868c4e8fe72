"""What a Python function reaches: the tensors and constants behind closures, globals, defaults, partials and objects.

A path is a tuple of (step, argument) pairs from the function to a value. `fetch` follows one with plain attribute
access, which the compiler can trace, so that captured tensors stay live inputs with gradients.
"""

import enum
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Path = tuple[tuple[str, Any], ...]
_SCALARS = (int, float, complex, bool, str, bytes, type(None), range, frozenset, enum.Enum, torch.dtype, torch.device)
_DEPTH = 8


class Leaf(NamedTuple):
    """A tensor, constant or code object that a function reaches."""

    path: Path
    value: Any


def fetch(function: Any, path: Path) -> Any:
    """The value at the end of a path."""
    value = function
    for step, argument in path:
        if step == "closure":
            value = value.__closure__[argument].cell_contents
        elif step == "global":
            value = value.__globals__[argument]
        elif step == "default":
            value = value.__defaults__[argument]
        elif step == "item":
            value = value[argument]
        else:
            value = getattr(value, argument)
    return value


def leaves(function: Any) -> list[Leaf]:
    """Everything that `function` reaches, in a fixed order."""
    return list(_walk(function, (), frozenset(), {}, _DEPTH))


def content(found: list[Leaf]) -> tuple[Any, ...] | None:
    """What of the leaves decides how a function computes, hashable: of tensors the kind and which are one and the
    same, of constants the value. None where a value has no such digest (a NumPy array, a set)."""
    first: dict[int, int] = {}
    parts: list[Any] = []
    for position, (path, value) in enumerate(found):
        if isinstance(value, Tensor):
            same_as = first.setdefault(id(value), position)
            parts.append((path, same_as, value.dtype, tuple(value.shape), value.device))
        elif isinstance(value, (*_SCALARS, types.CodeType)):
            parts.append((path, type(value), value))
        elif isinstance(value, set) or hasattr(value, "__array__"):
            return None
        else:
            parts.append((path, type(value)))
    return tuple(parts)


def _walk(value: Any, path: Path, names: frozenset[str], seen: dict[int, Any], depth: int) -> Iterator[Leaf]:
    """`names`: what the code on the way here mentions; on objects, only attributes of such names are looked up."""
    if isinstance(value, (*_SCALARS, Tensor)):
        yield Leaf(path, value)
        return
    if depth == 0 or id(value) in seen or isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
        return
    seen[id(value)] = value  # kept alive: the id of a bound method that is gone would be given to the next
    if not isinstance(value, (types.FunctionType, list, tuple, dict)):
        yield Leaf(path, value)
    code = getattr(value, "__code__", getattr(getattr(value, "forward", None), "__code__", None))
    if isinstance(code, types.CodeType):
        names = names | _names(code)
    if isinstance(value, types.FunctionType):
        yield Leaf((*path, ("attr", "__code__")), value.__code__)
    for step, child in _children(value, names):
        yield from _walk(child, (*path, step), names, seen, depth - 1)


def _children(value: Any, names: frozenset[str]) -> Iterator[tuple[tuple[str, Any], Any]]:
    """The values one step away."""
    if isinstance(value, types.FunctionType):
        for index, cell in enumerate(value.__closure__ or ()):
            try:
                yield ("closure", index), cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
        yield from ((("default", index), default) for index, default in enumerate(value.__defaults__ or ()))
        mentioned = sorted(_names(value.__code__) & value.__globals__.keys())
        yield from ((("global", name), value.__globals__[name]) for name in mentioned)
    elif isinstance(value, (list, tuple)):
        yield from ((("item", index), item) for index, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((("item", key), item) for key, item in value.items() if isinstance(key, (str, int)))
    else:
        for name in _attribute_names(value, names):
            child = getattr(value, name, None)
            if child is not None:
                yield ("attr", name), child


def _attribute_names(value: Any, names: frozenset[str]) -> list[str]:
    if isinstance(value, types.MethodType):
        return ["__func__", "__self__"]
    if isinstance(value, functools.partial):
        return ["func", "args", "keywords"]
    if callable(value):
        call = "forward" if isinstance(value, torch.nn.Module) else "__call__"
        return [call, *sorted(names)]
    return sorted(names)


def _names(code: types.CodeType) -> frozenset[str]:
    """Global and attribute names that the code and the functions defined in it mention."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)
