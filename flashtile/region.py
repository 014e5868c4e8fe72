"""A mask as kernels take it: a window, for which they need no more than two numbers, and what is left of it."""

import json
from functools import lru_cache
from typing import Any, NamedTuple


class Region(NamedTuple):
    """A mask as the kernels take it: a window, and a token for what is left, "" if that is all."""

    left: int | None
    right: int | None
    top_left: bool
    rest: str


@lru_cache(maxsize=1024)
def region(token: str) -> Region:
    """Takes the windows out of a conjunction, as far as they share one diagonal."""
    left: int | None = None
    right: int | None = None
    alignment: str | None = None
    rest: list[Any] = []
    for part in _conjunction(json.loads(token)):
        limits = _limits(part)
        if limits is None or alignment not in (None, limits[2]):
            rest.append(part)
            continue
        alignment = limits[2]
        left = min((n for n in (left, limits[0]) if n is not None), default=None)
        right = min((n for n in (right, limits[1]) if n is not None), default=None)
    return Region(left, right, alignment == "top_left", _joined(rest))


def _conjunction(expression: list[Any]) -> list[list[Any]]:
    """What `&` joins, in order; what allows everything falls away."""
    kind = expression[0]
    if kind == "and":
        return _conjunction(expression[1]) + _conjunction(expression[2])
    return [] if kind == "full" else [expression]


def _limits(expression: list[Any]) -> tuple[int | None, int | None, str] | None:
    """(left, right, alignment) of a mask that is a window; that of a band may have negative limits."""
    kind, *rest = expression
    if kind == "band":
        low, high = rest
        return (None if low is None else -low), high, "top_left"
    if kind == "causal":
        return None, 0, rest[0]
    if kind == "window":
        left, right, alignment = rest
        return (left if left >= 0 else None), (right if right >= 0 else None), alignment
    return None


def _joined(parts: list[Any]) -> str:
    if not parts:
        return ""
    whole = parts[0]
    for part in parts[1:]:
        whole = ["and", whole, part]
    return json.dumps(whole, separators=(",", ":"))
