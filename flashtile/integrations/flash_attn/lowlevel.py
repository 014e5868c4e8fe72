"""flash-attn's private pairs of forward and backward functions, which ring attention libraries and diffusers import.

Without autograd, as there. `rng_state` holds flashtile's seed of dropout in its first number.
"""

from typing import Any

import torch
from torch import Tensor

from flashtile.api import attention, attention_varlen
from flashtile.check import guests as check
from flashtile.gradients import gradients
from flashtile.integrations.flash_attn.cached import packed_over_pages
from flashtile.integrations.flash_attn.common import Maximum, draw_seed, options, weights, weights_varlen
from flashtile.request import Packing


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state)."""
    window = (window_size_left, window_size_right)
    chosen = options(softmax_scale, causal, window, softcap, alibi_slopes=alibi_slopes)
    seed = draw_seed(q) if dropout_p else None
    with torch.no_grad():
        out, lse = attention(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True, **chosen)
    shown = weights(q, k, dropout_p, seed if return_softmax else None, chosen)
    return out, lse, shown, _state_of(seed, q)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns softmax_d, the row sums of dout * out (batch, heads, seqlen_q)."""
    window = (window_size_left, window_size_right)
    chosen = options(softmax_scale, causal, window, softcap, deterministic, alibi_slopes)
    seed = _seed_of(rng_state, dropout_p)
    found = gradients(q, k, v, out, softmax_lse, dout, dropout_p=dropout_p, seed=seed, **chosen)
    _write((dq, dk, dv), found[:3])
    return _row_sums(dout, out)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Maximum,
    max_seqlen_k: Maximum,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state). What no query or sequence owns is 0 with or without zero_tensors. With
    block_table k and v are pages, as in `flash_attn_varlen_func`."""
    check.no_left_padding(leftpad_k)
    window = (window_size_left, window_size_right)
    chosen = options(softmax_scale, causal, window, softcap, alibi_slopes=alibi_slopes)
    if block_table is not None:
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        state = packed_over_pages(q, k, v, cu_seqlens_q, lengths, block_table, dropout_p, chosen)
        return *state, q.new_empty(0), _state_of(None, q)
    chosen["seqused_k"] = seqused_k
    seed = draw_seed(q) if dropout_p else None
    packing, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    bounds: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    with torch.no_grad():
        out, lse = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p=dropout_p, seed=seed, return_lse=True, **bounds, **chosen
        )
    shown = weights_varlen(q, k, packing, longest, dropout_p, seed if return_softmax else None, chosen)
    return out, lse, shown, _state_of(seed, q)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Maximum,
    max_seqlen_k: Maximum,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv; returns softmax_d (heads, total_q)."""
    window = (window_size_left, window_size_right)
    chosen = options(softmax_scale, causal, window, softcap, deterministic, alibi_slopes)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q, max_seqlen_k)
    seed = _seed_of(rng_state, dropout_p)
    found = gradients(q, k, v, out, softmax_lse, dout, packing=packing, dropout_p=dropout_p, seed=seed, **chosen)
    _write((dq, dk, dv), found[:3])
    return _row_sums(dout, out)


# Under PyTorch's compiler flash-attn calls these operators, elsewhere functions; flashtile's functions do for both.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _state_of(seed: Tensor | None, q: Tensor) -> Tensor:
    state = torch.zeros(2, dtype=torch.int64, device=q.device)
    if seed is not None:
        state[0] = seed
    return state


def _seed_of(state: Tensor | None, dropout_p: float) -> Tensor | None:
    if not dropout_p:
        return None
    if state is None:
        check.no_rng_state()
    return state[0]


def _write(targets: tuple[Tensor | None, ...], found: tuple[Tensor, ...]) -> None:
    for target, gradient in zip(targets, found, strict=True):
        if target is not None:
            target.copy_(gradient)


def _row_sums(dout: Tensor, out: Tensor) -> Tensor:
    return (dout.float() * out.float()).sum(dim=-1).transpose(-1, -2).contiguous()
