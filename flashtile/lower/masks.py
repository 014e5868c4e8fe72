"""A mask's expression as text: the leaves by templates, functions by their graphs."""

from collections.abc import Sequence
from typing import Any

from flashtile import trace
from flashtile.lower import graphs
from flashtile.lower.source import Source
from flashtile.spans import FULL, PARTIAL


class MaskWriter:
    """Writes a mask into a function's text; its leaves take the tensors, of these shapes, in the order of the token."""

    def __init__(self, source: Source, shapes: Sequence[tuple[int, ...]]) -> None:
        self.source, self.shapes, self.next = source, shapes, 0

    def expression(self, parts: list[Any]) -> str:
        """The text of a parsed token or of a part of it."""
        kind, *rest = parts
        return getattr(self, f"_{kind}")(*rest)

    def _take(self, *at: str) -> str:
        """One element of the next tensor: `at` its last indices, dimensions of size 1 read at 0."""
        index, shape = self.next, self.shapes[self.next]
        self.next += 1
        terms = [
            f"inside({place}, whole(arguments[{index}][{1 + 2 * dim}])) * whole(arguments[{index}][{2 + 2 * dim}])"
            for dim, place in enumerate(at[len(at) - len(shape) :])
            if shape[dim] > 1
        ]
        return f"tl.load(arguments[{index}][0] + {' + '.join(terms) or '0'})"

    def _and(self, left: list[Any], right: list[Any]) -> str:
        return f"({self.expression(left)} & {self.expression(right)})"

    def _or(self, left: list[Any], right: list[Any]) -> str:
        return f"({self.expression(left)} | {self.expression(right)})"

    def _full(self) -> str:
        return "(k == k)"

    def _causal(self, alignment: str) -> str:
        return self._window(-1, 0, alignment)

    def _window(self, left: int, right: int, alignment: str) -> str:
        diagonal = _diagonal(alignment)
        limits = [f"(k <= {diagonal} + {right})"] if right >= 0 else []
        limits += [f"(k >= {diagonal} - {left})"] if left >= 0 else []
        return f"({' & '.join(limits) or '(k == k)'})"

    def _band(self, low: int | None, high: int | None) -> str:
        limits = [] if low is None else [f"(k - q >= {low})"]
        limits += [] if high is None else [f"(k - q <= {high})"]
        return f"({' & '.join(limits) or '(k == k)'})"

    def _chunk(self, size: int, alignment: str) -> str:
        return f"(floor_divide({_diagonal(alignment)}, {size}) == k // {size})"

    def _prefix(self, length: int) -> str:
        return f"(k < {self._take('b') if length < 0 else length})"

    def _document(self) -> str:
        return f"({self._take('b', 'q')} == {self._take('b', 'k')})"

    def _dense(self) -> str:
        return f"({self._take('b', 'h', 'q', 'k')} != 0)"

    def _block(self, block_q: int, block_kv: int, inner: list[Any]) -> str:
        state = self.source.name(self._take("b", "h", f"(q // {block_q})", f"(k // {block_kv})"), "state")
        return f"(({state} == {FULL}) | (({state} == {PARTIAL}) & {self.expression(inner)}))"

    def _custom(self, key: str, arity: int) -> str:
        traced = trace.graph(key)
        result = graphs.write(self.source, traced.forward, graphs.mask_inputs(traced, self.next))
        self.next += arity
        return self.source.text(result, "b")


def _diagonal(alignment: str) -> str:
    return "(q + shift)" if alignment == "bottom_right" else "q"
