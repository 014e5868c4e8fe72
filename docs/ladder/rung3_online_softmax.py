"""Rung 3: the online softmax.

The softmax of a row seems to need the whole row: its maximum (so that exp cannot overflow) and its sum. Both can be
kept up to date while the keys come in tiles (Milakov and Gimelshein 2018). Keep three things for each query:

    m, the highest score so far;  l, the sum of exp(score - m) so far;  O, the sum of exp(score - m) * value so far.

A new tile of scores S with values V may raise the maximum to m'. What was summed under the old maximum is worth
exp(m - m') of what it was, so

    m' = max(m, rowmax S),   l' = exp(m - m') l + rowsum exp(S - m'),   O' = exp(m - m') O + exp(S - m') V,

and at the end out = O / l and lse = m + log l. Nothing is approximated: the same sums, in another order. This is
the forward pass of FlashAttention-2 (Dao 2023). Only one tile_q x tile_kv tile of scores exists at a time, whatever the
length of the sequence.

Run me: python docs/ladder/rung3_online_softmax.py [--quick]
"""

from collections.abc import Iterator, Sequence

import torch
from measure import Row, agree, inputs, main, row
from torch import Tensor

import flashtile


def attention(q: Tensor, k: Tensor, v: Tensor, tile_q: int = 128, tile_kv: int = 128) -> tuple[Tensor, Tensor]:
    """(out, lse) with memory that does not depend on the number of keys."""
    outs, lses = [], []
    for queries in q.split(tile_q, dim=1):
        out, lse = _walk(queries, k, v, tile_kv)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=-1)


def _walk(q: Tensor, k: Tensor, v: Tensor, tile_kv: int) -> tuple[Tensor, Tensor]:
    """One query tile against all keys."""
    q = q.transpose(1, 2) * q.shape[-1] ** -0.5  # scaling tile_q x headdim numbers, not tile_q x seqlen_kv
    highest = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(highest)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for keys, values in zip(k.split(tile_kv, dim=1), v.split(tile_kv, dim=1), strict=True):
        scores = q @ keys.permute(0, 2, 3, 1)  # (batch, heads, tile_q, tile_kv): all that exists of the matrix
        raised = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        rescale, weights = torch.exp(highest - raised), torch.exp(scores - raised)
        total = total * rescale + weights.sum(dim=-1, keepdim=True)
        out = out * rescale + weights @ values.transpose(1, 2)
        highest = raised
    return (out / total).transpose(1, 2), (highest + total.log()).squeeze(-1)


def check() -> None:
    q, k, v = inputs(200)
    wanted = flashtile.reference.attention(q, k, v)
    for tile_q, tile_kv in ((48, 32), (200, 7), (1, 200)):
        out, lse = attention(q, k, v, tile_q, tile_kv)
        agree(f"out, tiles of {tile_q} x {tile_kv}", out, wanted.out)
        agree(f"lse, tiles of {tile_q} x {tile_kv}", lse, wanted.lse)
    # Scores far outside the range of exp in float32, which ends at about 88.
    huge = flashtile.reference.attention(q * 100, k, v)
    agree("out, scores in the hundreds", attention(q * 100, k, v)[0], huge.out, allowed=5e-4)


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    for seqlen in seqlens:
        q, k, v = inputs(seqlen)
        yield row("online softmax", seqlen, lambda q=q, k=k, v=v: attention(q, k, v))


if __name__ == "__main__":
    main("Rung 3: the online softmax", check, measure)
