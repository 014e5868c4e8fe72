"""Values in the text of a function: PyTorch's type of each, the bounds of an integer, and how it is held in Triton."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from flashtile.lower.rules import Bounds

INT32: Bounds = (-(2**31), 2**31 - 1)
INT64: Bounds = (-(2**63), 2**63 - 1)
LONGEST = 2**24
"""The longest sequence: positions up to here, and their differences, are exact in float32."""

BOTH = frozenset("qk")
"""The indices that make a tile: what depends on both has an element for each of its scores."""

TYPES = {"f": "tl.float32", "b": "tl.int1", "i32": "tl.int32", "i64": "tl.int64"}

_INDICES: dict[str, Bounds] = {"b": (0, 2**31 - 1), "h": (0, 2**31 - 1), "q": (0, LONGEST), "k": (0, LONGEST)}
"""What indices can be, from which follows whether an integer step fits into 32 bits."""


@dataclass(frozen=True)
class Value:
    """A value in the text: its name, PyTorch's type, bounds of an integer, the indices among q and k it depends on.

    `number`: it is this constant. `capture`: it is this captured tensor, of `ndim` dimensions. `floating`: how to get
    the same whole number of a tile in float32 without converting every element, which costs as much as an exponential.
    `factor`: it is so many times what the name holds, a product that the next steps may take together with theirs.
    """

    name: str
    dtype: torch.dtype
    bounds: Bounds = INT64
    axes: frozenset[str] = frozenset()
    number: float | None = None
    capture: int | None = None
    ndim: int = 0
    floating: str | None = None
    factor: float = 1.0

    @property
    def kind(self) -> str:
        """How it is held: "f" float32, "b" boolean, or an integer of the width that its bounds ask for."""
        if self.dtype.is_floating_point:
            return "f"
        return "b" if self.dtype is torch.bool else width(self.bounds)


def width(bounds: Bounds) -> str:
    """The kind that holds integers within these bounds."""
    return "i32" if bounds[0] >= INT32[0] and bounds[1] <= INT32[1] else "i64"


def axes_of(values: Iterable[Value]) -> frozenset[str]:
    """The indices that any of the values depends on."""
    return frozenset().union(*(value.axes for value in values))


def constant(number: Any, dtype: torch.dtype | None = None) -> Value:
    """A number; without a type, the one that PyTorch gives it."""
    if dtype is None:
        dtype = torch.bool if isinstance(number, bool) else torch.int64 if isinstance(number, int) else torch.float32
    bounds = (int(number), int(number)) if not dtype.is_floating_point else INT64
    return Value("", dtype, bounds, number=number)


def literal(number: float, kind: str) -> str:
    """A number as it is written for a kind."""
    if kind == "f":
        value = float(number)
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    return repr(bool(number)) if kind == "b" else repr(int(number))


def index_values() -> list[Value]:
    """Batch, head, query and key: the parameters b, h, q and k of every function."""
    return [Value(name, torch.int64, bounds, BOTH & {name}) for name, bounds in _INDICES.items()]
