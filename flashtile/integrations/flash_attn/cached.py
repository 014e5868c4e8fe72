"""`flash_attn_with_kvcache` of both versions, over `flashtile.attention_kvcache`."""

from typing import Any

from torch import Tensor

from flashtile.api import attention_kvcache
from flashtile.check import guests as check
from flashtile.integrations.flash_attn.common import Window, options


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
    """out, or State(out, lse). `new`: k, v and the rotary tables; `where`: what goes on unchanged."""
    if cache_seqlens is None:
        check.needs_cache_seqlens(new["k"])
        # The whole cache is filled.
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    chosen = options(softmax_scale, causal, window_size, softcap, alibi_slopes=alibi_slopes)
    del chosen["deterministic"]
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
