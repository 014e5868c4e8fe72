"""The backward pass by itself, for callers whose own autograd formula holds what the forward pass returned.

PyTorch's operators and flash-attn's `_flash_attn_backward` come in pairs, forward and backward, joined by (out, lse).
"""

from typing import Any

import torch
from torch import Tensor

from flashtile import autograd
from flashtile.request import Arguments, Packing, build


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attention`, or with `packing` of `attention_varlen`, from what it returned with return_lse.

    Args:
        q, k, v, options: as the forward call got them; options that draw random numbers need their `seed`.
        out, lse: what the forward call returned.
        grad_out: the gradient of out, in its shape.
    """
    inputs, settings = build(q.detach(), k.detach(), v.detach(), Arguments(**options), packing)
    with torch.no_grad():
        call = autograd.Call.of(inputs, settings)
        found: Any = autograd.run_backward(inputs, call, (out.detach(), lse.detach()), (grad_out, None))
    return found[0], found[1], found[2]
