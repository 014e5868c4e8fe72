"""Rung 4: the backward pass, by recomputation.

PyTorch's autograd would keep the weights of every tile for the backward pass, and the square would be back. Instead
keep only the output and one number a row, the lse: any tile of weights can be made again from them,

    P = exp(S - lse).

With the derivative of the softmax written out, each tile adds its part to three gradients:

    dV += P^T dO,    dP = dO V^T,    dS = P * (dP - delta),    dQ += dS K,    dK += dS^T Q,

where delta = rowsum(dO * O) is the share of the softmax's normalisation. That is five matrix products a tile, one of
them (the scores) for the second time, in exchange for memory that is linear in the length.

The lse is an output too, and it may have a gradient. Its derivative by a score is P, so it enters as
delta = rowsum(dO * O) - dlse: no other line changes.

Run me: python docs/ladder/rung4_backward.py [--quick]
"""

from collections.abc import Iterator, Sequence
from typing import Any

import rung1_naive
import rung3_online_softmax
import torch
from measure import Row, agree, inputs, main, row, trained
from torch import Tensor

import flashtile

TILE_Q, TILE_KV = 128, 128


class Attention(torch.autograd.Function):
    """Rung 3 forward, recomputation backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = rung3_online_softmax.attention(q, k, v, TILE_Q, TILE_KV)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # From here on (batch, heads, seqlen, headdim): views, nothing is copied.
        q, k, v, out, dout = (tensor.transpose(1, 2) for tensor in (*ctx.saved_tensors[:4], grad_out))
        lse = ctx.saved_tensors[4].unsqueeze(-1)
        delta = (dout * out).sum(dim=-1, keepdim=True) - grad_lse.unsqueeze(-1)
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i in range(0, q.shape[2], TILE_Q):
            rows = (slice(None), slice(None), slice(i, i + TILE_Q))
            for j in range(0, k.shape[2], TILE_KV):
                keys = (slice(None), slice(None), slice(j, j + TILE_KV))
                weights = torch.exp(scale * (q[rows] @ k[keys].mT) - lse[rows])
                grad_scores = weights * (dout[rows] @ v[keys].mT - delta[rows])
                dv[keys] += weights.mT @ dout[rows]
                dk[keys] += scale * (grad_scores.mT @ q[rows])
                dq[rows] += scale * (grad_scores @ k[keys])
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = Attention.apply(q, k, v)
    return out, lse


def check() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(300)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    dout, dlse = torch.randn(1, 300, 2, 64), torch.randn(1, 2, 300)
    found = torch.autograd.grad(attention(*leaves), leaves, (dout, dlse))
    wanted = torch.autograd.grad(tuple(flashtile.reference.attention(*exact)), exact, (dout.double(), dlse.double()))
    for name, mine, true in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        agree(name, mine, true)


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    for name, rung in (("formula, forward and backward", rung1_naive), ("recomputation", None)):
        for seqlen in seqlens:
            step = trained(lambda *qkv, rung=rung: (rung.attention if rung else attention)(*qkv)[0], inputs(seqlen))
            yield row(name, seqlen, step)


if __name__ == "__main__":
    main("Rung 4: the backward pass", check, measure)
