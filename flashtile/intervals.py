"""Which tiles a traced mask leaves masked, partial or full, by interval arithmetic over its graph.

Every index of a tile lies in an interval; each step of the graph maps intervals to an interval that holds all values
the step can take on the tile. The mask's own interval then says: never true (masked), always true (full), or unknown
(partial). Whatever is not understood is unknown, so the answer is sound for every function; it is sharp for those
made of comparisons of indices and of captured tables, which are nearly all.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashtile.interval_rules import GROWING, RULES, Interval, Value, cast, may_overflow
from flashtile.scalar_graph import Traced

MOST_CELLS = 2**24
"""Tiles times batch entries times heads beyond which a mask is not analysed but evaluated everywhere."""


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
    state = verdict.low.view(torch.int8) + verdict.high.view(torch.int8)
    return state.expand(*torch.broadcast_shapes(state.shape, unknown.shape))


def _walk(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The graph's result on intervals. What depends on no index is computed as it is."""
    known: dict[fx.Node, Any] = {}
    uses = {node: len(node.users) for node in module.graph.nodes}
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
            del sources, arguments
            for source in node.all_input_nodes:
                # A bound that nobody needs any more gives its memory to the next: fresh pages cost more than the sums.
                uses[source] -= 1
                if uses[source] == 0:
                    del known[source]
    return None


def _apply(node: fx.Node, arguments: Any) -> Value:
    name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
    if name == "index":
        return _read(arguments[0], [_interval(index) for index in arguments[1]])
    if name == "div" and node.kwargs.get("rounding_mode") == "floor":
        name = "floor_divide"
    elif name not in ("_to_copy", "clone") and node.kwargs:
        return None
    rule = RULES.get(name)
    values = [_interval(argument) for argument in arguments]
    if rule is not None:
        first = 1 if name == "where" else 0
        values[first:] = _promoted(node.args[first:], values[first:])
    missing = any(value is None and given is not None for value, given in zip(values, node.args, strict=True))
    if rule is None or missing:
        return _half_known(name, values)
    if name in GROWING and may_overflow([value for value in values if value is not None]):
        return None
    value = rule(*values)
    return None if value is None else cast(value, node.meta["val"].dtype)


def _promoted(arguments: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """Operands in the type that the step computes in: `table_int8[q] < 300` compares with 300 as an int8."""
    kinds = [argument.meta.get("val") if isinstance(argument, fx.Node) else argument for argument in arguments]
    present = [kind for kind in kinds if isinstance(kind, (Tensor, bool, int, float))]
    tensors = [kind for kind in present if isinstance(kind, Tensor)]
    if len(tensors) != sum(isinstance(argument, fx.Node) for argument in arguments):
        return [None] * len(values)
    common = functools.reduce(
        torch.promote_types,
        (kind.dtype if isinstance(kind, Tensor) else torch.result_type(tensors[0], kind) for kind in present),
    )
    return [None if value is None else cast(value, common) for value in values]


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
    return cast(Interval(low, high), table.dtype)


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
