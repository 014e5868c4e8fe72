"""Masks: what may attend to what.

A `Mask` is a value: a self-describing token (JSON, so that it survives `torch.export`) and the tensors it refers to.
Masks combine with `&` and `|`. Inside an operator the token is parsed once to a tree of `mask_nodes`, which know the
predicate and the bounds.

Queries and keys are counted from 0. `alignment="bottom_right"` places query i on the diagonal of key
i + seqlen_kv - seqlen_q, so that the last query sees the last key; `"top_left"` places query 0 on key 0.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flashtile import check
from flashtile.forgetting import Made, remembered
from flashtile.queues import capturing, queue
from flashtile.spans import FULL, PARTIAL

Alignment = Literal["bottom_right", "top_left"]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which (query, key) pairs may attend. Built by the functions of this module; combined with `&` and `|`."""

    token: str
    tensors: tuple[Tensor, ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(f'["and",{self.token},{other.token}]', self.tensors + other.tensors)

    def __or__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(f'["or",{self.token},{other.token}]', self.tensors + other.tensors)


def full() -> Mask:
    """Every query sees every key."""
    return Mask('["full"]')


def causal(alignment: Alignment = "bottom_right") -> Mask:
    """Query i sees keys up to its diagonal."""
    check.alignment(alignment)
    return Mask(f'["causal","{alignment}"]')


def window(left: int | None, right: int | None, alignment: Alignment = "bottom_right") -> Mask:
    """Query i sees `left` keys before its diagonal, the diagonal itself and `right` keys after; None: no limit.

    `window(2, 0)` on 5 queries and 5 keys lets query 3 see keys 1, 2, 3.
    """
    check.window_side("left", left)
    check.window_side("right", right)
    check.alignment(alignment)
    left, right = (-1 if side is None or side >= _NO_LIMIT else side for side in (left, right))
    return Mask(f'["window",{left},{right},"{alignment}"]')


_NO_LIMIT = 2**30
"""No sequence is so long, and twice as much, which indices may come to, is too much for 32 bits."""


def chunk(size: int, alignment: Alignment = "bottom_right") -> Mask:
    """Keys and queries fall into chunks of `size` by position; a query sees the keys of its own chunk."""
    check.chunk_size(size)
    check.alignment(alignment)
    return Mask(f'["chunk",{size},"{alignment}"]')


def prefix(length: int | Tensor) -> Mask:
    """Every query sees keys 0 .. length - 1. `length`: int, or an integer tensor (batch,).

    Alone it is key padding (the number of real keys of each sequence); `causal() | prefix(n)` is a prefix-LM.
    """
    check.prefix_length(length)
    if isinstance(length, Tensor):
        return Mask('["prefix",-1]', (length,))
    return Mask(f'["prefix",{length}]')


def document(query_ids: Tensor, key_ids: Tensor | None = None) -> Mask:
    """A query sees the keys that carry its own document id.

    `query_ids`: integers (seqlen_q,) or (batch, seqlen_q); `key_ids` likewise, by default the same tensor. Ids in
    ascending order (packed documents) lower to spans; any other order works and lowers to a visit list.
    """
    check.document_value(query_ids, key_ids)
    return Mask('["document"]', (query_ids, query_ids if key_ids is None else key_ids))


def dense(allowed: Tensor) -> Mask:
    """A boolean tensor that broadcasts to (batch, heads, seqlen_q, seqlen_kv); True: may attend."""
    check.dense_value(allowed)
    return Mask('["dense"]', (allowed,))


def block(state: Tensor, block_size: tuple[int, int], inner: Mask | None = None) -> Mask:
    """Block-sparse: `state[b, h, i, j]` rules over queries of block i and keys of block j.

    `state`: bool or int8, (batch or 1, heads or 1, ceil(seqlen_q / block_size[0]), ceil(seqlen_kv / block_size[1]));
    0 or False: masked, 1: the mask `inner` decides (all visible where it is None), 2: all visible.
    """
    check.block_value(state, block_size, inner)
    if state.dtype is torch.bool:
        state = state.to(torch.int8)
    inner = inner or full()
    return Mask(f'["block",{block_size[0]},{block_size[1]},{inner.token}]', (state, *inner.tensors))


def custom(mask_mod: Callable[..., Any]) -> Mask:
    """Any FlexAttention `mask_mod(b, h, q_idx, kv_idx) -> bool`, captured tensors included.

    The function is traced once; interval arithmetic over its graph finds the tiles that need not be visited. If it says
    no more than how far a key may lie from a query (causal, a sliding window), it becomes that window, which is faster.

    Raises:
        TypeError, ValueError: the function does not return one boolean or cannot be traced.
    """
    from flashtile import bands, trace

    check.custom_value(mask_mod)
    lifted = trace.lift(mask_mod, "mask")
    band = bands.band_of(lifted.key)
    if band is not None:
        return _band(*band)
    return Mask(f'["custom","{lifted.key}",{len(lifted.tensors)}]', lifted.tensors)


def _band(low: int | None, high: int | None) -> Mask:
    """Key minus query lies in [low, high], None: no limit; both counted from the first."""
    if low is None and high == 0:
        return causal("top_left")
    if (low is None or -_NO_LIMIT < low <= 0) and (high is None or high >= 0):
        return window(None if low is None else -low, high, "top_left")
    return Mask(json.dumps(["band", low, high], separators=(",", ":")))


def from_block_mask(block_mask: Any) -> Mask:
    """The Mask of a FlexAttention `BlockMask`: its block lists say where to go, its `mask_mod` rules partial blocks."""
    check.block_mask_value(block_mask)
    return block(_state_of(block_mask), tuple(block_mask.BLOCK_SIZE), custom(block_mask.mask_mod))


_states: Made = {}
_KEPT = 256


def _state_of(block_mask: Any) -> Tensor:
    """0 masked, 1 partial, 2 full, a block; made once for lists that stay as they are."""
    count = block_mask.kv_num_blocks
    lists = (count, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    if torch.compiler.is_compiling() or type(count) is not Tensor or capturing(count.device):
        return _state(*lists)
    there = [tensor for tensor in lists if tensor is not None]
    what = (queue(count.device), tuple(tensor is None for tensor in lists))
    return remembered(_states, what, there, lambda: _state(*lists), _KEPT)


def _state(count: Tensor, indices: Tensor, full_count: Tensor | None, full_indices: Tensor | None) -> Tensor:
    state = _listed(count, indices) * PARTIAL
    if full_count is None or full_indices is None:
        return state
    return torch.maximum(state, _listed(full_count, full_indices) * FULL)


def _listed(count: Tensor, indices: Tensor) -> Tensor:
    """0/1 per block from FlexAttention's lists: the first `count` entries of each row of `indices` name blocks."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    return torch.zeros_like(indices, dtype=torch.int8).scatter_reduce(
        -1, indices.long(), listed.to(torch.int8), reduce="amax"
    )


def readable(token: str) -> str:
    """A token as one would write it: `causal() & document()`; tensors are not shown."""
    return _words(json.loads(token))


def _words(expression: list[Any]) -> str:
    kind, *arguments = expression
    if kind in ("and", "or"):
        sign = " & " if kind == "and" else " | "
        return "(" + sign.join(_words(argument) for argument in arguments) + ")"
    shown = [_words(part) if isinstance(part, list) else str(part) for part in arguments if part != "bottom_right"]
    return f"{kind}({', '.join(shown)})"
