"""The seven functions of `flash_attn` 2.8.

What they share: q, k and v with heads before the head dimension, `out` like q with v's head dimension. `window_size`
(left, right) counts keys around the diagonal, -1: no limit; causal and window are aligned to the bottom right.
`alibi_slopes`, float32 (heads,) or (batch, heads), adds -slope * |distance from the diagonal|. `softcap` 0 is off.
`dropout_p` is always applied: give 0.0 in evaluation. With `return_attn_probs` they return (out, softmax_lse, S_dmask):
softmax_lse float32 (batch, heads, seqlen_q), packed (heads, total_q); S_dmask the attention weights, negative where
dropped, empty without dropout, else quadratic in memory and meant for tests.

Raises: TypeError, ValueError as `flashtile.attention` does.
"""

from typing import Any

from torch import Tensor

from flashtile.api import attention, attention_varlen
from flashtile.integrations.flash_attn.cached import packed_over_pages, with_kvcache
from flashtile.integrations.flash_attn.common import Maximum, Window, draw_seed, options, weights, weights_varlen


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q (batch, seqlen_q, heads, headdim); k, v (batch, seqlen_kv, heads_kv, headdim). See the module for the rest."""
    chosen = options(softmax_scale, causal, window_size, softcap, deterministic, alibi_slopes)
    seed = draw_seed(q) if dropout_p else None
    found = attention(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=return_attn_probs, **chosen)
    return (*found, weights(q, k, dropout_p, seed, chosen)) if return_attn_probs else found


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in kv (batch, seqlen_kv, 2, heads_kv, headdim), which is not copied."""
    k, v = kv.unbind(dim=-3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in qkv (batch, seqlen, 3, heads, headdim), which is not copied."""
    q, k, v = qkv.unbind(dim=-3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Maximum,
    max_seqlen_k: Maximum,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """q (total_q, heads, headdim); k, v (total_k, heads_kv, headdim); cu_seqlens_* (sequences + 1,) offsets.

    With block_table (sequences, pages), k and v are pages (pages, page_size, heads_kv, headdim), and cu_seqlens_k says
    how many rows of them each sequence has; no gradients then.

    Raises:
        NotImplementedError: block_table beside dropout.
    """
    chosen = options(softmax_scale, causal, window_size, softcap, deterministic, alibi_slopes)
    if block_table is not None:
        state = packed_over_pages(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, dropout_p, chosen)
        return (*state, q.new_empty(0)) if return_attn_probs else state.out
    seed = draw_seed(q) if dropout_p else None
    packing, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    found = attention_varlen(
        q,
        k,
        v,
        *packing,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        seed=seed,
        return_lse=return_attn_probs,
        **chosen,
    )
    if not return_attn_probs:
        return found
    return (*found, weights_varlen(q, k, packing, longest, dropout_p, seed, chosen))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Maximum,
    max_seqlen_k: Maximum,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in kv (total_k, 2, heads_kv, headdim), which is not copied."""
    k, v = kv.unbind(dim=-3)
    where: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    how: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *where, *how)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Maximum,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in qkv (total, 3, heads, headdim), which is not copied."""
    q, k, v = qkv.unbind(dim=-3)
    where: Any = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    how: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *where, *how)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Writes k and v to the caches, in place, and attends over what is in them; see `flashtile.attention_kvcache`.

    Args:
        q: (batch, seqlen_q, heads, headdim).
        k_cache, v_cache: (rows, seqlen_cache, heads_kv, headdim); pages (pages, page_size, ...) with block_table.
        k, v: (batch, seqlen_new, heads_kv, headdim), with cache_seqlens.
        cache_seqlens: how much of each sequence is there before the call; default: the whole cache.
        num_splits: 0 leaves it to flashtile.

    Returns:
        out, or with return_softmax_lse (out, softmax_lse). No gradients, as in flash-attn.

    Raises:
        NotImplementedError: this flashtile has no key-value caches.
    """
    found = with_kvcache(
        q,
        k_cache,
        v_cache,
        {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin},
        cache_seqlens,
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        num_splits,
        return_softmax_lse,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_interleaved=rotary_interleaved,
    )
    return tuple(found) if return_softmax_lse else found
