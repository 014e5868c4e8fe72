"""The nodes of a parsed mask: each states its predicate and its bounds.

`allows` is evaluated on partial tiles only; `lower` says which tiles to visit (see `spans`). A new mask is one such
node of about ten lines and a row in `_KINDS`; no kernel changes. `masks` builds the values that parse to these nodes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from flashtile import spans
from flashtile.spans import FULL, MASKED, PARTIAL, Layout, Spans, Tiling


class At(NamedTuple):
    """Where a predicate is evaluated: broadcastable int64 indices, the size of the problem, the diagonal's shift."""

    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor
    shift: int

    def aligned(self, alignment: str) -> Tensor:
        """The key position of each query's diagonal."""
        return self.query + self.shift if alignment == "bottom_right" else self.query


class Node(Protocol):
    """One node of a parsed mask. `tensors` are the node's own followed by its children's."""

    arity: ClassVar[int]

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor: ...

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans | Layout: ...


@dataclass(frozen=True)
class Full:
    arity: ClassVar[int] = 0

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=at.key.device)

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans:
        return spans.everything(tiling)


@dataclass(frozen=True)
class Window:
    """Covers causal masks too: no left limit and right = 0."""

    left: int
    right: int
    alignment: str
    arity: ClassVar[int] = 0

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        diagonal = at.aligned(self.alignment)
        if self.left < 0 and self.right < 0:
            return Full().allows(at, tensors)
        after = at.key <= diagonal + self.right if self.right >= 0 else None
        before = at.key >= diagonal - self.left if self.left >= 0 else None
        if after is None or before is None:
            return before if after is None else after  # type: ignore[return-value]
        return before & after

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans:
        first, last = (tiling.query_rows() + tiling.shift(self.alignment)).unbind(-1)
        low, high = torch.zeros_like(first), torch.full_like(first, tiling.seqlen_kv)
        return spans.spans(
            tiling,
            begin=first - self.left if self.left >= 0 else low,
            full_begin=last - self.left if self.left >= 0 else low,
            full_end=first + self.right + 1 if self.right >= 0 else high,
            end=last + self.right + 1 if self.right >= 0 else high,
        )


@dataclass(frozen=True)
class Band:
    """Key minus query lies in [low, high], None: no limit. A window of a part of a larger problem (see `cut`), whose
    diagonal may lie anywhere."""

    low: int | None
    high: int | None
    arity: ClassVar[int] = 0

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        distance = at.key - at.query
        allowed = torch.ones_like(distance, dtype=torch.bool) if self.low is None else distance >= self.low
        return allowed if self.high is None else allowed & (distance <= self.high)

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans:
        first, last = tiling.query_rows().unbind(-1)
        low, high = torch.zeros_like(first), torch.full_like(first, tiling.seqlen_kv)
        return spans.spans(
            tiling,
            begin=low if self.low is None else first + self.low,
            full_begin=low if self.low is None else last + self.low,
            full_end=high if self.high is None else first + self.high + 1,
            end=high if self.high is None else last + self.high + 1,
        )


@dataclass(frozen=True)
class Chunk:
    size: int
    alignment: str
    arity: ClassVar[int] = 0

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        return at.aligned(self.alignment) // self.size == at.key // self.size

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans:
        first, last = ((tiling.query_rows() + tiling.shift(self.alignment)) // self.size).unbind(-1)
        # Rows of one chunk: hull and full part are that chunk. Of several: the full part comes out empty.
        return spans.spans(
            tiling,
            begin=first * self.size,
            full_begin=last * self.size,
            full_end=(first + 1) * self.size,
            end=(last + 1) * self.size,
        )


@dataclass(frozen=True)
class Prefix:
    """`length` -1: one tensor holds the lengths."""

    length: int

    @property
    def arity(self) -> int:
        return 1 if self.length < 0 else 0

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        return at.key < (tensors[0].long()[at.batch] if self.length < 0 else self.length)

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans:
        low = torch.zeros(tiling.query_tiles, dtype=torch.int64, device=tiling.device)
        high = low + (tensors[0].long().reshape(-1, 1, 1) if self.length < 0 else self.length)
        return spans.spans(tiling, begin=low, full_begin=low, full_end=high, end=high)


@dataclass(frozen=True)
class Document:
    arity: ClassVar[int] = 2

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        query_ids, key_ids = (torch.atleast_2d(ids) for ids in tensors)
        return _row(query_ids, at.batch, at.query) == _row(key_ids, at.batch, at.key)

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans | Layout:
        # Packed calls share one table for sequences of several lengths: only the part in use counts.
        lengths = (tiling.seqlen_q, tiling.seqlen_kv)
        query_ids, key_ids = (torch.atleast_2d(ids)[:, :n] for ids, n in zip(tensors, lengths, strict=True))
        low, high = _extremes(query_ids, tiling.tile_q)
        if bool((key_ids[:, 1:] >= key_ids[:, :-1]).all()):
            rows = max(len(low), len(key_ids))
            sorted_ids = key_ids.expand(rows, -1).contiguous()
            begin = torch.searchsorted(sorted_ids, low.expand(rows, -1).contiguous())
            end = torch.searchsorted(sorted_ids, high.expand(rows, -1).contiguous(), right=True)
            one = low == high
            bounds = begin, end, torch.where(one, begin, end), end
            return spans.spans(tiling, *(bound[:, None] for bound in bounds))
        key_low, key_high = _extremes(key_ids, tiling.tile_kv)
        low, high, key_low, key_high = low[:, :, None], high[:, :, None], key_low[:, None], key_high[:, None]
        overlap = (key_high >= low) & (key_low <= high)
        equal = overlap & (low == high) & (key_low == key_high)
        return Layout((overlap.to(torch.int8) + equal.to(torch.int8))[:, None])


def _row(table: Tensor, batch: Tensor, index: Tensor) -> Tensor:
    """table[batch, index], a table of one row serving every batch entry."""
    return table[0][index] if len(table) == 1 else table[batch, index]


def _extremes(ids: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id of each tile: (batch or 1, tiles)."""
    pad = -ids.shape[-1] % tile
    padded = torch.cat((ids, ids[:, -1:].expand(-1, pad)), dim=-1) if pad else ids
    low, high = padded.unflatten(-1, (-1, tile)).aminmax(dim=-1)
    return low, high


@dataclass(frozen=True)
class Dense:
    arity: ClassVar[int] = 1

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        allowed = tensors[0].reshape((1,) * (4 - tensors[0].ndim) + tensors[0].shape)
        where = (at.batch, at.head, at.query, at.key)
        return allowed[tuple(i if size > 1 else i * 0 for i, size in zip(where, allowed.shape, strict=True))]

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Layout:
        state = tensors[0].reshape((1,) * (4 - tensors[0].ndim) + tensors[0].shape).to(torch.int8) * FULL
        for dim, length, edges in (
            (-2, tiling.seqlen_q, tiling.query_rows()),
            (-1, tiling.seqlen_kv, tiling.key_columns()),
        ):
            if state.shape[dim] == 1:
                state = state.expand(*_with(state.shape, dim, length))
            state = _over_tiles(state, edges, dim, 1)
        return Layout(state)


def _with(shape: Sequence[int], dim: int, length: int) -> list[int]:
    sizes = list(shape)
    sizes[dim] = length
    return sizes


@dataclass(frozen=True)
class Block:
    block_q: int
    block_kv: int
    inner: Node

    @property
    def arity(self) -> int:
        return 1 + self.inner.arity

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        state, *rest = tensors
        batch, head = (i if size > 1 else i * 0 for i, size in zip((at.batch, at.head), state.shape[:2], strict=True))
        state = state[batch, head, at.query // self.block_q, at.key // self.block_kv]
        return (state == FULL) | ((state == PARTIAL) & self.inner.allows(at, rest))

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Layout:
        state, *rest = tensors
        if isinstance(self.inner, Full):
            state = torch.where(state == PARTIAL, FULL, state).to(torch.int8)
        has_full = self._per_tile((state == FULL).to(torch.int8), tiling) != MASKED
        state = self._per_tile(state, tiling)
        inner = self.inner.lower(tiling, rest).to_layout(tiling).state
        # A partial block is at least as masked as the inner mask says; a full one, even in a mixed tile, ignores it.
        return Layout(torch.where((state == PARTIAL) & ~has_full, torch.minimum(state, inner), state))

    def _per_tile(self, state: Tensor, tiling: Tiling) -> Tensor:
        """One state per block -> one per tile."""
        state = _over_tiles(state, tiling.query_rows(), -2, self.block_q)
        return _over_tiles(state, tiling.key_columns(), -1, self.block_kv)


def _over_tiles(state: Tensor, edges: Tensor, dim: int, size: int) -> Tensor:
    """Coarsens (or refines) one dimension of tile states: a tile that meets several states is PARTIAL.

    `edges` (tiles, 2) are the first and last index of each tile, `size` the indices that one state covers.
    """
    first, last = (edges // size).unbind(-1)
    reach = int((last - first).max()) + 1 if len(first) else 1
    picks = torch.minimum(first[:, None] + torch.arange(reach, device=first.device), last[:, None])
    gathered = state.index_select(dim, picks.flatten()).unflatten(dim, picks.shape)
    low, high = gathered.aminmax(dim=dim if dim >= 0 else gathered.ndim + dim)
    return torch.where(low == high, low, PARTIAL).to(torch.int8)


@dataclass(frozen=True)
class Custom:
    key: str
    arity: int

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        from flashtile import trace

        return trace.graph(self.key).evaluate(None, at.batch, at.head, at.query, at.key, tensors)

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Layout:
        from flashtile import intervals, trace

        traced = trace.graph(self.key)
        tiles = tiling.query_rows(), tiling.key_columns()
        return Layout(intervals.layout(traced, tensors, *tiles, tiling.batch, tiling.heads))


@dataclass(frozen=True)
class Both:
    left: Node
    right: Node

    @property
    def arity(self) -> int:
        return self.left.arity + self.right.arity

    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        split = self.left.arity
        return self.left.allows(at, tensors[:split]) & self.right.allows(at, tensors[split:])

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans | Layout:
        split = self.left.arity
        left, right = self.left.lower(tiling, tensors[:split]), self.right.lower(tiling, tensors[split:])
        return spans.both(left, right, tiling)


@dataclass(frozen=True)
class Either(Both):
    def allows(self, at: At, tensors: Sequence[Tensor]) -> Tensor:
        split = self.left.arity
        return self.left.allows(at, tensors[:split]) | self.right.allows(at, tensors[split:])

    def lower(self, tiling: Tiling, tensors: Sequence[Tensor]) -> Spans | Layout:
        split = self.left.arity
        left, right = self.left.lower(tiling, tensors[:split]), self.right.lower(tiling, tensors[split:])
        return spans.either(left, right, tiling)


_KINDS: dict[str, Callable[..., Any]] = {
    "full": Full,
    "causal": lambda alignment: Window(-1, 0, alignment),
    "window": Window,
    "band": Band,
    "chunk": Chunk,
    "prefix": Prefix,
    "document": Document,
    "dense": Dense,
    "block": Block,
    "custom": Custom,
    "and": Both,
    "or": Either,
}


@lru_cache(maxsize=1024)
def parse(token: str) -> Node:
    """The tree of nodes that a Mask's token describes."""
    return _build(json.loads(token))


def _build(expression: list[Any]) -> Node:
    kind, *arguments = expression
    return _KINDS[kind](*(_build(argument) if isinstance(argument, list) else argument for argument in arguments))
