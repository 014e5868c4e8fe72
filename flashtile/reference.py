"""The textbook formula: the specification that everything else is held to. Clarity only; memory is quadratic.

out = softmax(scores) v with scores = modified(scale * q k^T), masked to -inf; differentiable by PyTorch's autograd in
everything. Functions given as score_mod or mask are called as they are, once per index, under torch.vmap: neither the
tracer nor any backend is involved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashtile import dropout, mask_nodes, masks
from flashtile.mask_nodes import At
from flashtile.masks import Mask
from flashtile.state import State


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    alignment: masks.Alignment = "bottom_right",
    dtype: torch.dtype | None = torch.float64,
) -> State:
    """The arguments of `flashtile.attention`, computed in `dtype` (None: the input's own, as a plain model would).

    Returns:
        State: out (batch, seqlen_q, heads, headdim_v), lse (batch, heads, seqlen_q), both in `dtype`.
    """
    dtype = dtype or q.dtype
    q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    at = _everywhere(q, k)
    diagonal = at.aligned(alignment)
    sizes = (*q.shape[:3], k.shape[2])
    allowed = _allowed(at, causal, window, mask, block_mask, alignment).expand(sizes)
    # What no query sees may be anything, NaN behind the end of a sequence for one.
    hidden = (~allowed).all(dim=2).unsqueeze(-1)
    k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)

    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        if bias.ndim == 5:
            bias = bias[:, 0].repeat_interleave(q.shape[0] // max(1, len(bias)), dim=0)
        scores = scores + bias.to(dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).reshape(-1, q.shape[1], 1, 1)
        scores = scores - slopes * (diagonal - at.key).abs()
    if score_mod is not None:
        scores = _vmapped(score_mod, score=True)(scores, *_flat(at)).to(dtype)
    return _softmax(scores.masked_fill(~allowed, -torch.inf), v, sinks, _kept(at, dropout_p, seed, dtype))


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> State:
    """`attention` over packed sequences, one after the other; options that depend on the sequence are not taken."""
    outs, lses = [], []
    for i in range(len(cu_seqlens_q) - 1):
        queries = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        state = attention(q[None, queries], k[None, keys], v[None, keys], **options)
        outs.append(state.out[0])
        lses.append(state.lse[0])
    return State(torch.cat(outs), torch.cat(lses, dim=-1))


def _softmax(scores: Tensor, v: Tensor, sinks: Tensor | None, kept: Tensor | None) -> State:
    """Softmax and weighted sum; a row with nothing to see has out 0 and lse -inf, and passes no gradient."""
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
        v = torch.cat((v, torch.zeros_like(v[:, :, :1]) if v.shape[2] else v.new_zeros(*v.shape[:2], 1, v.shape[3])), 2)
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    safe = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(safe, dim=-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    weights = torch.softmax(safe, dim=-1).masked_fill(empty, 0.0)
    if kept is not None:
        extra = weights.shape[-1] - kept.shape[-1]
        weights = weights * torch.nn.functional.pad(kept, (0, extra), value=0.0)
    return State((weights @ v).transpose(1, 2), lse.masked_fill(empty[..., 0], -torch.inf))


def _everywhere(q: Tensor, k: Tensor) -> At:
    """Every index of the problem, broadcastable to (batch, heads, seqlen_q, seqlen_kv)."""
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    index = [torch.arange(n, device=q.device).view(shape) for n, shape in zip(sizes, shapes, strict=True)]
    return At(index[0], index[1], index[2], index[3], k.shape[2] - q.shape[2])


def _allowed(at: At, causal: bool, window: Any, mask: Any, block_mask: Any, alignment: masks.Alignment) -> Tensor:
    allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=at.key.device)
    diagonal = at.aligned(alignment)
    if causal:
        allowed = allowed & (at.key <= diagonal)
    if window is not None:
        left, right = window
        allowed = allowed & (at.key >= diagonal - left) if left is not None else allowed
        allowed = allowed & (at.key <= diagonal + right) if right is not None else allowed
    if isinstance(mask, Mask):
        allowed = allowed & mask_nodes.parse(mask.token).allows(at, mask.tensors)
    elif isinstance(mask, Tensor):
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & _vmapped(mask, score=False)(*_flat(at))
    if block_mask is not None:
        blocks = masks.from_block_mask(block_mask)
        allowed = allowed & mask_nodes.parse(blocks.token).allows(at, blocks.tensors)
    return allowed


def _kept(at: At, dropout_p: float, seed: int | Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if not dropout_p:
        return None
    if seed is None:
        raise ValueError("seed: got None, need the seed that the compared call used")
    seed = torch.as_tensor(seed, dtype=torch.int64, device=at.key.device)
    kept = dropout.keep(seed, dropout_p, at.batch, at.head, at.query, range(at.key.numel()))
    return kept.to(dtype) / (1 - dropout_p)


def _flat(at: At) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return at.batch.flatten(), at.head.flatten(), at.query.flatten(), at.key.flatten()


def _vmapped(function: Callable[..., Any], score: bool) -> Callable[..., Tensor]:
    """The function of single indices, mapped over batch, heads, queries and keys; `score`: it takes a score first."""
    first = (0,) if score else ()

    def call(*arguments: Tensor) -> Tensor:
        with _IndexByTensor():
            return torch.as_tensor(function(*arguments))

    mapped: Callable[..., Tensor] = call
    for position in (3, 2, 1, 0):
        index = [0 if place == position else None for place in range(4)]
        mapped = torch.vmap(mapped, in_dims=(*first, *index))

    def unless_empty(*arguments: Tensor) -> Tensor:
        # torch.vmap does not run over no index at all; there is nothing to change or to allow then.
        if all(index.numel() for index in arguments[-4:]):
            return mapped(*arguments)
        return arguments[0] if score else torch.ones((1, 1, 1, 1), dtype=torch.bool, device=arguments[0].device)

    return unless_empty


class _IndexByTensor(TorchFunctionMode):
    """Lets `table[h, q_idx]` index by mapped 0-d tensors, which PyTorch would otherwise try to read as numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, Tensor) for part in index) and all(isinstance(p, (Tensor, int)) for p in index):
                parts = [torch.as_tensor(part, device=args[0].device) for part in index]
                return torch.ops.aten.index(args[0], parts)
        return func(*args, **(kwargs or {}))
