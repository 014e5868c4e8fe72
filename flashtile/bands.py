"""Functions that say no more than how far a key may lie from a query: a causal mask or a window, in other words.

Kernels take a window as two numbers, and need neither lists of tiles nor the function. `kv_idx <= q_idx`,
`q_idx - kv_idx < 512`, `(q_idx - kv_idx).abs() <= 8` and what `&` makes of such are told by their traced graphs: sums
of indices and whole numbers are lines, and what compares two lines in which query and key weigh the same is a band.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from flashtile import trace
from flashtile.forgetting import make_room
from flashtile.scalar_graph import Traced


class Band(NamedTuple):
    """Key minus query lies in [low, high]; None: no limit."""

    low: int | None
    high: int | None


class _Line(NamedTuple):
    """query * q_idx + key * kv_idx + constant."""

    query: int
    key: int
    constant: int

    def times(self, factor: int) -> "_Line":
        return _Line(*(factor * number for number in self))

    def plus(self, other: "_Line") -> "_Line":
        return _Line(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def fixed(self) -> bool:
        return not self.query and not self.key


class _Size(NamedTuple):
    """The absolute value of a line."""

    line: _Line


_Value = _Line | _Size | Band | None
"""What is known of a step of the graph; None: nothing."""


_known: dict[str, Band | None] = {}
_KEPT = 1024


def band_of(key: str) -> Band | None:
    """The band that the traced mask of that key is; None where it is none, or nobody can tell."""
    if key not in _known:
        make_room(_known, _KEPT)
        _known[key] = recognised(trace.graph(key))
    return _known[key]


# The compiler takes the answer for a constant, as it takes the key: see `trace`.
band_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recognised(traced: Traced) -> Band | None:
    """The band that a traced mask is."""
    known: dict[fx.Node, _Value] = {}
    given = iter([None, None, _Line(1, 0, 0), _Line(0, 1, 0)])
    for node in traced.forward.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given, None)
        elif node.op == "output":
            (result,) = node.all_input_nodes
            found = known[result]
            return found if isinstance(found, Band) else None
        elif node.op == "get_attr":
            known[node] = _constant(getattr(traced.forward, node.target))
        else:
            known[node] = _step(node, [known[each] if isinstance(each, fx.Node) else each for each in node.args])
    return None


def _constant(value: Any) -> _Value:
    """A whole number, or a tensor that is one."""
    if isinstance(value, torch.Tensor) and value.dtype is torch.int64 and value.ndim == 0:
        value = value.item()
    return _Line(0, 0, value) if type(value) is int else None


def _step(node: fx.Node, arguments: list[Any]) -> _Value:
    """What a call makes of what is known of its arguments. Sums in less than 64 bits may wrap around."""
    name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
    made = getattr(node.meta["val"], "dtype", None)
    if name in _EVERYTHING:
        return Band(None, None) if made is torch.bool else None
    values = [each if isinstance(each, _Line | _Size | Band) else _constant(each) for each in arguments]
    if made not in (torch.bool, torch.int64) or any(value is None for value in values):
        return None
    if name in _ALIKE:
        return values[0]
    rule = None if node.kwargs else _RULES.get(name)
    return None if rule is None else rule(*values)


def _sum(sign: int) -> Callable[[_Value, _Value], _Value]:
    return lambda a, b: a.plus(b.times(sign)) if isinstance(a, _Line) and isinstance(b, _Line) else None


def _negative(a: _Value) -> _Value:
    return a.times(-1) if isinstance(a, _Line) else None


def _product(a: _Value, b: _Value) -> _Value:
    if not isinstance(a, _Line) or not isinstance(b, _Line):
        return None
    if a.fixed:
        return b.times(a.constant)
    return a.times(b.constant) if b.fixed else None


def _absolute(a: _Value) -> _Value:
    return _Size(a) if isinstance(a, _Line) else None


def _at_most(a: _Value, b: _Value, less: int = 0) -> _Value:
    """a <= b - less."""
    if isinstance(a, _Size) and isinstance(b, _Line):
        return _both(_at_most(a.line, b, less), _at_most(a.line.times(-1), b, less))
    if not isinstance(a, _Line) or not isinstance(b, _Line):
        return None
    weight, key, constant = a.plus(b.times(-1))
    if weight != -key:
        return None
    # key * (kv_idx - q_idx) <= limit
    limit = -constant - less
    if key > 0:
        return Band(None, limit // key)
    if key < 0:
        return Band(-(limit // -key), None)
    return Band(None, None) if limit >= 0 else None


def _both(a: _Value, b: _Value) -> _Value:
    if not isinstance(a, Band) or not isinstance(b, Band):
        return None
    lows = [low for low in (a.low, b.low) if low is not None]
    highs = [high for high in (a.high, b.high) if high is not None]
    return Band(max(lows, default=None), min(highs, default=None))


_EVERYTHING = ("new_ones", "ones_like")
_ALIKE = ("clone", "alias", "detach", "_to_copy", "lift_fresh_copy")

_RULES: dict[str, Callable[..., _Value]] = {
    "add": _sum(1),
    "sub": _sum(-1),
    "rsub": lambda a, b: _sum(-1)(b, a),
    "neg": _negative,
    "mul": _product,
    "abs": _absolute,
    "le": _at_most,
    "lt": lambda a, b: _at_most(a, b, 1),
    "ge": lambda a, b: _at_most(b, a),
    "gt": lambda a, b: _at_most(b, a, 1),
    "__and__": _both,
    "bitwise_and": _both,
    "logical_and": _both,
}
