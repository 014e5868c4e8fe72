"""Rung 2: tiles of queries.

A row of the softmax needs all the keys, but no other row. So take `tile_q` queries at a time: the scores that exist at
once shrink from seqlen_q x seqlen_kv to tile_q x seqlen_kv. Memory grows with the length now, not with its square; the
arithmetic is the same.

What is left: a row of scores is still as long as the sequence. On a GPU it would have to fit into shared memory.

Run me: python docs/ladder/rung2_query_tiles.py [--quick]
"""

from collections.abc import Iterator, Sequence

import rung1_naive
import torch
from measure import Row, agree, inputs, main, row
from torch import Tensor

import flashtile


def attention(q: Tensor, k: Tensor, v: Tensor, tile_q: int = 128) -> tuple[Tensor, Tensor]:
    """(out, lse), one query tile after the other; each is the formula of rung 1 on fewer rows."""
    tiles = [rung1_naive.attention(part, k, v) for part in q.split(tile_q, dim=1)]
    return torch.cat([out for out, _ in tiles], dim=1), torch.cat([lse for _, lse in tiles], dim=-1)


def check() -> None:
    q, k, v = inputs(200)
    out, lse = attention(q, k, v, tile_q=48)
    wanted = flashtile.reference.attention(q, k, v)
    agree("out", out, wanted.out)
    agree("lse", lse, wanted.lse)


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    for seqlen in seqlens:
        q, k, v = inputs(seqlen)
        yield row("tiles of 128 queries", seqlen, lambda q=q, k=k, v=v: attention(q, k, v))


if __name__ == "__main__":
    main("Rung 2: tiles of queries", check, measure)
