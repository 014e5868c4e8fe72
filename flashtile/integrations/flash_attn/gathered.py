"""Sequence by sequence through `flash_attn_func`: what FlashAttention-3 takes and our calls over caches and packed
sequences do not. Those are `attention_chunk`, `qv` and 8-bit queries over a KV cache, and scales of packed sequences.

New rows are written to the cache, then all keys of the sequence are put side by side. It is slow, and the host reads
offsets and lengths.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.check import guests as check
from flashtile.integrations.flash_attn.cached import Ragged, of_sequence, put
from flashtile.kvcache import turned
from flashtile.state import State

Attend = Callable[..., tuple[Tensor, Tensor]]
"""(out, lse) of dense q, k, v and, by name, of what goes with them."""


class Cache(NamedTuple):
    """k, v: (entries, rows, heads_kv, headdim), or pages of a `table` (sequences, pages)."""

    k: Tensor
    v: Tensor
    table: Tensor | None
    batch_idx: Tensor | None
    leftpad: Tensor | None

    @property
    def room(self) -> int:
        """Rows of an entry."""
        return self.k.shape[1] * (1 if self.table is None else self.table.shape[1])

    def places(self, i: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(entry or page, row of it) of some positions of a sequence."""
        entry = i if self.batch_idx is None else int(self.batch_idx[i])
        if self.table is None:
            return torch.full_like(positions, entry), positions
        page = self.k.shape[1]
        return self.table[entry].long()[positions // page], positions % page


class Rotary(NamedTuple):
    """Tables, whether pairs of columns stand side by side, and whether each query turns by its own place."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    moving: bool

    def turn(self, rows: Tensor, first: int, moving: bool = True) -> Tensor:
        """Rows (1, seqlen, heads, headdim) from a position on."""
        if self.cos is None or self.sin is None:
            return rows
        steps = torch.arange(rows.shape[1], device=rows.device)[None]
        positions = first + (steps if moving else torch.zeros_like(steps))
        wide = rows.float() if rows.dtype.itemsize == 1 else rows
        return turned(wide, self.cos, self.sin, positions, self.interleaved).to(rows.dtype)


def over_cache(
    q: Tensor,
    qv: Tensor | None,
    cache: Cache,
    new: tuple[Tensor | None, Tensor | None],
    rotary: Rotary,
    lengths: int | Tensor | None,
    given: Ragged,
    descales: dict[str, Tensor | None],
    attend: Attend,
) -> State:
    """State(out, lse) over a cache, to which new keys and values are added."""
    rows = None if given.cu_seqlens_q is None else given.cu_seqlens_q.tolist()
    fresh = None if given.cu_seqlens_k_new is None else given.cu_seqlens_k_new.tolist()
    entries = len(q) if rows is None else len(rows) - 1
    lengths = cache.room if lengths is None else lengths
    ends = lengths.tolist() if isinstance(lengths, Tensor) else [lengths] * entries
    # Before anything is written.
    check.rows_that_fit(
        ends, [0 if new[0] is None else of_sequence(new[0], fresh, i).shape[1] for i in range(entries)], cache.room
    )
    out, lse = _room(q, cache.v)
    for i, end in enumerate(ends):
        position = end if given.rotary is None else int(given.rotary[i])
        behind = _append(cache, i, end, position, new, fresh, rotary)
        begin = 0 if cache.leftpad is None else int(cache.leftpad[i])
        where = cache.places(i, torch.arange(begin, behind, device=q.device))
        keys, values = (_bits(each)[where][None].view(each.dtype) for each in (cache.k, cache.v))
        asked = rotary.turn(of_sequence(q, rows, i), position, rotary.moving)
        beside = {} if qv is None else {"qv": of_sequence(qv, rows, i)}
        if asked.shape[1]:
            put(State(*attend(asked, keys, values, **beside, **_of_entry(descales, i))), out, lse, rows, i)
    return State(out, lse)


def _append(
    cache: Cache,
    i: int,
    end: int,
    position: int,
    new: tuple[Tensor | None, Tensor | None],
    offsets: list[int] | None,
    rotary: Rotary,
) -> int:
    """Writes a sequence's new rows behind its `end`; returns where it ends then."""
    k, v = new
    if k is None or v is None:
        return end
    k, v = of_sequence(k, offsets, i), of_sequence(v, offsets, i)
    where = cache.places(i, torch.arange(end, end + k.shape[1], device=k.device))
    for each, rows in ((cache.k, rotary.turn(k, position)), (cache.v, v)):
        _bits(each)[where] = _bits(rows.to(each.dtype).contiguous())[0]
    return end + k.shape[1]


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[Tensor, Tensor],
    used: tuple[Tensor | None, Tensor | None],
    descales: dict[str, Tensor | None],
    attend: Attend,
) -> State:
    """State(out, lse) of packed 8-bit sequences whose scales differ; `offsets`, `used`: of queries and of keys."""
    starts, ends = zip(*(_extents(*each) for each in zip(offsets, used, strict=True)), strict=True)
    out, lse = _room(q, v)
    for i, (first, last) in enumerate(zip(starts[0], ends[0], strict=True)):
        if last == first:
            continue
        keys = slice(starts[1][i], ends[1][i])
        state = State(*attend(q[None, first:last], k[None, keys], v[None, keys], **_of_entry(descales, i)))
        out[first:last], lse[:, first:last] = state.out[0], state.lse[0]
    return State(out, lse)


def _extents(offsets: Tensor, used: Tensor | None) -> tuple[list[int], list[int]]:
    """(where each sequence begins, where its rows in use end)."""
    begins = offsets[:-1].tolist()
    if used is None:
        return begins, offsets[1:].tolist()
    return begins, [begin + rows for begin, rows in zip(begins, used.tolist(), strict=True)]


def _room(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for (out, lse): 0 and -inf where nobody writes."""
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=dtype, device=q.device)
    return out, torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf, device=q.device)


def _of_entry(descales: dict[str, Tensor | None], i: int) -> dict[str, Tensor]:
    return {name: scale[i : i + 1] for name, scale in descales.items() if scale is not None}


def _bits(tensor: Tensor) -> Tensor:
    """PyTorch indexes no 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
