"""The public functions: signatures and documentation. What they mean is decided elsewhere.

Layout everywhere: (batch, seqlen, heads, headdim), any strides; log-sum-exps (batch, heads, seqlen), float32 (float64
for float64 inputs), natural logarithm. Options are keywords; each is honoured by every backend that runs, or refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashtile import autograd, decoding, plan, recall
from flashtile.decoding import CacheArguments
from flashtile.masks import Alignment, Mask
from flashtile.plan import Plan
from flashtile.request import Arguments, Packing, build, described
from flashtile.scaled import Scaled
from flashtile.state import State


def attention(
    q: Tensor | Scaled,
    k: Tensor | Scaled,
    v: Tensor | Scaled,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | Tensor | Callable[..., Any] | None = None,
    block_mask: Any = None,
    score_mod: Callable[..., Any] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    alignment: Alignment = "bottom_right",
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact attention: softmax(scale * q k^T, modified and masked) v, with memory linear in the sequence length.

    FlashAttention (Dao et al. 2022): tiling, online softmax, recomputation in the backward pass. Gradients flow to q,
    k, v, bias, alibi_slopes, sinks, the tensors that score_mod captures, and from out and lse alike. A query that sees
    no key gets out 0, lse -inf and gradients 0. NaN in gives NaN out. DTensors that shard the batch or the heads stay
    sharded.

    Args:
        q: (batch, seqlen_q, heads, headdim), float16, bfloat16, float32 or float64; or with k and v what
            `flashtile.fp8.quantize` returns.
        k: (batch, seqlen_kv, heads_kv, headdim), dtype and device of q; heads_kv divides heads (GQA, MQA).
        v: (batch, seqlen_kv, heads_kv, headdim_v).
        causal: query i sees keys up to its diagonal (see `alignment`).
        window: (left, right): query i sees `left` keys before its diagonal, the diagonal, and `right` after; None in
            a place: no limit there. (2, 0) lets query 3 of 5 see keys 1, 2, 3 of 5.
        mask: a `flashtile.masks` value, a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_kv) with
            True for "may attend", or a FlexAttention mask_mod(b, h, q_idx, kv_idx). Joined by `and` with the others.
        block_mask: a FlexAttention BlockMask, made for these lengths.
        score_mod: a FlexAttention score_mod(score, b, h, q_idx, kv_idx); sees the score after all of the below.
        bias: added to the scaled scores; broadcasts to (batch, heads, seqlen_q, seqlen_kv); any float dtype, strides.
            One of five dimensions, (batch / n, 1, heads, seqlen_q, seqlen_kv), is shared by n entries each, one after
            the other: the bias of pairs of a batch of protein rows.
        alibi_slopes: (heads,) or (batch, heads); adds -slope * |distance from the diagonal| (Press et al. 2022).
        softcap: scores become softcap * tanh(score / softcap), before bias and slopes. 0 or None: off.
        sinks: (heads,), one logit a head that joins the softmax's denominator (and the lse) but has no value.
        scale: multiplies q k^T; default headdim ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; the lse is that of the undropped weights.
        seed: int, or int64 tensor of one number, that decides what is dropped (`dropout_mask` shows it); default:
            drawn from PyTorch's generator.
        alignment: where causal, window and ALiBi have their diagonal: "bottom_right" (the last query sees the last
            key) or "top_left" (query 0 sees key 0). They differ only where seqlen_q and seqlen_kv do.
        out_dtype: dtype of out: q's (default) or torch.float32; of 8-bit inputs torch.float16, torch.bfloat16 or
            torch.float32, default: that of what was rounded.
        return_lse: return State(out, lse) instead of out.
        deterministic: gradients repeat bit for bit; default: torch.are_deterministic_algorithms_enabled().
        batch_invariant: a sequence gets the same bits alone, in any batch and in any packing; implies deterministic.
        backend: insist on one backend; default: the fastest that takes the call (see `explain`).

    Returns:
        out (batch, seqlen_q, heads, headdim_v), contiguous; or, with return_lse, State(out, lse) where lse is
        (batch, heads, seqlen_q), float32, natural logarithm.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what it got, and what to do.
        NotImplementedError: `backend` cannot take the call.
    """
    values = (causal, window, softcap, scale, dropout_p, alignment, out_dtype, return_lse)
    rest = (deterministic, batch_invariant, backend, "", mask, block_mask, score_mod, bias, alibi_slopes, sinks, seed)
    arguments = Arguments(*(values + rest))
    out, lse = recall.attention(q, k, v, arguments)
    return State(out, lse) if return_lse else out


def attention_varlen(
    q: Tensor | Scaled,
    k: Tensor | Scaled,
    v: Tensor | Scaled,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | Tensor | Callable[..., Any] | None = None,
    block_mask: Any = None,
    score_mod: Callable[..., Any] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    alignment: Alignment = "bottom_right",
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` over sequences of different lengths, packed one after the other without padding.

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] and likewise keys; it may have none of either.
    Indices that masks and modifiers see count from 0 within a sequence, and `b` is the sequence. Tables (bias, bool
    masks, document ids) are shared: they must reach at least as far as the longest sequence.

    Args:
        q: (total_q, heads, headdim); k: (total_k, heads_kv, headdim); v: (total_k, heads_kv, headdim_v).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32 or int64, never decreasing.
        seqused_q, seqused_k: (sequences,), how many of a sequence's rows are in use, counted from its start; the rest
            is padding: never read, its out is 0, its lse -inf. Default: all.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths in use; optional. An int is checked where the host can
            see the lengths; a tensor is accepted and never read.
        Everything else as in `attention`, with "batch" being the number of sequences; block_mask is refused.

    Returns:
        out (total_q, heads, headdim_v); with return_lse, State(out, lse) with lse (heads, total_q).

    Raises:
        TypeError, ValueError, NotImplementedError: as in `attention`.
    """
    values = (causal, window, softcap, scale, dropout_p, alignment, out_dtype, return_lse)
    rest = (deterministic, batch_invariant, backend, "", mask, block_mask, score_mod, bias, alibi_slopes, sinks, seed)
    arguments = Arguments(*(values + rest))
    packing = Packing(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    out, lse = recall.attention(q, k, v, arguments, packing)
    return State(out, lse) if return_lse else out


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: int | Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> Any:
    """Appends new keys and values to a KV cache, in place, and attends over all of it, in one call; for inference.

    Keys are split over the device where there are few queries (Flash-Decoding, Dao et al. 2023), the query heads of a
    key head share its reads, and pages are followed by a block table (vLLM, Kwon et al. 2023). Every option goes with
    every other. Lengths are read on the device, so that a captured CUDA graph may be replayed with others in them.

    Args:
        q: (batch, seqlen_q, heads, headdim), the last seqlen_q positions of each sequence.
        k_cache: (rows, seqlen_cache, heads_kv, headdim), dtype and device of q, columns side by side; with
            block_table (pages, page_size, heads_kv, headdim), pages of 16 rows or more. Or, with scales, float8_e4m3fn,
            float8_e5m2 or int8; or uint8 with headdim / 2 columns, which hold four-bit integers: byte j has column 2j
            in its low bits and column 2j + 1 in its high ones (see `kvcache.packed`).
        v_cache: the same with headdim_v columns.
        cache_seqlens: int or (batch,) int32 or int64, rows of each sequence in the cache before this call, left
            padding included.
        k, v: (batch, seqlen_new, heads_kv, headdim or headdim_v), rows to write behind those. Default: nothing is new,
            and q belongs to the last rows that are there.
        cache_batch_idx: (batch,), the row of the caches, or of block_table, that each sequence has. Default: its own
            number.
        cache_leftpad: (batch,), rows at the front of each sequence that are padding: never read. Default: 0.
        block_table: (batch or more, pages of a sequence), the page that holds each page_size rows. Entries behind the
            last page in use may be anything.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), q's dtype or float32: q and k are turned (Su et al. 2021)
            before use, each row by its place in the cache, cache_seqlens + i; without causal and window all queries
            are turned to cache_seqlens. Needs k and v, and as many positions as a sequence may have rows, and as
            queries pass them that are more than the new keys; in pages they may end inside of the last one.
        k_scale, v_scale: float32, (heads_kv,), or with block_table (pages, heads_kv): what the numbers of a quantised
            cache are multiplied by. New rows are divided by them, and rounded and cut off to what the cache holds.
        rotary_interleaved: columns 2i and 2i + 1 are a pair (GPT-J); else i and i + rotary_dim / 2 (GPT-NeoX).
        causal, window: as in `attention`, aligned to the bottom right: the last query sees the last key.
        softcap, alibi_slopes, sinks, scale: as in `attention`.
        num_splits: parts that the keys of a sequence are cut into, 1 to 256; default: as many as fill the device. On
            the CPU they stay in one.
        batch_invariant: a sequence gets the same bits alone and in any batch, at any capacity of the cache, paged or
            not: its keys are cut into parts of one size.
        return_lse: return State(out, lse) instead of out.
        debug: look at lengths, rows, page ids and scales on a GPU too, which then waits for them; on the CPU that is
            always done. Otherwise a sequence that is too long, or a page that does not exist, is not noticed there.
        backend: insist on one backend; default: the fastest that takes the call.

    Returns:
        out (batch, seqlen_q, heads, headdim_v), contiguous; or, with return_lse, State(out, lse) where lse is
        (batch, heads, seqlen_q), float32, natural logarithm. A query that sees no key gets out 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is not as described; the caches are as they were before.
        NotImplementedError: `backend` cannot take the call.
    """
    places = (cache_seqlens, k, v, cache_batch_idx, cache_leftpad, block_table, rotary_cos, rotary_sin)
    values = (k_scale, v_scale, rotary_interleaved, causal, window, softcap, alibi_slopes, sinks, scale)
    given = CacheArguments(*(*places, *values, num_splits, batch_invariant, debug, return_lse, backend))
    out, lse = decoding.attention(q, k_cache, v_cache, given)
    return State(out, lse) if return_lse else out


def explain_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **arguments: Any) -> Plan:
    """`explain` for `attention_kvcache`, whose arguments it takes. Nothing runs, the caches stay as they are.

    Returns:
        Plan: printed, and returned.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention_kvcache` would, but for what tensors contain.
    """
    chosen = decoding.build(q, k_cache, v_cache, CacheArguments(**arguments)).plan()
    print(chosen)
    return chosen


def explain(
    q: Tensor | Scaled,
    k: Tensor | Scaled,
    v: Tensor | Scaled,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | Tensor | Callable[..., Any] | None = None,
    block_mask: Any = None,
    score_mod: Callable[..., Any] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    alignment: Alignment = "bottom_right",
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Plan:
    """Says, without running anything, which backend, kernel and tiles `attention` would use, and why none faster.

    Takes the arguments of `attention`; with cu_seqlens_q and cu_seqlens_k, those of `attention_varlen`.

    Returns:
        Plan: printed, and returned with fields backend, kernel, config and rejected ((name, reason), ...), and with
        backward, the Plan of the backward pass, if anything requires a gradient.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention` would.
    """
    values = (causal, window, softcap, scale, dropout_p, alignment, out_dtype, return_lse)
    rest = (deterministic, batch_invariant, backend, "", mask, block_mask, score_mod, bias, alibi_slopes, sinks, seed)
    arguments = Arguments(*(values + rest))
    packing = described(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    inputs, options = build(q, k, v, arguments, packing)
    chosen = autograd.plans(inputs, options)
    print(chosen)
    return chosen


def warmup(
    q: Tensor | Scaled,
    k: Tensor | Scaled,
    v: Tensor | Scaled,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | Tensor | Callable[..., Any] | None = None,
    block_mask: Any = None,
    score_mod: Callable[..., Any] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    alignment: Alignment = "bottom_right",
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> int:
    """Builds every kernel that a call with these arguments runs, and those of its backward pass if one requires it.

    Takes the arguments of `attention`; with cu_seqlens_q and cu_seqlens_k, those of `attention_varlen`. The call is
    run once, its results are thrown away, `grad` fields stay untouched. Later calls that differ only in batch size,
    lengths and numbers build nothing, with three exceptions: tensors that stop or begin to be aligned to 16 bytes or
    elements, tensors that outgrow 2^31 elements, and on a Hopper masks other than windows that outgrow 32k tokens.

    Returns:
        int: how many kernels were built (see `builds`); 0 if all were there.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention` would.
    """
    values = (causal, window, softcap, scale, dropout_p, alignment, out_dtype, return_lse)
    rest = (deterministic, batch_invariant, backend, "", mask, block_mask, score_mod, bias, alibi_slopes, sinks, seed)
    arguments = Arguments(*(values + rest))
    packing = described(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    before = builds()
    autograd.rehearse(*build(q, k, v, arguments, packing))
    return builds() - before


def builds() -> int:
    """How many kernels this process has compiled, or loaded from Triton's cache, for all backends and devices."""
    return plan.builds()
