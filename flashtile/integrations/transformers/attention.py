"""The attention function that transformers' models call, in the place of their "eager" and "sdpa" ones."""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor

from flashtile import masks, sharding
from flashtile.api import attention, attention_varlen
from flashtile.check import guests as check

logger = logging.getLogger("flashtile")
_warned: set[str] = set()
_checked: list[Any] = []
"""The positions that were found good last, a weak reference, and their version."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """(out, None): attention weights are never there to be returned.

    Args:
        module: the model's attention layer; its `is_causal` counts where the argument is None.
        query: (batch, heads, seqlen_q, headdim); key, value: (batch, heads_kv, seqlen_kv, ...), not repeated.
        attention_mask: what `masks.attention_mask` returned, or a mask of four dimensions from the caller: bool, True
            where a query may attend, or floating, to be added. A mask of four dimensions says everything: causality
            and windows are not applied on top of it.
        sliding_window: how many keys a query sees, itself included; without causality that many to both sides.
        s_aux: (heads,), attention sinks. softcap: the cap of scores.
        position_bias: broadcasts to (batch, heads, seqlen_q, seqlen_kv), added to the scores; has a gradient.
        cu_seq_lens_q, ...: offsets of packed sequences; the batch size is 1 then.
        more: what concerns the model, not its attention.

    Returns:
        out: (batch, seqlen_q, heads, headdim_v).

    Raises:
        NotImplementedError: the model runs on transformers' paged cache (continuous batching).
    """
    check.no_paged_batching(more)
    _warn_of_weights(more)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    described = attention_mask is None or attention_mask.ndim == 2
    if described:
        options["causal"] = causal
        if sliding_window is not None:
            options["window"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    if sharding.current is not None and sharding.current.running() and cu_seq_lens_q is None:
        _check_positions(sharding.current, more.get("position_ids"), q.shape[1])
    padding = attention_mask if attention_mask is not None and _is_padding(attention_mask) else None
    given = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    if given and described and padding is None and position_bias is None and q.shape[0] == 1:
        where: Any = (cu_seq_lens_q, cu_seq_lens_k)
        options |= {"max_seqlen_q": max_length_q, "max_seqlen_k": max_length_k}
        return attention_varlen(q[0], k[0], v[0], *where, **options)[None], None
    if padding is not None:
        # A static cache has room behind the keys that are there.
        filled = padding.shape[1]
        k, v = k[:, :filled], v[:, :filled]
        position_bias = None if position_bias is None else position_bias[..., :filled]
    if q.shape[0] != k.shape[0]:
        q = q.expand(k.shape[0], -1, -1, -1)
    mask, bias = _mask_and_bias(attention_mask, position_bias)
    return attention(q, k, v, mask=mask, bias=bias, **options), None


def _check_positions(current: sharding.Current, positions: Tensor | None, tokens: int) -> None:
    """Positions that begin anew say that sequences are packed, but a process sees its own share of them only: where
    they are not those of one sequence, all processes raise. Once a tensor, for it waits for the device."""
    if positions is None or torch.compiler.is_compiling():
        return
    if _checked and _checked[0]() is positions and _checked[1] == positions._version:
        return
    expected = current.positions(tokens).to(positions.device)
    check.positions_of_shares(current.unanimous(bool((positions == expected).all())))
    _checked[:] = weakref.ref(positions), positions._version


def _is_padding(mask: Tensor) -> bool:
    return mask.ndim == 2 and mask.dtype is torch.bool


def _mask_and_bias(given: Tensor | None, position_bias: Tensor | None) -> tuple[Any, Tensor | None]:
    """Arguments of `attention` from the forms that `masks` lists."""
    if given is None:
        return None, position_bias
    if given.ndim == 2:
        return (given[:, None, None, :] if _is_padding(given) else masks.document(given)), position_bias
    if given.dtype is torch.bool:
        return given, position_bias
    return None, given if position_bias is None else given + position_bias


def _warn_of_weights(more: dict[str, Any]) -> None:
    if more.get("output_attentions") and "weights" not in _warned and not torch.compiler.is_compiling():
        _warned.add("weights")
        logger.warning("output_attentions: flashtile returns no attention weights; try attn_implementation='eager'")
