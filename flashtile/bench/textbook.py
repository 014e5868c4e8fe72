"""The textbook formula in plain PyTorch: what a model without flash attention runs, scores matrix and all."""

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, allowed: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(headdim)) v in the inputs' dtype; every tensor is (batch, heads, seqlen, headdim).

    `allowed`: bool, True for "may attend"; `added`: joins the scores; both broadcast to (batch, heads, seqlen, seqlen).
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # Scaling the queries instead of the scores spares one pass over the matrix.
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if added is not None:
        scores = scores + added
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        allowed = seen if allowed is None else allowed & seen
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v
