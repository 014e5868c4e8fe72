"""What reads a KV cache or pages, in both versions, over `flashtile.attention_kvcache`."""

from typing import Any

import torch
from torch import Tensor

from flashtile.api import attention_kvcache
from flashtile.check import guests as check
from flashtile.integrations.flash_attn.common import Window, options
from flashtile.integrations.serving import ragged
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
