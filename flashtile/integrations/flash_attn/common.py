"""What both versions of flash-attn's interface share: their options in flashtile's words, and the attention weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile.api import attention, attention_varlen
from flashtile.dropout import dropout_mask

Window = Sequence[int] | Tensor
Maximum = int | Tensor


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    deterministic: bool = False,
    alibi_slopes: Tensor | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `attention`. A window side of -1 has no limit, a softcap of 0 is off.

    window_size may be a tensor or hold some, as the bindings of flash-attn take them.
    """
    sides = (int(side) if isinstance(side, Tensor) else side for side in window_size)
    left, right = (None if side < 0 else side for side in sides)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": None if left is None and right is None else (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        # False does not overrule PyTorch's global switch.
        "deterministic": deterministic or None,
    }


def draw_seed(q: Tensor) -> Tensor:
    """A seed of dropout from PyTorch's generator."""
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=q.device)


def weights(q: Tensor, k: Tensor, dropout_p: float, seed: Tensor | None, chosen: dict[str, Any]) -> Tensor:
    """flash-attn's `S_dmask`: attention weights (batch, heads, seqlen_q, seqlen_kv), negative where dropped.

    They are the attention over the identity matrix as values. Empty (0,) without dropout, as there.
    """
    if seed is None:
        return q.new_empty(0)
    batch, seqlen_q, heads, _ = q.shape
    seqlen_kv, heads_kv = k.shape[1:3]
    if 0 in (batch, seqlen_kv):
        return q.new_zeros(batch, heads, seqlen_q, seqlen_kv)
    with torch.no_grad():
        identity = torch.eye(seqlen_kv, dtype=q.dtype, device=q.device)[None, :, None]
        found = attention(q, k, identity.expand(batch, -1, heads_kv, -1), **chosen).transpose(1, 2)
    kept = dropout_mask(seed, dropout_p, batch, heads, seqlen_q, seqlen_kv)
    return torch.where(kept, found, -found)


def weights_varlen(
    q: Tensor,
    k: Tensor,
    packing: tuple[Tensor, Tensor],
    longest: tuple[Maximum, Maximum],
    dropout_p: float,
    seed: Tensor | None,
    chosen: dict[str, Any],
) -> Tensor:
    """The same of packed sequences: (sequences, heads, max_seqlen_q, max_seqlen_k), 0 where a sequence is shorter."""
    if seed is None:
        return q.new_empty(0)
    sequences, heads, (longest_q, longest_k) = len(packing[0]) - 1, q.shape[1], map(int, longest)
    found = q.new_zeros(sequences, longest_q, heads, longest_k)
    if found.numel():
        rows_q, places_q = _places(packing[0], len(q))
        _, places_k = _places(packing[1], len(k))
        used_q = places_q < longest_q
        identity = torch.nn.functional.one_hot(places_k.clamp(max=longest_k - 1), longest_k).to(q.dtype)
        with torch.no_grad():
            packed = attention_varlen(q, k, identity[:, None].expand(-1, k.shape[1], -1), *packing, **chosen)
        found[rows_q[used_q], places_q[used_q]] = packed[used_q]
    kept = dropout_mask(seed, dropout_p, sequences, heads, longest_q, longest_k)
    found = found.transpose(1, 2)
    return torch.where(kept, found, -found)


def _places(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, place within it) of every packed token; tokens behind the last sequence get places in that one."""
    tokens = torch.arange(total, device=offsets.device)
    sequence = (torch.searchsorted(offsets, tokens, right=True) - 1).clamp(0, len(offsets) - 2)
    return sequence, tokens - offsets[sequence]
