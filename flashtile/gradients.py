"""The backward pass by itself, for callers whose own autograd formula holds what the forward pass returned.

PyTorch's operators and flash-attn's `_flash_attn_backward` come in pairs, forward and backward, joined by (out, lse).
"""

from typing import Any

import torch
from torch import Tensor

from flashtile import autograd
from flashtile.request import Arguments, Packing, build

SOURCES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
"""What may have a gradient, in the order of `gradients`."""


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    grad_lse: Tensor | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> Any:
    """Gradients of `attention`, or with `packing` of `attention_varlen`, from what it returned with return_lse.

    Args:
        q, k, v, options: as the forward call got them; options that draw random numbers need their `seed`.
        out, lse: what the forward call returned.
        grad_out, grad_lse: the gradients of out and lse, in their shapes.

    Returns:
        Those of `SOURCES`; of the latter three where the tensor requires one, else None.
    """
    inputs, settings = build(q.detach(), k.detach(), v.detach(), Arguments(**options), packing)
    with torch.no_grad():
        call = autograd.Call.of(inputs, settings)
        found: Any = autograd.run_backward(inputs, call, (out.detach(), lse.detach()), (grad_out, grad_lse))
    return tuple(found[: len(SOURCES)])
