"""The text of one function: its lines, its names, and the elements of captured tensors that it reads and adds to."""

import hashlib
import linecache
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from flashtile.lower.rules import HELPERS, Bounds, Unsupported
from flashtile.lower.values import BOTH, INT64, TYPES, Value, axes_of, literal, width


class Source:
    """The body of a function, written line by line. quick: for scores of half precision (see `hooks.score_hook`);
    apart: what it has query less key in, in float32, if it has that."""

    def __init__(self, quick: bool = False, apart: str | None = None) -> None:
        self.quick, self.apart = quick, apart
        self.lines: list[str] = []
        self.indent = 1
        self.count = 0

    def line(self, text: str) -> None:
        """Adds a line."""
        self.lines.append("    " * self.indent + text)

    def name(self, text: str, prefix: str = "v") -> str:
        """A new name for an expression."""
        self.count += 1
        name = f"{prefix}{self.count}"
        self.line(f"{name} = {text}")
        return name

    def bind(self, text: str, dtype: torch.dtype, axes: frozenset[str], bounds: Bounds = INT64) -> Value:
        """A named value of an expression; half precision rounds, as PyTorch would after each step."""
        if dtype in (torch.float16, torch.bfloat16):
            text = f"({text}).to(tl.{str(dtype).removeprefix('torch.')}).to(tl.float32)"
        return Value(self.name(text), dtype, bounds, axes)

    def text(self, value: Value, kind: str) -> str:
        """The value, converted to a kind."""
        if value.capture is not None:
            value = replace(self.read(value, []), factor=value.factor)
        if value.number is not None:
            return literal(value.number, kind)
        name = value.name if value.factor == 1.0 else f"({value.name} * {literal(value.factor, 'f')})"
        if value.kind == kind:
            return name
        if kind == "f" and value.floating is not None:
            return value.floating
        return f"({name} != 0)" if kind == "b" else f"{name}.to({TYPES[kind]})"

    def read(self, tensor: Value, at: Sequence[Value]) -> Value:
        """One element of a captured tensor for each element of the tile."""
        if tensor.capture is None:
            raise Unsupported("it indexes a tensor that it has computed")
        if len(at) != tensor.ndim:
            raise Unsupported("it computes with a whole captured tensor")
        offset = self._offset(tensor.capture, at, strided=True)
        loaded = f"tl.load(arguments[{tensor.capture}][0] + {offset})"
        axes = axes_of(at)
        if tensor.dtype.is_floating_point:
            return replace(self.bind(f"{loaded}.to(tl.float32)", torch.float32, axes), dtype=tensor.dtype)
        if tensor.dtype is torch.bool:
            return self.bind(f"({loaded} != 0)", torch.bool, axes)
        limits = torch.iinfo(tensor.dtype)
        bounds = (limits.min, limits.max)
        return self.bind(f"{loaded}.to({TYPES[width(bounds)]})", tensor.dtype, axes, bounds)

    def collect(self, pointer: str, capture: int, at: Sequence[Value], part: Value) -> None:
        """Adds a tile's part to a gradient: first summed over what the place does not depend on."""
        axes = axes_of(at)
        value = f"tl.where(valid, spread({self.text(part, 'f')}, score), 0.0)"
        offset = self._offset(capture, at, strided=False)
        if not axes:
            value = f"tl.sum({value})"
        elif axes != BOTH:
            # Vectors: a thread of a tile with one row or column may hold an element often, and would add it as often.
            axis = "KEYS" if axes == {"q"} else "1 - KEYS"
            value, offset = f"tl.sum({value}, axis={axis})", f"tl.max({offset}, axis={axis})"
        self.line(f'tl.atomic_add({pointer} + {offset}, {value}, sem="relaxed")')

    def _offset(self, capture: int, at: Sequence[Value], strided: bool) -> str:
        """Where an element lies: by the tensor's strides, or in a contiguous tensor of the same shape."""
        terms = []
        for dim, index in enumerate(at):
            size, stride = (f"whole(arguments[{capture}][{1 + 2 * dim + part}])" for part in range(2))
            if index.number is not None:
                place = f"{index.number}" if index.number >= 0 else f"({size} + {index.number})"
            else:
                keep = "inside" if index.bounds[0] >= 0 else "wrapped"
                place = f"{keep}({self.text(index, index.kind)}, {size})"
            terms.append((place, size, stride))
        if strided:
            return " + ".join(f"{place} * {stride}" for place, _, stride in terms) or "0"
        text = "0"
        for place, size, _ in terms:
            text = f"({text} * {size} + {place})"
        return text

    def function(self, name: str, parameters: str) -> Any:
        """The function, compiled when a kernel calls it; its text is where `inspect` looks for it."""
        text = "\n".join(["@triton.jit", f"def {name}({parameters}):", *self.lines, ""])
        place = f"<flashtile {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
        linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
        names: dict[str, Any] = {"__name__": __name__, "triton": triton, "tl": tl, **HELPERS}
        exec(compile(text, place, "exec"), names)
        return names[name]
