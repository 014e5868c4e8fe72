"""A short look at a function: whether it is one that was traced, and which tensors it captures now.

A function that holds nothing but tensors and constants, which most masks and score modifiers are, need not be walked
(see `captures`) in every call. Its code and its constants are the same objects as before, or it is another function;
its tensors may be others of the same kind.
"""

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import captures
from flashtile.forgetting import make_room

_KEPT = 1024
_PLAIN = (Tensor, torch.nn.Parameter)
_MISSING = object()


class _Known(NamedTuple):
    """What was seen at the first look. `kept`: code and constants, alive, so that no other object gets their ids;
    `kinds`: of each captured tensor; `key`: of the graph; `places`: of the tensors that it takes, in its order."""

    kept: tuple[Any, ...]
    kinds: tuple[tuple[Any, ...], ...]
    key: str
    places: tuple[int, ...]


_names: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}
_known: dict[Any, _Known] = {}


def known(function: Any, kind: str) -> tuple[str, tuple[Tensor, ...]] | None:
    """(key of its graph, tensors that it captures), or None: it must be walked."""
    held = _held(function)
    if held is None:
        return None
    tensors = [value for value in held if type(value) in _PLAIN]
    found = _known.get(_key(function, kind, held))
    if found is None or found.kinds != _kinds(tensors):
        return None
    return found.key, tuple([tensors[place] for place in found.places])


def note(function: Any, kind: str, key: str, paths: tuple[captures.Path, ...], leaves: list[captures.Leaf]) -> None:
    """Remembers what a walk found, if a look can tell that it would find the same again."""
    held = _held(function)
    if held is None:
        return
    tensors = [value for value in held if type(value) in _PLAIN]
    constants = [value for value in held if type(value) not in _PLAIN and value is not _MISSING]
    if not all(captures.final(value) and not isinstance(value, Tensor) for value in constants):
        return
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    by_path = {leaf.path: leaf.value for leaf in leaves}
    order = tuple(places[id(by_path[path])] for path in paths if id(by_path[path]) in places)
    if len(places) == len(tensors) and len(order) == len(paths):
        make_room(_known, _KEPT)
        kept = (function.__code__, *constants)
        _known[_key(function, kind, held)] = _Known(kept, _kinds(tensors), key, order)


def _held(function: Any) -> list[Any] | None:
    """What a function's cells, defaults and mentioned globals hold, in a fixed order; None: it has more than these."""
    if type(function) is not types.FunctionType or function.__kwdefaults__:
        return None
    body = function.__code__
    mentioned = _names.get(id(body))
    if mentioned is None:
        make_room(_names, _KEPT)
        mentioned = _names[id(body)] = body, captures.mentioned(body)
    everywhere = function.__globals__
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # one that is not filled yet
        return None
    return [*cells, *(function.__defaults__ or ()), *[everywhere.get(name, _MISSING) for name in mentioned[1]]]


def _key(function: Any, kind: str, held: list[Any]) -> Any:
    return (kind, id(function.__code__), *[None if type(value) in _PLAIN else id(value) for value in held])


def _kinds(tensors: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What of tensors decides how a function computes; which are one and the same, too."""
    if len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors):
        return ()
    return tuple([(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors])
