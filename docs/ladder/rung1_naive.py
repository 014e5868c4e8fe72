"""Rung 1: the formula.

    out = softmax(scale * Q K^T) V,    lse = log sum exp(scale * Q K^T)

Three lines of PyTorch. They are right, and every later rung is compared with them. They also make matrices of
seqlen_q x seqlen_kv numbers for each head: the scores, the softmax of the scores, and a passing one for the lse. Twice
the length, four times the memory; nothing that is kept needs it, since the output is only seqlen_q x headdim.

Run me: python docs/ladder/rung1_naive.py [--quick]
"""

from collections.abc import Iterator, Sequence

import torch
from measure import Row, agree, inputs, main, row
from torch import Tensor

import flashtile


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of q, k, v (batch, seqlen, heads, headdim)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (batch, heads, seqlen, headdim)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (batch, heads, seqlen_q, seqlen_kv): here is the memory
    weights = torch.softmax(scores, dim=-1)  # and here once more
    return (weights @ v).transpose(1, 2), torch.logsumexp(scores, dim=-1)


def check() -> None:
    q, k, v = inputs(200)
    out, lse = attention(q, k, v)
    wanted = flashtile.reference.attention(q, k, v)
    agree("out", out, wanted.out)
    agree("lse", lse, wanted.lse)


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    for seqlen in seqlens:
        q, k, v = inputs(seqlen)
        yield row("formula", seqlen, lambda q=q, k=k, v=v: attention(q, k, v))


if __name__ == "__main__":
    main("Rung 1: the formula", check, measure)
