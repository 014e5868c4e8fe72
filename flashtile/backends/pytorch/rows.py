"""How the tiled sweep cuts a problem: slabs of (batch, head) pairs, and the query tiles of each.

Inside a slab everything is three-dimensional: (pairs, rows, headdim), where a pair is a (batch entry, key/value head)
and the rows are the queries of all the query heads that share it (GQA is packed, keys and values are never expanded).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile import mask_nodes
from flashtile.mask_nodes import At
from flashtile.problem import Inputs, Problem
from flashtile.scores import Tile
from flashtile.spans import Run, Tiling
from flashtile.tuning.cpu import SweepConfig


@dataclass(frozen=True)
class Slab:
    """A stretch of batch entries and query heads handled together, and the runs of keys each query tile visits."""

    batch: slice
    heads: slice
    heads_kv: slice
    runs: list[list[Run]]

    @property
    def size(self) -> tuple[int, int, int]:
        """(batch entries, key/value heads, query heads per key/value head)."""
        heads_kv = self.heads_kv.stop - self.heads_kv.start
        return self.batch.stop - self.batch.start, heads_kv, (self.heads.stop - self.heads.start) // heads_kv

    def load_rows(self, tensor: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """(batch, seqlen, heads, d) -> (pairs, group * rows, d)."""
        batch, heads_kv, group = self.size
        tile = tensor[self.batch, rows, self.heads].unflatten(2, (heads_kv, group))
        return tile.permute(0, 2, 3, 1, 4).reshape(batch * heads_kv, -1, tensor.shape[-1]).to(dtype)

    def store_rows(self, target: Tensor, rows: slice, tile: Tensor) -> None:
        """The inverse of `load_rows`: writes (pairs, group * rows, d) into (batch, seqlen, heads, d)."""
        batch, heads_kv, group = self.size
        tile = tile.view(batch, heads_kv, group, -1, tile.shape[-1]).permute(0, 3, 1, 2, 4)
        target[self.batch, rows, self.heads] = tile.flatten(2, 3).to(target.dtype)

    def load_keys(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch, seqlen, heads_kv, d) -> (pairs, seqlen, d); a copy only where the layout or dtype asks for one."""
        return tensor[self.batch, :, self.heads_kv].transpose(1, 2).flatten(0, 1).to(dtype)

    def hidden_keys(self, allowed: Tensor, keys: int) -> Tensor:
        """(pairs, keys, 1): where no query of a tile may look, from what its mask allows."""
        batch, heads_kv, group = self.size
        hidden = (~allowed).all(dim=2).expand(batch, heads_kv * group, keys)
        return hidden.unflatten(1, (heads_kv, group)).all(dim=2).flatten(0, 1)[..., None]

    def load_stats(self, stats: Tensor, rows: slice) -> Tensor:
        """(batch, heads, seqlen) -> (pairs, group * rows, 1)."""
        batch, heads_kv, _ = self.size
        return stats[self.batch, self.heads, rows].reshape(batch * heads_kv, -1, 1)

    def keys_view(self, tensor: Tensor) -> Tensor:
        """(batch, seqlen, heads_kv, d) seen as (batch, heads_kv, seqlen, d), this slab's part; writes go through."""
        return tensor[self.batch, :, self.heads_kv].transpose(1, 2)

    def load_per_head(self, values: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """(heads,) -> (pairs, group * rows, 1)."""
        batch, heads_kv, group = self.size
        spread = values[self.heads].to(dtype).view(1, heads_kv, group, 1).expand(batch, -1, -1, rows.stop - rows.start)
        return spread.reshape(batch * heads_kv, -1, 1)

    def add_per_head(self, total: Tensor, values: Tensor) -> None:
        """Adds (pairs, group * rows, 1), summed over batch entries and rows, to (heads,)."""
        batch, heads_kv, group = self.size
        total[self.heads] += values.view(batch, heads_kv * group, -1).sum(dim=(0, 2))


def slabs(inputs: Inputs, problem: Problem, config: SweepConfig, first_batch: int) -> Iterator[Slab]:
    """Cuts a dense problem so that at most `config.pairs` query heads of one batch entry or more share a pass.

    Masks that differ by batch entry or by head get slabs of one entry or one head, as their tiles differ.
    """
    tiling = Tiling(
        problem.seqlen_q,
        problem.seqlen_kv,
        config.tile_q,
        config.tile_kv,
        first_batch + problem.batch,
        problem.heads,
        inputs.q.device,
    )
    schedule = mask_nodes.parse(problem.mask).lower(tiling, inputs.mask).runs(tiling)
    by_batch, by_head = len(schedule) > 1, len(schedule[0]) > 1
    entries = 1 if by_batch or by_head else max(1, config.pairs // problem.heads)
    for begin in range(0, problem.batch, entries):
        per_head = schedule[first_batch + begin if by_batch else 0]
        for heads in _head_slices(problem, 1 if by_head else config.pairs):
            heads_kv = slice(heads.start // problem.group, (heads.stop - 1) // problem.group + 1)
            batch = slice(begin, min(begin + entries, problem.batch))
            yield Slab(batch, heads, heads_kv, per_head[heads.start if by_head else 0])


def _head_slices(problem: Problem, pairs: int) -> Iterator[slice]:
    """Stretches of at most `pairs` query heads: whole groups, or parts of one group."""
    group, heads = problem.group, problem.heads
    if pairs >= group:
        step = pairs // group * group
        yield from (slice(begin, min(begin + step, heads)) for begin in range(0, heads, step))
        return
    for first in range(0, heads, group):
        yield from (slice(h, min(h + pairs, first + group)) for h in range(first, first + group, pairs))


def tile_of(slab: Slab, rows: slice, keys: slice, problem: Problem, first_batch: int, device: torch.device) -> Tile:
    """Global indices and slices of one tile of scores."""
    batch = slice(slab.batch.start + first_batch, slab.batch.stop + first_batch)
    ranges = (batch, slab.heads, rows, keys)
    shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    index = [
        torch.arange(part.start, part.stop, device=device).view(shape)
        for part, shape in zip(ranges, shapes, strict=True)
    ]
    return Tile(At(index[0], index[1], index[2], index[3], problem.seqlen_kv - problem.seqlen_q), ranges)


def split(run: Run, step: int) -> Iterator[slice]:
    """A run, `step` keys at a time."""
    return (slice(begin, min(begin + step, run.end)) for begin in range(run.begin, run.end, step))
