"""Which tiles a traced mask leaves masked, partial or full, by interval arithmetic over its graph.

Every index of a tile lies in an interval; each step of the graph maps intervals to an interval that holds all values
the step can take on the tile. The mask's own interval then says: never true (masked), always true (full), or unknown
(partial). Whatever is not understood is unknown, so the answer is sound for every function; it is sharp for those
made of comparisons of indices and of captured tables, which are nearly all.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from flashtile.scalar_graph import Traced

MOST_CELLS = 2**24
"""Tiles times batch entries times heads beyond which a mask is not analysed but evaluated everywhere."""


class Interval(NamedTuple):
    """All values lie in [low, high]; of booleans, low means "always true" and high "maybe true"."""

    low: Tensor
    high: Tensor


Value = Interval | None  # None: nothing is known


def layout(
    traced: Traced,
    tensors: Sequence[Tensor],
    query_tiles: Tensor,
    key_tiles: Tensor,
    batch: int,
    heads: int,
) -> Tensor:
    """One state a tile: 0 provably masked, 2 provably all visible, 1 to be evaluated.

    Args:
        traced, tensors: a traced mask and its captured tensors.
        query_tiles, key_tiles: int64 (tiles, 2), first and last index of each tile.
        batch, heads: how many there are; enumerated only where the mask depends on them.

    Returns:
        Tensor: int8 (batch or 1, heads or 1, query tiles, key tiles).
    """
    device = query_tiles.device
    ranges = [
        Interval(*(torch.arange(batch, device=device).view(-1, 1, 1, 1),) * 2),
        Interval(*(torch.arange(heads, device=device).view(1, -1, 1, 1),) * 2),
        Interval(*query_tiles.view(1, 1, -1, 1, 2).unbind(-1)),
        Interval(*key_tiles.view(1, 1, 1, -1, 2).unbind(-1)),
    ]
    used = [bool(node.users) for node in traced.forward.graph.nodes if node.op == "placeholder"]
    cells = len(query_tiles) * len(key_tiles) * (batch if used[0] else 1) * (heads if used[1] else 1)
    unknown = torch.ones((1, 1, len(query_tiles), len(key_tiles)), dtype=torch.int8, device=device)
    if not traced.elementwise or cells > MOST_CELLS:
        return unknown
    verdict = _interval(_walk(traced.forward, [*ranges, *tensors]))
    if verdict is None or verdict.low.dtype is not torch.bool:
        return unknown
    state = verdict.low.to(torch.int8) + verdict.high.to(torch.int8)
    return state.expand(*torch.broadcast_shapes(state.shape, unknown.shape))


def _walk(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The graph's result on intervals. What depends on no index is computed as it is."""
    known: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(feed)
        elif node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], known.__getitem__)
        else:
            sources = [known[source] for source in node.all_input_nodes]
            arguments = fx.node.map_arg(node.args, known.__getitem__)
            if any(source is None or isinstance(source, Interval) for source in sources):
                known[node] = _apply(node, arguments)
            else:
                known[node] = node.target(*arguments, **fx.node.map_arg(node.kwargs, known.__getitem__))
    return None


def _apply(node: fx.Node, arguments: Any) -> Value:
    name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
    if name == "index":
        return _read(arguments[0], [_interval(index) for index in arguments[1]])
    if name == "div" and node.kwargs.get("rounding_mode") == "floor":
        name = "floor_divide"
    elif name not in ("_to_copy", "clone") and node.kwargs:
        return None
    rule = _RULES.get(name)
    values = [_interval(argument) for argument in arguments]
    missing = any(value is None and given is not None for value, given in zip(values, node.args, strict=True))
    if rule is None or missing:
        return _half_known(name, values)
    value = rule(*values)
    wanted = node.meta["val"].dtype
    return None if value is None else _cast(value, wanted)


def _half_known(name: str, values: Sequence[Value]) -> Value:
    """`and` with something false, `or` with something true, where the other side is unknown."""
    present = [value for value in values if value is not None]
    if len(values) != 2 or len(present) != 1 or present[0].low.dtype is not torch.bool:
        return None
    low, high = present[0]
    if name in ("bitwise_and", "logical_and"):
        return Interval(torch.zeros_like(low), high)
    if name in ("bitwise_or", "logical_or"):
        return Interval(low, torch.ones_like(high))
    return None


def _interval(value: Any) -> Value:
    """A constant as an interval of one value; a captured table that is no number is not known."""
    if value is None or isinstance(value, Interval):
        return value
    if isinstance(value, (bool, int, float)):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or value.ndim > 0 or bool(value.isnan()):
        return None
    return Interval(value, value)


def _cast(value: Interval, dtype: torch.dtype) -> Value:
    """Conversions that keep order and value; integers beyond 2^24 may round as floats."""
    if value.low.dtype is dtype:
        return value
    if dtype is torch.bool:
        if value.low.dtype.is_floating_point:
            return None
        zero = (value.low == 0) & (value.high == 0)
        return Interval((value.low > 0) | (value.high < 0), ~zero)
    if dtype.is_floating_point and not value.low.dtype.is_floating_point:
        if value.low.numel() and int(torch.maximum(value.low.abs().max(), value.high.abs().max())) >= 2**24:
            return None
    elif not dtype.is_floating_point and value.low.dtype.is_floating_point:
        return None
    return Interval(value.low.to(dtype), value.high.to(dtype))


def _read(table: Any, index: Sequence[Value]) -> Value:
    """The smallest and largest element of `table` that the indices can name."""
    if not isinstance(table, Tensor) or any(part is None for part in index) or table.numel() == 0:
        return None
    parts = [part for part in index if part is not None]
    if any(bool((part.low < 0).any()) for part in parts) or bool(table.isnan().any()):
        return None
    sizes = table.shape
    clipped = [
        Interval(part.low.clamp(max=size - 1), part.high.clamp(max=size - 1))
        for part, size in zip(parts, sizes, strict=True)
    ]
    exact = all(part.low is part.high or bool((part.low == part.high).all()) for part in clipped[:-1])
    numbers = table.to(torch.int8) if table.dtype is torch.bool else table
    if exact:
        base = torch.zeros((), dtype=torch.int64, device=table.device)
        for part, size in zip(clipped[:-1], sizes[1:], strict=True):
            base = (base + part.low) * size
        low, high = _extremes(numbers.contiguous().view(-1), base + clipped[-1].low, base + clipped[-1].high)
    else:
        low, high = numbers.aminmax()
    if table.dtype is torch.bool:
        low, high = low.bool(), high.bool()
    return Interval(low, high)


def _extremes(values: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of values[first..last], inclusive, for many ranges at once (a sparse table)."""
    longest = int((last - first).max()) + 1 if first.numel() else 1
    low, high = [values], [values]
    for level in range(max(0, longest.bit_length() - 1)):
        step = 2**level
        low.append(torch.minimum(low[-1][:-step], low[-1][step:]))
        high.append(torch.maximum(high[-1][:-step], high[-1][step:]))
    level_of = torch.log2((last - first + 1).double()).long().clamp(max=len(low) - 1)
    # Rounding in log2 near powers of two must not reach past the range's length.
    level_of = level_of - ((1 << level_of) > last - first + 1).long()
    out_low, out_high = values[first], values[first]
    for level in range(len(low)):
        here = level_of == level
        end = len(low[level]) - 1
        begin, tail = first.clamp(max=end), (last - 2**level + 1).clamp(min=0, max=end)
        out_low = torch.where(here, torch.minimum(low[level][begin], low[level][tail]), out_low)
        out_high = torch.where(here, torch.maximum(high[level][begin], high[level][tail]), out_high)
    return out_low, out_high


def _exact_only(rule: Callable[..., Value]) -> Callable[..., Value]:
    """Integers only: floats would round differently here and there."""

    def guarded(*values: Interval) -> Value:
        return None if any(value.low.dtype.is_floating_point for value in values) else rule(*values)

    return guarded


def _multiply(a: Interval, b: Interval) -> Interval:
    corners = torch.stack(torch.broadcast_tensors(*(x * y for x in a for y in b)))
    return Interval(*corners.aminmax(dim=0))


def _floor_divide(a: Interval, b: Interval) -> Value:
    if b.low.numel() != 1 or int(b.low) != int(b.high) or int(b.low) <= 0:
        return None
    return Interval(*(torch.div(bound, b.low, rounding_mode="floor") for bound in a))


def _remainder(a: Interval, b: Interval) -> Value:
    quotient = _floor_divide(a, b)
    if quotient is None:
        return None
    within = quotient.low == quotient.high
    return Interval(
        torch.where(within, a.low - quotient.low * b.low, 0),
        torch.where(within, a.high - quotient.low * b.low, b.low - 1),
    )


def _absolute(a: Interval) -> Interval:
    inside = (a.low <= 0) & (a.high >= 0)
    ends = torch.minimum(a.low.abs(), a.high.abs())
    return Interval(torch.where(inside, torch.zeros_like(ends), ends), torch.maximum(a.low.abs(), a.high.abs()))


def _equal(a: Interval, b: Interval) -> Interval:
    one = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Interval(one, (a.high >= b.low) & (a.low <= b.high))


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    low = torch.where(condition.low, a.low, torch.where(condition.high, torch.minimum(a.low, b.low), b.low))
    high = torch.where(condition.low, a.high, torch.where(condition.high, torch.maximum(a.high, b.high), b.high))
    return Interval(low, high)


def _not(a: Interval) -> Interval:
    return Interval(~a.high, ~a.low)


def _truth(rule: Callable[..., Interval]) -> Callable[..., Value]:
    """Rules of booleans; bit operations on integers are not known."""

    def guarded(*values: Interval) -> Value:
        return rule(*values) if all(value.low.dtype is torch.bool for value in values) else None

    return guarded


def _and(a: Interval, b: Interval) -> Interval:
    return Interval(a.low & b.low, a.high & b.high)


def _or(a: Interval, b: Interval) -> Interval:
    return Interval(a.low | b.low, a.high | b.high)


def _clamp(a: Interval, low: Interval | None = None, high: Interval | None = None) -> Interval:
    for bound, pick in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            a = Interval(pick(a.low, bound.low), pick(a.high, bound.high))
    return a


_RULES: dict[str, Callable[..., Value]] = {
    "add": _exact_only(lambda a, b: Interval(a.low + b.low, a.high + b.high)),
    "sub": _exact_only(lambda a, b: Interval(a.low - b.high, a.high - b.low)),
    "rsub": _exact_only(lambda a, b: Interval(b.low - a.high, b.high - a.low)),
    "mul": _exact_only(_multiply),
    "neg": lambda a: Interval(-a.high, -a.low),
    "abs": _absolute,
    "minimum": lambda a, b: Interval(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "maximum": lambda a, b: Interval(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda a, high: _clamp(a, None, high),
    "floor_divide": _exact_only(_floor_divide),
    "remainder": _exact_only(_remainder),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "lt": lambda a, b: Interval(a.high < b.low, a.low < b.high),
    "le": lambda a, b: Interval(a.high <= b.low, a.low <= b.high),
    "gt": lambda a, b: Interval(a.low > b.high, a.high > b.low),
    "ge": lambda a, b: Interval(a.low >= b.high, a.high >= b.low),
    "where": _where,
    "bitwise_and": _truth(_and),
    "logical_and": _truth(_and),
    "bitwise_or": _truth(_or),
    "logical_or": _truth(_or),
    "bitwise_not": _truth(_not),
    "logical_not": _truth(_not),
    "bitwise_xor": _truth(lambda a, b: _or(_and(a, _not(b)), _and(_not(a), b))),
    "_to_copy": lambda a: a,
    "clone": lambda a: a,
    "lift_fresh_copy": lambda a: a,
    "alias": lambda a: a,
    "detach": lambda a: a,
}
"""How each aten step maps intervals; a step that is not here makes its result unknown."""
