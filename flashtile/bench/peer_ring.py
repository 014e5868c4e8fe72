"""The ring that others run: the scheme of ring-flash-attn (zig-zag) on PyTorch's own flash operator, for comparison.

Keys and values hop from neighbour to neighbour, every hop sent while a step computes; States are merged in float32 in
PyTorch; backward the float32 gradients of keys and values travel along, one hop behind. Causal, equal heads, tensors
(batch, tokens, heads, headdim).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_aten = torch.ops.aten


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Any]:
    """(out, lse, what the backward pass needs beside)."""
    given = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    if q.is_cuda:
        out, lse, cum_q, cum_k, max_q, max_k, *rng, _ = _aten._scaled_dot_product_flash_attention(*given, 0.0, causal)
        return out.transpose(1, 2), lse, (cum_q, cum_k, max_q, max_k, *rng)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, causal)
    return out.transpose(1, 2), lse, ()


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, rest: Any
) -> Sequence[Tensor]:
    """(dq, dk, dv) of a block, given the whole's out and lse; `rest`: as `_flash` returned it, of any block."""
    given = [tensor.transpose(1, 2) for tensor in (grad_out, q, k, v, out)]
    if q.is_cuda:
        cum_q, cum_k, _, _, *rng = rest
        lengths = (q.shape[1], k.shape[1])
        found = _aten._scaled_dot_product_flash_attention_backward(
            *given, lse.contiguous(), cum_q, cum_k, *lengths, 0.0, causal, *rng
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse.contiguous(), 0.0, causal)
    return [tensor.transpose(1, 2) for tensor in found]


class _Hop:
    """One hop of tensors to the next rank of the ring."""

    def __init__(self, tensors: Sequence[Tensor], group: Any) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.leaving = [tensor.contiguous() for tensor in tensors]
        self.arriving = [torch.empty_like(tensor) for tensor in self.leaving]
        onward, back = (rank + 1) % ranks, (rank - 1) % ranks
        operations = [dist.P2POp(dist.isend, tensor, onward, group, place) for place, tensor in enumerate(self.leaving)]
        operations += [dist.P2POp(dist.irecv, tensor, back, group, place) for place, tensor in enumerate(self.arriving)]
        self.works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.arriving


def _block(rank: int, step: int, tokens: int) -> tuple[slice, slice, bool]:
    """(queries, keys, causal) of a step."""
    if step == 0:
        return slice(0, tokens), slice(0, tokens), True
    if step <= rank:
        return slice(0, tokens), slice(0, tokens // 2), False
    return slice(tokens // 2, tokens), slice(0, tokens), False


class PeerRing(torch.autograd.Function):
    """Causal attention; out of this rank's tokens, in the zig-zag layout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Any = None) -> Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        out: Any = None
        lse: Any = None
        here = [k, v]
        for step in range(ranks):
            hop = _Hop(here, group) if step + 1 < ranks else None
            rows, keys, causal = _block(rank, step, q.shape[1])
            block, block_lse, rest = _flash(q[:, rows], here[0][:, keys], here[1][:, keys], causal)
            column = block_lse.transpose(1, 2).unsqueeze(-1)
            if step == 0:
                out, lse, ctx.rest = block.float(), column, rest
            else:
                before, before_lse = out[:, rows], lse[:, rows]
                out[:, rows] = before - torch.sigmoid(column - before_lse) * (before - block)
                lse[:, rows] = before_lse - torch.nn.functional.logsigmoid(before_lse - column)
            here = here if hop is None else hop.wait()
        result = out.to(q.dtype)
        ctx.group = group
        ctx.save_for_backward(q, k, v, result, lse.squeeze(-1).transpose(1, 2).contiguous())
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, grad_out = ctx.group, grads[0]
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        here, totals = [k, v], [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v)]
        behind: _Hop | None = None
        for step in range(ranks):
            hop = _Hop(here, group) if step + 1 < ranks else None
            rows, keys, causal = _block(rank, step, q.shape[1])
            given = (q[:, rows], here[0][:, keys], here[1][:, keys], out[:, rows], lse[:, :, rows])
            found = _flash_backward(grad_out[:, rows], *given, causal, ctx.rest)
            totals = totals if behind is None else behind.wait()
            dq[:, rows] += found[0]
            for total, part in zip(totals, found[1:], strict=True):
                total[:, keys] += part
            here = here if hop is None else hop.wait()
            behind = _Hop(totals, group)
        totals = totals if behind is None else behind.wait()
        return dq.to(q.dtype), totals[0].to(k.dtype), totals[1].to(v.dtype), None
