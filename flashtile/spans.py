"""Spans: which key tiles each query tile visits, and which of those need no mask.

A mask is lowered once, on the host side of a launch, to one of two forms. A `Spans` holds, for each query tile, the
hull [begin, end) of the keys that any of its rows may see and the part [full_begin, full_end) that all of its rows
see; a sweep then walks partial, full, partial. A `Layout` holds one state per (query tile, key tile) and serves masks
whose visible keys are not one interval (far-apart unions, block-sparse masks, arbitrary functions).

Two laws, proven by the tests on random masks: outside the hull everything is masked; in the full part nothing is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MASKED, PARTIAL, FULL = 0, 1, 2
"""States of a tile in a `Layout`: ordered, so that `&` of masks is a minimum and `|` a maximum."""


@dataclass(frozen=True)
class Tiling:
    """How a (seqlen_q, seqlen_kv) score matrix is cut into tiles, and for how many batch entries and heads."""

    seqlen_q: int
    seqlen_kv: int
    tile_q: int
    tile_kv: int
    batch: int = 1
    heads: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def query_tiles(self) -> int:
        return -(-self.seqlen_q // self.tile_q)

    @property
    def key_tiles(self) -> int:
        return -(-self.seqlen_kv // self.tile_kv)

    def query_rows(self) -> Tensor:
        """First and last query of each query tile: int64 (query_tiles, 2), both inclusive."""
        return _edges(self.seqlen_q, self.tile_q, self.device)

    def key_columns(self) -> Tensor:
        """First and last key of each key tile: int64 (key_tiles, 2), both inclusive."""
        return _edges(self.seqlen_kv, self.tile_kv, self.device)

    def shift(self, alignment: str) -> int:
        """What to add to a query index so that the diagonal is where `alignment` says."""
        return self.seqlen_kv - self.seqlen_q if alignment == "bottom_right" else 0


def _edges(length: int, tile: int, device: torch.device) -> Tensor:
    first = torch.arange(0, length, tile, device=device)
    return torch.stack((first, (first + tile).clamp(max=length) - 1), dim=-1)


class Run(NamedTuple):
    """A stretch of keys [begin, end) that one query tile visits; `masked` says whether the mask must be evaluated."""

    begin: int
    end: int
    masked: bool


@dataclass(frozen=True, eq=False)
class Spans:
    """Per query tile, in keys: hull [begin, end) and unmasked part [full_begin, full_end).

    All four are int64 of shape (batch or 1, heads or 1, query_tiles); a size of 1 means: the same for all.
    """

    begin: Tensor
    full_begin: Tensor
    full_end: Tensor
    end: Tensor

    def to_layout(self, tiling: Tiling) -> "Layout":
        """The same statement, one state per tile."""
        first, last = tiling.key_columns().unbind(-1)
        begin, end = self.begin[..., None], self.end[..., None]
        visited = (last >= begin) & (first < end) & (begin < end)
        full = (first >= self.full_begin[..., None]) & (last < self.full_end[..., None])
        return Layout(visited.to(torch.int8) + (visited & full).to(torch.int8))

    def runs(self, tiling: Tiling) -> list[list[list[list[Run]]]]:
        """Runs [batch or 1][heads or 1][query tile], borders rounded outwards (hull) and inwards (full) to tiles."""
        tile, seqlen = tiling.tile_kv, tiling.seqlen_kv
        begin = self.begin // tile * tile
        end = torch.clamp(-(-self.end // tile) * tile, max=seqlen)
        end = torch.where(self.end <= self.begin, begin, end)
        full_begin = -(-self.full_begin // tile) * tile
        # The last tile may be short: it is full when every key that exists is visible.
        full_end = torch.where(self.full_end >= seqlen, seqlen, self.full_end // tile * tile)
        empty = full_end <= full_begin
        full_begin = torch.where(empty, end, full_begin.clamp(min=begin, max=end))
        full_end = torch.where(empty, end, full_end.clamp(min=begin, max=end))
        bounds = torch.stack((begin, full_begin, full_end, end), dim=-1).tolist()
        return [[[_three_runs(*row) for row in head] for head in batch] for batch in bounds]


def _three_runs(begin: int, full_begin: int, full_end: int, end: int) -> list[Run]:
    runs = (Run(begin, full_begin, True), Run(full_begin, full_end, False), Run(full_end, end, True))
    return [run for run in runs if run.end > run.begin]


@dataclass(frozen=True, eq=False)
class Layout:
    """One state (MASKED, PARTIAL or FULL) per tile: int8 (batch or 1, heads or 1, query_tiles, key_tiles)."""

    state: Tensor

    def to_layout(self, tiling: Tiling) -> "Layout":
        return self

    def runs(self, tiling: Tiling) -> list[list[list[list[Run]]]]:
        """Runs [batch or 1][heads or 1][query tile]: neighbouring tiles of one state are joined."""
        return [[[_join(row, tiling) for row in head] for head in batch] for batch in self.state.tolist()]


def _join(states: list[int], tiling: Tiling) -> list[Run]:
    runs: list[Run] = []
    for index, state in enumerate(states):
        if state == MASKED:
            continue
        begin, end = index * tiling.tile_kv, min((index + 1) * tiling.tile_kv, tiling.seqlen_kv)
        masked = state == PARTIAL
        if runs and runs[-1].end == begin and runs[-1].masked == masked:
            runs[-1] = runs[-1]._replace(end=end)
        else:
            runs.append(Run(begin, end, masked))
    return runs


def spans(tiling: Tiling, begin: Tensor, end: Tensor, full_begin: Tensor, full_end: Tensor) -> Spans:
    """Spans from raw bounds: clipped to the keys that exist, empties made harmless, dimensions made three."""
    begin, end, full_begin, full_end = (
        bound.reshape((1,) * (3 - bound.ndim) + bound.shape).clamp(min=0, max=tiling.seqlen_kv)
        for bound in torch.broadcast_tensors(begin, end, full_begin, full_end)
    )
    end = torch.maximum(begin, end)
    full_begin = torch.minimum(torch.maximum(full_begin, begin), end)
    full_end = torch.maximum(torch.minimum(full_end, end), full_begin)
    return Spans(begin, full_begin, full_end, end)


def everything(tiling: Tiling) -> Spans:
    """No mask: every key of every row, all of it full."""
    low = torch.zeros(tiling.query_tiles, dtype=torch.int64, device=tiling.device)
    return spans(tiling, low, low + tiling.seqlen_kv, low, low + tiling.seqlen_kv)


def both(left: Spans | Layout, right: Spans | Layout, tiling: Tiling) -> Spans | Layout:
    """`&` of two masks: hulls and full parts intersect; exact for the full part, a sound hull for the rest."""
    if isinstance(left, Spans) and isinstance(right, Spans):
        return spans(
            tiling,
            begin=torch.maximum(left.begin, right.begin),
            end=torch.minimum(left.end, right.end),
            full_begin=torch.maximum(left.full_begin, right.full_begin),
            full_end=torch.minimum(left.full_end, right.full_end),
        )
    return _combine(torch.minimum, left, right, tiling)


def either(left: Spans | Layout, right: Spans | Layout, tiling: Tiling) -> Spans | Layout:
    """`|` of two masks: the hull of both where their intervals touch everywhere, a Layout where they lie apart."""
    if not (isinstance(left, Spans) and isinstance(right, Spans)):
        return _combine(torch.maximum, left, right, tiling)
    apart = (torch.maximum(left.begin, right.begin) > torch.minimum(left.end, right.end)) & ~(
        (left.begin == left.end) | (right.begin == right.end)
    )
    if bool(apart.any()):
        return _combine(torch.maximum, left, right, tiling)
    begin, end = _union(left.begin, left.end, right.begin, right.end)
    full_begin, full_end = _union(left.full_begin, left.full_end, right.full_begin, right.full_end)
    return spans(tiling, begin, end, full_begin, full_end)


def _union(begin_a: Tensor, end_a: Tensor, begin_b: Tensor, end_b: Tensor) -> tuple[Tensor, Tensor]:
    """Union of two intervals where they touch (or one is empty), else the longer of the two."""
    touch = torch.maximum(begin_a, begin_b) <= torch.minimum(end_a, end_b)
    longer = end_a - begin_a >= end_b - begin_b
    nonempty = (end_a > begin_a) & (end_b > begin_b)
    begin = torch.where(touch & nonempty, torch.minimum(begin_a, begin_b), torch.where(longer, begin_a, begin_b))
    end = torch.where(touch & nonempty, torch.maximum(end_a, end_b), torch.where(longer, end_a, end_b))
    return begin, end


def _combine(
    rule: Callable[[Tensor, Tensor], Tensor], left: Spans | Layout, right: Spans | Layout, tiling: Tiling
) -> Layout:
    # Packed sequences are lowered one by one on some backends, each the last entry of a batch; tables hold all of them.
    left, right = (Layout(part.to_layout(tiling).state[: max(1, tiling.batch)]) for part in (left, right))
    return Layout(rule(left.state, right.state))
