"""Sequence by sequence through `flash_attn_func`: what FlashAttention-3 takes and our calls over caches and packed
sequences do not. Over a KV cache those are packed new keys, packed queries beside something new, `rotary_seqlens`,
`attention_chunk`, `qv`, 8-bit queries and small pages; of packed sequences, scales of 8 bits.

New rows are written to the cache, then all keys of the sequence are put side by side. It is slow, and the host reads
offsets and lengths.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.check import guests as check
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


class Ragged(NamedTuple):
    """How many queries and new keys each sequence has, as offsets; None: as many as any other. rotary: from which
    position on its new rows are turned, None: from that at which they are written."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k_new: Tensor | None
    rotary: Tensor | None

    @property
    def any(self) -> bool:
        return any(each is not None for each in self)


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
    """State(out, lse) over a cache, to which new keys and values are added. As in flash-attn, there is no gradient."""
    check.rows_for_offsets(new[0], given.cu_seqlens_k_new)
    rows, fresh = (None if each is None else each.tolist() for each in given[:2])
    entries = len(q) if rows is None else len(rows) - 1
    lengths = cache.room if lengths is None else lengths
    ends = lengths.tolist() if isinstance(lengths, Tensor) else [lengths] * entries
    counts = [0 if new[0] is None else _of_sequence(new[0], fresh, i).shape[1] for i in range(entries)]
    # Before anything is written.
    check.rows_that_fit(ends, counts, cache.room)
    out, lse = _room(q, cache.v)
    with torch.no_grad():
        for i, end in enumerate(ends):
            position = end if given.rotary is None else int(given.rotary[i])
            _append(cache, i, end, position, new, fresh, rotary)
            begin = 0 if cache.leftpad is None else int(cache.leftpad[i])
            where = cache.places(i, torch.arange(begin, end + counts[i], device=q.device))
            keys, values = (_bits(each)[where][None].view(each.dtype) for each in (cache.k, cache.v))
            asked = rotary.turn(_of_sequence(q, rows, i), position, rotary.moving)
            beside = {} if qv is None else {"qv": _of_sequence(qv, rows, i)}
            if asked.shape[1]:
                _put(State(*attend(asked, keys, values, **beside, **_of_entry(descales, i))), out, lse, rows, i)
    return State(out, lse)


def _append(
    cache: Cache,
    i: int,
    end: int,
    position: int,
    new: tuple[Tensor | None, Tensor | None],
    offsets: list[int] | None,
    rotary: Rotary,
) -> None:
    """Writes a sequence's new rows behind its `end`."""
    k, v = new
    if k is None or v is None:
        return
    k, v = _of_sequence(k, offsets, i), _of_sequence(v, offsets, i)
    where = cache.places(i, torch.arange(end, end + k.shape[1], device=k.device))
    for each, rows in ((cache.k, rotary.turn(k, position)), (cache.v, v)):
        _bits(each)[where] = _bits(rows.to(each.dtype).contiguous())[0]


def _of_sequence(tensor: Tensor, offsets: list[int] | None, i: int) -> Tensor:
    """(1, rows, ..): those of a sequence."""
    return tensor[i : i + 1] if offsets is None else tensor[None, offsets[i] : offsets[i + 1]]


def _put(state: State, out: Tensor, lse: Tensor, offsets: list[int] | None, i: int) -> None:
    """A sequence's results where they belong."""
    if offsets is None:
        out[i], lse[i] = state.out[0], state.lse[0]
    else:
        rows = slice(offsets[i], offsets[i + 1])
        out[rows], lse[:, rows] = state.out[0], state.lse[0]


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
