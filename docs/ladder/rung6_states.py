"""Rung 6: states, and how they merge.

The pair (out, lse) over some of the keys is all that is needed to join it with the pair over other keys:

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.

The pair is called a State. Merging is associative and commutative, and a State that saw nothing (out 0, lse -inf) is
its neutral element. The online softmax of rung 3 is this merge, tile by tile, with the division put off to the end.

Two uses, both exact. *Split-KV*: one query against a long cache is a single row of tiles, too little to keep a machine
busy; cut the keys into splits, attend to all of them side by side, merge. *Shared prefix*: many continuations of one
prompt attend to the same keys; let all their queries read the prefix together, once, and merge each with its own part.

Run me: python docs/ladder/rung6_states.py [--quick] [--device cuda]
"""

from collections.abc import Iterator, Sequence

import torch
from measure import Row, agree, here, inputs, main, row
from torch import Tensor

import flashtile
from flashtile import State


def split_kv(q: Tensor, k: Tensor, v: Tensor, splits: int) -> State:
    """Attention over the keys in `splits` parts, which run side by side as if they were a batch."""
    parts = [tensor.unflatten(1, (splits, -1)).flatten(0, 1) for tensor in (k, v)]
    state = flashtile.attention(q.repeat_interleave(splits, dim=0), *parts, return_lse=True)
    outs, lses = (tensor.unflatten(0, (-1, splits)).unbind(1) for tensor in state)
    return flashtile.merge(list(zip(outs, lses, strict=True)))


def shared_prefix(q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> State:
    """Each batch entry of q sees one `prefix` (1, length, heads, headdim), then its `own` keys and values."""
    batch, queries = q.shape[:2]
    together = flashtile.attention(q.flatten(0, 1)[None], *prefix, return_lse=True)
    out = together.out[0].unflatten(0, (batch, queries))
    lse = together.lse[0].unflatten(-1, (batch, queries)).movedim(1, 0)
    return flashtile.merge([(out, lse), flashtile.attention(q, *own, return_lse=True)])


def copied_prefix(q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> State:
    """The same without merging: every batch entry gets a copy of the prefix."""
    k, v = (torch.cat((a.expand(len(q), -1, -1, -1), b), dim=1) for a, b in zip(prefix, own, strict=True))
    return flashtile.attention(q, k, v, return_lse=True)


def check() -> None:
    q, k, v = inputs(240, batch=3)
    wanted = flashtile.reference.attention(q[:, :1], k, v)
    for splits in (1, 3, 8):
        found = split_kv(q[:, :1], k, v, splits)
        agree(f"out, {splits} splits", found.out, wanted.out)
        agree(f"lse, {splits} splits", found.lse, wanted.lse)
    prefix, own = (k[:1, :200], v[:1, :200]), (k[:, 200:], v[:, 200:])
    copied = [torch.cat((a.expand(3, -1, -1, -1), b), 1) for a, b in zip(prefix, own, strict=True)]
    wanted = flashtile.reference.attention(q[:, :5], *copied)
    found = shared_prefix(q[:, :5], prefix, own)
    agree("out, shared prefix", found.out, wanted.out)
    agree("lse, shared prefix", found.lse, wanted.lse)


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    seqlen = here().cache * seqlens[-1]
    _, k, v = inputs(seqlen, heads=1)
    q = inputs(1, heads=1)[0]
    for splits in here().splits:
        yield row(f"one query, one head, {splits} splits", seqlen, lambda splits=splits: split_kv(q, k, v, splits))
    seqlen = seqlens[-1]
    _, k, v = inputs(seqlen)
    q, own_k, own_v = inputs(64, batch=here().continuations)
    for name, function in (("copied", copied_prefix), ("shared", shared_prefix)):
        call = lambda function=function: function(q[:, -1:], (k, v), (own_k, own_v))  # noqa: E731
        yield row(f"{len(q)} continuations, prefix {name}", seqlen, call)


if __name__ == "__main__":
    main("Rung 6: states", check, measure, devices=("cpu", "cuda"))
