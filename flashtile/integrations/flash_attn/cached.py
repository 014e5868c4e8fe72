"""What reads a KV cache or pages, in both versions, over `flashtile.attention_kvcache`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.api import attention_kvcache
from flashtile.check import guests as check
from flashtile.integrations.flash_attn.common import Window, options
from flashtile.integrations.serving import ragged
from flashtile.kvcache import turned
from flashtile.state import State


def with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: dict[str, Any],
    cache_seqlens: int | Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
    return_lse: bool,
    **where: Any,
) -> Any:
    """out, or State(out, lse). `new`: k, v and the rotary tables; `where`: what goes on unchanged.

    Tensors that want a gradient are taken, as in flash-attn, and get none.
    """
    if cache_seqlens is None:
        check.needs_cache_seqlens(new["k"])
        # The whole cache is filled.
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    chosen = options(softmax_scale, causal, window_size, softcap, alibi_slopes=alibi_slopes)
    del chosen["deterministic"]
    if causal or chosen["window"] is not None:
        new = _reaching(new, q)
    with torch.no_grad():
        return attention_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            num_splits=num_splits or None,
            return_lse=return_lse,
            **new,
            **where,
            **chosen,
        )


def _reaching(new: dict[str, Any], q: Tensor) -> dict[str, Any]:
    """The same with rotary tables for the places of all queries. Where there are more of them than of new keys,
    flash-attn asks for no more positions than the cache has, and trusts that the lengths leave room for the queries."""
    k, cos, sin = new["k"], new["rotary_cos"], new["rotary_sin"]
    if k is None or cos is None or sin is None or k.shape[1] >= q.shape[1]:
        return new
    more = q.shape[1] - k.shape[1]
    cos, sin = (torch.nn.functional.pad(table, (0, 0, 0, more)) for table in (cos, sin))
    return {**new, "rotary_cos": cos, "rotary_sin": sin}


def packed_over_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    table: Tensor,
    dropout_p: float,
    options: dict[str, Any],
) -> State:
    """State(out, lse) of packed queries (total_q, heads, headdim) over pages that hold all keys.

    `lengths`: (sequences,), keys of each. The offsets are read by the host, and sequences with as many queries are one
    call. Tensors that want a gradient are taken, as in flash-attn, and get none.
    """
    check.no_paged_dropout(dropout_p)
    chosen = {name: value for name, value in options.items() if name != "deterministic"}
    groups = ragged.grouped(cu_seqlens_q.tolist(), lengths, table)
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, device=q.device)
    with torch.no_grad():
        ragged.attention(q, k_cache, v_cache, groups, out, lse, **chosen)
    return State(out, lse)


class Ragged(NamedTuple):
    """How many queries and new keys each sequence has, as offsets; None: as many as any other. rotary: from which
    position on its new rows are turned, None: from that at which they are written."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k_new: Tensor | None
    rotary: Tensor | None

    @property
    def any(self) -> bool:
        return any(each is not None for each in self)


def one_by_one(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: dict[str, Any],
    lengths: int | Tensor | None,
    table: Tensor | None,
    given: Ragged,
    batch_idx: Tensor | None,
    leftpad: Tensor | None,
    **options: Any,
) -> State:
    """State(out, lse) of calls that `with_kvcache` cannot take at once: one a sequence. The host reads offsets and, for
    a position of its own, lengths. `options`: softmax_scale and what follows it in `with_kvcache`."""
    check.rows_for_offsets(new["k"], given.cu_seqlens_k_new)
    rows = None if given.cu_seqlens_q is None else given.cu_seqlens_q.tolist()
    fresh = None if given.cu_seqlens_k_new is None else given.cu_seqlens_k_new.tolist()
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf, device=q.device)
    for i in range(len(q) if rows is None else len(rows) - 1):
        queries = of_sequence(q, rows, i)
        # A sequence without queries may have new keys all the same.
        asked = queries if queries.shape[1] else q.new_zeros(1, 1, *q.shape[-2:])
        its = _new_of_sequence(new, fresh, i)
        length = lengths[i : i + 1] if isinstance(lengths, Tensor) else lengths
        if given.rotary is not None:
            its = _turned_from(int(given.rotary[i]), int(check.known_length(length)), its)
        if its["k"] is None and new["k"] is not None:
            asked, its = _turned_alone(asked, its, length, options)
        pages, where = _cache_of_sequence(i, table, batch_idx, leftpad, q.device)
        state = with_kvcache(asked, k_cache, v_cache, its, length, pages, **options, return_lse=True, **where)
        if queries.shape[1]:
            put(state, out, lse, rows, i)
    return State(out, lse)


def of_sequence(tensor: Tensor, offsets: list[int] | None, i: int) -> Tensor:
    """(1, rows, ..): those of a sequence."""
    return tensor[i : i + 1] if offsets is None else tensor[None, offsets[i] : offsets[i + 1]]


def _new_of_sequence(new: dict[str, Any], offsets: list[int] | None, i: int) -> dict[str, Any]:
    """Its new keys and values, None where it has none, and the rotary tables."""
    if new["k"] is None or new["v"] is None:
        return new
    k, v = (of_sequence(new[name], offsets, i) for name in "kv")
    return {**new, "k": k, "v": v} if k.shape[1] else {**new, "k": None, "v": None}


def _cache_of_sequence(
    i: int, table: Tensor | None, batch_idx: Tensor | None, leftpad: Tensor | None, device: torch.device
) -> tuple[Tensor | None, dict[str, Any]]:
    """(block table; batch index and left padding) of a call for this sequence alone."""
    padded = None if leftpad is None else leftpad[i : i + 1]
    if batch_idx is not None:
        return table, {"cache_batch_idx": batch_idx[i : i + 1], "cache_leftpad": padded}
    if table is not None:
        return table[i : i + 1], {"cache_batch_idx": None, "cache_leftpad": padded}
    row = torch.full((1,), i, dtype=torch.int32, device=device)
    return None, {"cache_batch_idx": row, "cache_leftpad": padded}


def _turned_from(position: int, length: int, new: dict[str, Any]) -> dict[str, Any]:
    """The same with rotary tables in which the place at `length` holds `position`."""
    tables = {name: new[name] for name in ("rotary_cos", "rotary_sin") if new[name] is not None}
    ahead = position - length
    moved = {
        name: table[ahead:] if ahead >= 0 else torch.nn.functional.pad(table, (0, 0, -ahead, 0))
        for name, table in tables.items()
    }
    return {**new, **moved}


def _turned_alone(
    q: Tensor, new: dict[str, Any], length: int | Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """(queries turned, nothing new): where others have new keys, those of a sequence without any are turned too."""
    if new["rotary_cos"] is None:
        return q, new
    begin = torch.as_tensor(check.known_length(length), device=q.device).reshape(1, 1)
    rows = torch.arange(q.shape[1], device=q.device)[None]
    cut = options["causal"] or tuple(options["window_size"]) != (-1, -1)
    positions = begin + (rows if cut else torch.zeros_like(rows))
    q = turned(q, new["rotary_cos"], new["rotary_sin"], positions, options["rotary_interleaved"])
    return q, {**new, "rotary_cos": None, "rotary_sin": None}


def put(state: State, out: Tensor, lse: Tensor, offsets: list[int] | None, i: int) -> None:
    """A sequence's results where they belong."""
    if offsets is None:
        out[i], lse[i] = state.out[0], state.lse[0]
    else:
        rows = slice(offsets[i], offsets[i + 1])
        out[rows], lse[:, rows] = state.out[0], state.lse[0]
