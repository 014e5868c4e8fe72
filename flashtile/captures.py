"""What a Python function reaches: the tensors and constants behind closures, globals, defaults, partials and objects.

A path is a tuple of (step, argument) pairs from the function to a value. `fetch` follows one with plain attribute
access, which the compiler can trace, so that captured tensors stay live inputs with gradients.
"""

import enum
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Path = tuple[tuple[str, Any], ...]
_SCALARS = (int, float, complex, bool, str, bytes, type(None), range, frozenset, enum.Enum, torch.dtype, torch.device)
_DEPTH = 16
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}  # their own globals and attributes do not change
_CALLS = (
    "__call__",
    "__getitem__",
    "__getattr__",
    "__len__",
    "__contains__",
    "__add__",
    "__radd__",
    "__mul__",
    "__rmul__",
)
_LISTS = (list, tuple, torch.nn.ModuleList, torch.nn.ParameterList, torch.nn.Sequential)
_COMPILED = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
    torch.jit.ScriptFunction,
)
_DICTS = (dict, torch.nn.ModuleDict, torch.nn.ParameterDict)


class _Opaque:
    """Stands for a value that cannot be looked into."""


OPAQUE = _Opaque()


class Leaf(NamedTuple):
    """A tensor, constant, code object or library function that a function reaches."""

    path: Path
    value: Any


class Again(NamedTuple):
    """Stands for an object that was reached before, by that path."""

    path: Path


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


def leaves(function: Any, through_modules: bool = False) -> list[Leaf]:
    """Everything that `function` reaches, in a fixed order.

    `through_modules`: it calls modules that it reaches, so what their `forward` reaches counts too.
    """
    names: set[str] = set()
    while True:
        walk = _Walk(names, function, through_modules)
        found = list(walk.over(function, (), _DEPTH))
        if not walk.incomplete:
            return found


def content(found: list[Leaf]) -> tuple[Any, ...] | None:
    """What of the leaves decides how a function computes, hashable: of tensors the kind and which are one and the
    same, of constants the value. None where a value has no such digest (a NumPy array, a set)."""
    first: dict[int, int] = {}
    parts: list[Any] = []
    for position, (path, value) in enumerate(found):
        if isinstance(value, Tensor):
            same_as = first.setdefault(id(value), position)
            parts.append((path, same_as, value.dtype, tuple(value.shape), value.device))
        elif isinstance(value, float):
            parts.append((path, float, repr(value)))  # 0.0 and -0.0 differ, NaN is itself
        elif isinstance(value, (*_SCALARS, types.CodeType)):
            parts.append((path, type(value), value))
        elif value is OPAQUE:
            return None
        elif isinstance(value, Again) or _itself(value):
            parts.append((path, value))
        else:
            parts.append((path, type(value)))
    return tuple(parts)


class _Walk:
    """One walk over what a function reaches. On objects, only attributes that some code on the way names are followed.

    `names` grows with the code that is met; objects that were met before a name was make the walk `incomplete`.
    """

    def __init__(self, names: set[str], root: Any, through_modules: bool) -> None:
        self.names, self.root, self.through_modules = names, root, through_modules
        # The objects are kept alive: the id of a bound method that is gone would go to the next.
        self.seen: dict[int, tuple[Any, Path]] = {}
        self.looked, self.incomplete = False, False

    def over(self, value: Any, path: Path, depth: int) -> Iterator[Leaf]:
        if final(value):
            yield Leaf(path, value)
            return
        if id(value) in self.seen:
            yield Leaf(path, Again(self.seen[id(value)][1]))
            return
        if depth == 0 or _opaque(value):
            yield Leaf(path, OPAQUE)
            return
        self.seen[id(value)] = value, path
        body = code(value)
        if body is not None and self._called(value):
            fresh = _names(body) - self.names
            self.incomplete |= self.looked and bool(fresh)
            self.names |= fresh
        if isinstance(value, types.FunctionType):
            yield Leaf((*path, ("attr", "__code__")), value.__code__)
        elif not isinstance(value, (list, tuple, dict)):
            yield Leaf(path, value)
        for step, child in self._children(value):
            yield from self.over(child, (*path, step), depth - 1)

    def _called(self, value: Any) -> bool:
        """Modules are reached for what they hold; only some functions call them."""
        return value is self.root or self.through_modules or not isinstance(value, torch.nn.Module)

    def _children(self, value: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
        """The values one step away."""
        if isinstance(value, types.FunctionType):
            yield from _beside(value)
        elif isinstance(value, _LISTS):
            yield from ((("item", index), item) for index, item in enumerate(value))
        elif isinstance(value, _DICTS):
            plain = {key: item for key, item in value.items() if _plain(key)}
            yield from ((("item", key), item) for key, item in plain.items())
            if len(plain) < len(value):
                yield ("item", None), OPAQUE
        if not isinstance(value, (types.FunctionType, list, tuple, dict)):
            for name in self._attribute_names(value):
                try:
                    child = getattr(value, name, None)
                except Exception:  # a property that fails here is not one that the function reads
                    continue
                if child is not None:
                    yield ("attr", name), child

    def _attribute_names(self, value: Any) -> list[str]:
        if isinstance(value, types.MethodType):
            return ["__func__", "__self__"]
        if isinstance(value, functools.partial):
            return ["func", "args", "keywords"]
        self.looked = True
        if isinstance(value, (types.ModuleType, type)):
            return sorted(self.names)
        calls = [name for name in _CALLS if isinstance(getattr(type(value), name, None), types.FunctionType)]
        if isinstance(value, torch.nn.Module):
            calls = ["forward"] if self._called(value) else []
        return [*calls, *sorted(self.names)]


def _foreign(value: Any) -> bool:
    """Whether a module, class or function is Python's or PyTorch's own, not the user's."""
    name = value.__globals__.get("__name__") if isinstance(value, types.FunctionType) else None
    name = name or (value.__name__ if isinstance(value, types.ModuleType) else value.__module__)
    return str(name).partition(".")[0] in _LIBRARIES


def _itself(value: Any) -> bool:
    """Libraries' modules and classes, and what is written in C: which object it is says what it computes."""
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    if isinstance(value, (types.ModuleType, type)):
        return _foreign(value)
    return isinstance(value, _COMPILED)


def final(value: Any) -> bool:
    """Whether nothing lies behind it: a tensor, a constant, a library's own."""
    return isinstance(value, (*_SCALARS, Tensor)) or _itself(value)


def _opaque(value: Any) -> bool:
    """Containers of the standard library and of NumPy beyond the usual ones: what they hold cannot be listed."""
    known = (*_LISTS, *_DICTS, types.FunctionType, types.MethodType, types.ModuleType, type, types.SimpleNamespace)
    if isinstance(value, (*known, functools.partial)):
        return False
    return _foreign(type(value)) and not type(value).__module__.startswith("torch")


def code(function: Any) -> types.CodeType | None:
    """What runs when `function` is called."""
    if isinstance(function, torch.nn.Module):
        function = function.forward
    elif isinstance(function, functools.partial):
        return code(function.func)
    elif not isinstance(function, (types.FunctionType, types.MethodType, type)):
        function = type(function).__call__ if callable(function) else None
    body = getattr(function, "__code__", None)
    return body if isinstance(body, types.CodeType) else None


def _beside(function: types.FunctionType) -> Iterator[tuple[tuple[str, Any], Any]]:
    """What a function holds: cells, defaults, and the globals that its code mentions."""
    for index, cell in enumerate(function.__closure__ or ()):
        try:
            yield ("closure", index), cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    yield from ((("default", index), default) for index, default in enumerate(function.__defaults__ or ()))
    if function.__kwdefaults__:
        yield ("attr", "__kwdefaults__"), function.__kwdefaults__
    if not _foreign(function):
        mentioned = sorted(_names(function.__code__) & function.__globals__.keys())
        yield from ((("global", name), function.__globals__[name]) for name in mentioned)


def _plain(key: Any) -> bool:
    return isinstance(key, _SCALARS) or (isinstance(key, tuple) and all(isinstance(part, _SCALARS) for part in key))


def _names(body: types.CodeType) -> frozenset[str]:
    """Global and attribute names that code and the functions defined in it mention."""
    inner = (_names(constant) for constant in body.co_consts if isinstance(constant, types.CodeType))
    spelled = body.co_consts if "getattr" in body.co_names else ()
    return frozenset(body.co_names).union((name for name in spelled if isinstance(name, str)), *inner)


def mentioned(body: types.CodeType) -> tuple[str, ...]:
    """Every name that a function of this code may find among its globals, in a fixed order."""
    return tuple(sorted(_names(body)))
