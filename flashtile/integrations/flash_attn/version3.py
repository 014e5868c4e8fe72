"""FlashAttention-3's interface (`flash_attn_interface`), on every GPU that flashtile runs on and on the CPU.

Conventions as in `version2`, but without dropout and ALiBi; `return_attn_probs` returns (out, softmax_lse). `qv`
(..., heads, headdim_v) adds qv v^T to the scores q k^T: absorbed MLA, with (headdim + headdim_v) ** -0.5 as the default
scale; q and k are joined with qv and v, a copy. `attention_chunk` n: a query sees keys of its own chunk of n. What only
steers FlashAttention-3's scheduler (num_splits, pack_gqa, sm_margin,
scheduler_metadata) is accepted and has no effect: flashtile plans by
itself. 8-bit q, k and v give bfloat16; `q_descale`, `k_descale`, `v_descale`, float32 (batch, heads_kv), default 1, say
what they stand for. Values are copied there. Packed sequences with descales, and caches under `attention_chunk`, beside
`qv` or with 8-bit queries, take one call a sequence over gathered keys (`gathered`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashtile import fp8, masks
from flashtile.api import attention, attention_varlen
from flashtile.check import guests as check
from flashtile.check.caches import SMALLEST_PAGE
from flashtile.integrations.flash_attn import gathered
from flashtile.integrations.flash_attn.cached import packed_over_pages, with_kvcache
from flashtile.integrations.flash_attn.common import Maximum, Window, options
from flashtile.state import State, merge


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """q (batch, seqlen_q, heads, headdim); k (batch, seqlen_kv, heads_kv, headdim); v with its own head dimension."""
    chosen = options(softmax_scale, causal, window_size, softcap, deterministic)
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    found = attention(
        *_tensors(q, k, v, qv, descales), mask=_chunk(attention_chunk), return_lse=return_attn_probs, **chosen
    )
    return tuple(found) if return_attn_probs else found


def _tensors(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, descales: dict[str, Tensor | None]) -> Any:
    """(q, k, v) as `attention` takes them."""
    if q.dtype.itemsize > 1:
        check.no_descales(descales)
        return *_absorbed(q, k, v, qv), v
    check.absorbed_of_eight_bits(qv)
    heads = (*q.shape[:-3], k.shape[-2])
    scales = [torch.ones(heads, device=q.device) if scale is None else scale for scale in descales.values()]
    scales[0] = scales[0].repeat_interleave(q.shape[-2] // k.shape[-2], dim=-1)
    return fp8.scaled(q, k, v, scales[0], scales[1], scales[2])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Maximum,
    max_seqlen_k: Maximum,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Packed q (total_q, heads, headdim), k (total_k, heads_kv, headdim), v; seqused_* (sequences,): rows in use."""
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    if q.dtype.itemsize == 1 and any(scale is not None for scale in descales.values()):
        attend = partial(
            flash_attn_func,
            softmax_scale=softmax_scale,
            causal=causal,
            qv=qv,
            window_size=window_size,
            attention_chunk=attention_chunk,
            softcap=softcap,
            return_attn_probs=True,
        )
        used = (seqused_q, seqused_k)
        state = gathered.packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), used, descales, attend)
        return tuple(state) if return_attn_probs else state.out
    q, k, v = _tensors(q, k, v, qv, descales)
    found = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        mask=_chunk(attention_chunk),
        return_lse=return_attn_probs,
        **options(softmax_scale, causal, window_size, softcap, deterministic),
    )
    return tuple(found) if return_attn_probs else found


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (batch, seqlen, 3, heads, headdim), or (batch, seqlen, heads + 2 heads_kv, headdim) with num_heads_q."""
    check.packed_heads(qkv, num_heads_q)
    if num_heads_q is None:
        q, k, v = qkv.unbind(dim=-3)
    else:
        heads_kv = (qkv.shape[-2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, heads_kv, heads_kv), dim=-2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them (see `flashtile.merge`).

    Args:
        out_partial: (parts, batch, seqlen, heads, headdim); lse_partial: (parts, batch, seqlen, heads), natural log.
        out: written to and returned, if given.
        out_dtype: dtype of the result, if out is not given; default out_partial's.

    Returns:
        out (batch, seqlen, heads, headdim) and lse (batch, seqlen, heads).
    """
    lses = lse_partial.transpose(-1, -2).unbind(0)
    merged = merge([State(*pair) for pair in zip(out_partial.unbind(0), lses, strict=True)])
    if out is None:
        out = merged.out.to(out_dtype or out_partial.dtype)
    else:
        out.copy_(merged.out)
    return out, merged.lse.transpose(-1, -2)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """As in `version2`, with `page_table` for block_table; returns (out, lse, out_accum, lse_accum) with
    return_softmax_lse, the last two empty. With cu_seqlens_q the queries are packed (total_q, heads, headdim), and lse
    is (heads, total_q); with cu_seqlens_k_new the new keys and values are. rotary_seqlens: the position of each
    sequence's first new row, cache_seqlens by default. What is packed beside something new takes one call a sequence,
    as do qv, attention_chunk, 8-bit queries and pages of fewer than 16 rows, and the host reads the offsets.

    Raises:
        NotImplementedError: descales are given beside queries of 16 bits or more, or qv beside those of 8.
        ValueError: cu_seqlens_k_new without k, or keys that do not fit into the cache.
    """
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    eight = q.dtype.itemsize == 1
    if not eight:
        check.no_descales(descales)
    given = gathered.Ragged(cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens)
    beside = (k, rotary_cos, cache_batch_idx, cache_leftpad)
    over_pages = page_table is not None and isinstance(cache_seqlens, Tensor) and beside == (None,) * 4
    small = page_table is not None and k_cache.shape[1] < SMALLEST_PAGE
    beyond = qv is not None or bool(attention_chunk) or eight or small
    scores: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
    }
    found: Any
    if over_pages and cu_seqlens_q is not None and not beyond:
        where: Any = (cu_seqlens_q, cache_seqlens, page_table, 0.0, options(**scores))
        found = packed_over_pages(q, k_cache, v_cache, *where)
    elif beyond or given.any:
        moving = causal or bool(attention_chunk) or tuple(window_size) != (-1, -1)
        rotary = gathered.Rotary(rotary_cos, rotary_sin, rotary_interleaved, moving)
        cache = gathered.Cache(k_cache, v_cache, page_table, cache_batch_idx, cache_leftpad)
        attend = partial(flash_attn_func, **scores, attention_chunk=attention_chunk, return_attn_probs=True)
        found = gathered.over_cache(q, qv, cache, (k, v), rotary, cache_seqlens, given, descales, attend)
    else:
        return _with_lse(
            with_kvcache(
                q,
                k_cache,
                v_cache,
                {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin},
                cache_seqlens,
                page_table,
                **scores,
                alibi_slopes=None,
                num_splits=num_splits,
                return_lse=return_softmax_lse,
                cache_batch_idx=cache_batch_idx,
                cache_leftpad=cache_leftpad,
                rotary_interleaved=rotary_interleaved,
            )
        )
    return _with_lse(found if return_softmax_lse else found.out)


def _with_lse(found: State | Tensor) -> Any:
    """As the function returns it: beside the log-sum-exp two accumulators, which are empty."""
    return found if isinstance(found, Tensor) else (*found, found.out.new_empty(0), found.out.new_empty(0))


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """An empty int32 tensor, to be handed on as `scheduler_metadata`: flashtile plans by itself and needs none."""
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def _absorbed(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None) -> tuple[Tensor, Tensor]:
    """q k^T + qv v^T is one product of longer heads, and the default scale is that of their length."""
    if qv is None:
        return q, k
    return torch.cat((q, qv), dim=-1), torch.cat((k, v), dim=-1)


def _chunk(size: int) -> masks.Mask | None:
    return masks.chunk(size) if size else None
