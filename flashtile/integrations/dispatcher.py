"""`activate_sdpa`: flashtile's kernels behind PyTorch's own flash-attention operators.

PyTorch offers a registry for this (`torch.nn.attention.register_flash_attention_impl`). An implementation overrides
`aten::_scaled_dot_product_flash_attention` and its backward pass for one device, below autograd, so that eager code,
autograd and compiled graphs all reach it, wherever they come from.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from flashtile.api import attention
from flashtile.check import guests as check
from flashtile.gradients import gradients

NAME = "flashtile"
_TAKEN = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# flashtile's CPU backend itself calls the operator that is overridden: calls from inside go to the original.
_inside = threading.local()


class _Operators(NamedTuple):
    """The pair of operators of a device. `alignment`: where its causal diagonal starts."""

    forward: str
    backward: str
    alignment: str


_OPERATORS = {
    "cuda": _Operators(
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward", "bottom_right"
    ),
    "cpu": _Operators(
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "top_left",
    ),
}


def activate_sdpa(device: str = "cuda") -> None:
    """Puts flashtile behind PyTorch's flash-attention operator, until `deactivate_sdpa` or another activation.

    From then on every call of `scaled_dot_product_attention` that PyTorch sends to its flash operator runs here:
    from eager code, under autograd and from compiled graphs, in transformers, diffusers and everywhere else. On a GPU
    PyTorch sends calls in float16 or bfloat16 without attn_mask and without dropout there; other calls stay as they
    are (`replace_sdpa` catches masked ones). Calls that flashtile does not take run PyTorch's own kernel.

    Args:
        device: "cuda" (NVIDIA and AMD), or "cpu": PyTorch's CPU operator, to try the same route without a GPU.

    Raises:
        NotImplementedError: this PyTorch has no registry of flash-attention implementations.
        ValueError: the device is not one of the two.

    PyTorch warns once that an operator's kernel is overridden. That is what is meant to happen.
    """
    check.sdpa_device(device, tuple(_OPERATORS))
    check.has_flash_registry(torch.nn.attention)
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=lambda: _Overrides(device))
    torch.nn.attention.activate_flash_attention_impl(NAME)


def deactivate_sdpa() -> None:
    """Gives PyTorch's flash-attention operators back to PyTorch, if flashtile has them."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    if current is not None and current() == NAME:
        torch.nn.attention.restore_flash_attention_impl()


class _Overrides:
    """The overridden operators of a device; PyTorch's registry keeps this and calls `remove`."""

    def __init__(self, device: str) -> None:
        names = _OPERATORS[device]
        key = "CUDA" if device == "cuda" else "CPU"
        self.library: Any = torch.library.Library("aten", "IMPL")
        forward, backward = _cuda(names.alignment) if device == "cuda" else _cpu(names.alignment)
        for name, ours in ((names.forward, forward), (names.backward, backward)):
            original = torch.library.get_kernel(f"aten::{name}", key)
            self.library.impl(name, _unless_refused(ours, original), key, with_keyset=True)

    def remove(self) -> None:
        self.library = None


def _unless_refused(ours: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """`ours`, or the kernel that PyTorch had there: if we call it ourselves, or where `ours` gives None."""

    def kernel(keys: Any, *arguments: Any, **options: Any) -> Any:
        if not getattr(_inside, "flashtile", False):
            _inside.flashtile = True
            try:
                found = ours(*arguments, **options)
            finally:
                _inside.flashtile = False
            if found is not None:
                return found
        return original.call_boxed(keys, *arguments, **options)

    return kernel


def _takes(query: Tensor, value: Tensor, dropout_p: float) -> bool:
    return dropout_p == 0 and query.dtype in _TAKEN[query.device.type] and query.shape[-1] == value.shape[-1]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, alignment: Any, mask: Any = None
) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with torch.no_grad():
        out, lse = attention(q, k, v, causal=is_causal, bias=mask, scale=scale, alignment=alignment, return_lse=True)
    return _stored_as(query, out.transpose(1, 2)), lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float | None,
    alignment: Any,
) -> list[Tensor]:
    q, k, v, out, grad_out = (tensor.transpose(1, 2) for tensor in (query, key, value, out, grad_out))
    options: dict[str, Any] = {"causal": is_causal, "scale": scale, "alignment": alignment}
    found = gradients(q, k, v, out, lse, grad_out, **options)
    return [gradient.transpose(1, 2) for gradient in found[:3]]


def _stored_as(pattern: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with the strides that the operator's fake kernel promises, those of `pattern`; a copy if it must be."""
    empty = torch.empty_like(pattern)
    return tensor if tensor.stride() == empty.stride() else empty.copy_(tensor)


def _cuda(alignment: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        if return_debug_mask or not _takes(query, value, dropout_p):
            return None
        out, lse = _forward(query, key, value, is_causal, scale, alignment)
        # What follows is the state of a random generator that nobody drew from.
        state, offset = (torch.zeros(size, dtype=torch.uint64, device=query.device) for size in ((2,), ()))
        return out, lse, None, None, query.shape[2], key.shape[2], state, offset, query.new_empty(0)

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Any,
        philox_offset: Any,
        *,
        scale: float | None = None,
    ) -> Any:
        if not _takes(query, value, dropout_p):
            return None
        found = _backward(grad_out, query, key, value, out, logsumexp, is_causal, scale, alignment)
        return tuple(map(_stored_as, (query, key, value), found))

    return forward, backward


def _cpu(alignment: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        if attn_mask is not None or not _takes(query, value, dropout_p):
            return None
        out, lse = _forward(query, key, value, is_causal, scale, alignment)
        # This operator stores its log-sum-exps (batch, seqlen, heads).
        return out, lse.transpose(1, 2).contiguous().transpose(1, 2)

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        if attn_mask is not None or not _takes(query, value, dropout_p):
            return None
        # (batch, heads, seqlen, headdim) over (batch, seqlen, heads, headdim) is how this operator stores gradients.
        return tuple(_backward(grad_out, query, key, value, out, logsumexp, is_causal, scale, alignment))

    return forward, backward
