"""`sdpa`: PyTorch's scaled_dot_product_attention, and two ways to put it in PyTorch's place."""

import logging
import math
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashtile.api import attention

logger = logging.getLogger("flashtile")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the same arguments and the same meaning.

    What flashtile does not take (see `refusal`), invalid calls included, goes to PyTorch's own function, so that its
    results and its errors are PyTorch's; the logger "flashtile" says so at level INFO.

    Args:
        query: (..., heads, seqlen_q, headdim), any number of leading dimensions, none of them needed.
        key: (..., heads_kv, seqlen_kv, headdim); value: (..., heads_kv, seqlen_kv, headdim_v). Leading dimensions
            broadcast; heads too, unless enable_gqa is set.
        attn_mask: broadcasts to (..., heads, seqlen_q, seqlen_kv). bool: True where a query may attend. Floating: is
            added to the scaled scores; its gradient is computed and has its shape.
        dropout_p: probability of dropping a weight, always applied.
        is_causal: query i sees keys 0 to i (the diagonal starts at the top left); not together with attn_mask.
        scale: multiplies query key^T; default headdim ** -0.5.
        enable_gqa: heads may be a multiple of heads_kv.

    Returns:
        (..., heads, seqlen_q, headdim_v), with heads and sequence stored as a layer's output projection wants them:
        `.transpose(-3, -2).flatten(-2)` is a view.

    A query that sees no key gets 0. More than one leading dimension is folded into one, which copies a tensor only if
    its strides do not allow it; a mask that varies along some of them is expanded.
    """
    reason = refusal(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if reason is not None:
        if not torch.compiler.is_compiling():
            logger.info("scaled_dot_product_attention is left to PyTorch: %s", reason)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rank = query.ndim
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    q, k, v = (_four_dimensions(tensor, leading) for tensor in _heads(query, key, value))
    mask = attn_mask if attn_mask is None or rank <= 4 else _folded(attn_mask, leading)
    boolean = mask is not None and mask.dtype is torch.bool
    out = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=is_causal,
        mask=mask if boolean else None,
        bias=None if boolean else mask,
        scale=scale,
        dropout_p=dropout_p,
        alignment="top_left",
    ).transpose(1, 2)
    if rank > 4:
        return out.unflatten(0, leading)
    return out if rank == 4 else out[0] if rank == 3 else out[0, 0]


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why a call is left to PyTorch, which may refuse it too; None: flashtile takes it. Arguments as for `sdpa`."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(isinstance(tensor, Tensor) and tensor.layout is torch.strided for tensor in tensors):
        return "not all of query, key, value and attn_mask are strided tensors"
    if any(tensor.is_nested for tensor in tensors):
        return "a tensor is nested"
    # The module of this class loads PyTorch's compiler, so it is known by what it does.
    if hasattr(attn_mask, "_materialize"):
        return "attn_mask is a CausalBias, which has an attention of its own"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"the dtypes are {query.dtype}, {key.dtype} and {value.dtype}"
    if any(tensor.device != query.device for tensor in tensors):
        return "the tensors are on several devices"
    # A compiler may have made the scale a symbol, which math.isfinite does not take.
    if not 0 <= dropout_p < 1 or not (scale is None or scale - scale == 0):
        return f"dropout_p is {dropout_p} and scale is {scale}"
    return _shapes_refused(query, key, value, enable_gqa) or _mask_refused(query, key, value, attn_mask, is_causal)


def _shapes_refused(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> str | None:
    shapes = f"the shapes are {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim >= (3 if grouped else 2):
        return shapes
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1] or 0 in (key.shape[-1], value.shape[-1]):
        return shapes
    if not _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3]):
        return shapes
    if query.ndim == 2:
        return None
    heads, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if 0 in (heads, heads_k, heads_v):
        return shapes
    if grouped:
        return None if heads_k == heads_v and heads % heads_k == 0 else shapes
    return None if _broadcast((heads,), (heads_k,), (heads_v,)) else shapes


def _mask_refused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> str | None:
    if mask is None:
        return None
    if is_causal:
        return "attn_mask and is_causal are both given"
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {mask.dtype}"
    heads = max(tensor.shape[-3] if tensor.ndim > 2 else 1 for tensor in (query, key, value))
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    scores = (*leading, heads, query.shape[-2], key.shape[-2])[-query.ndim :]
    fits = mask.ndim <= len(scores) and all(
        size in (1, full) for size, full in zip(mask.shape, scores[len(scores) - mask.ndim :], strict=True)
    )
    return None if fits else f"attn_mask has shape {tuple(mask.shape)}, the scores have {scores}"


def _broadcast(*shapes: Sequence[int]) -> bool:
    """Whether shapes of one length broadcast to each other."""
    return all(all(size in (1, max(sizes)) for size in sizes) for sizes in zip(*shapes, strict=True))


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value with heads that `attention` takes: one head may serve many only in key and value alike."""
    if query.ndim == 2 or (key.shape[-3] == value.shape[-3] and query.shape[-3] % key.shape[-3] == 0):
        return query, key, value
    heads = max(query.shape[-3], key.shape[-3], value.shape[-3])
    q, k, v = (tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:]) for tensor in (query, key, value))
    return q, k, v


def _four_dimensions(tensor: Tensor, leading: Sequence[int]) -> Tensor:
    """(batch, heads, seqlen, headdim), a view where strides allow it."""
    if tensor.ndim < 4:
        return tensor[(None,) * (4 - tensor.ndim)]
    return tensor.expand(*leading, *tensor.shape[-3:]).flatten(0, len(leading) - 1)


def _folded(mask: Tensor, leading: Sequence[int]) -> Tensor:
    """A mask of more than four dimensions with the leading ones made one; one that varies along none stays small."""
    own = mask.shape[:-3]
    if math.prod(own) == 1:
        return mask.reshape(mask.shape[len(own) :])
    return mask.expand(*leading, *mask.shape[-3:]).flatten(0, len(leading) - 1)


def _functional() -> ModuleType:
    """torch.nn.functional with our function in PyTorch's place; a module, for the compiler looks names up in one."""
    module = ModuleType(f"{__name__}_functional")
    names = {name: value for name, value in vars(F).items() if name == "__builtins__" or not name.startswith("__")}
    vars(module).update({**names, "scaled_dot_product_attention": sdpa})
    sys.modules[module.__name__] = module
    return module


# Inside of this function the mode below is off, so that it would call PyTorch's attention: a copy calls ours.
_multi_head_attention_forward = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(_functional()),
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


class _Replacing(TorchFunctionMode):
    """Hands calls of PyTorch's function to `sdpa`. Inside of it the mode is off, so that the fallback ends there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return sdpa(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return _multi_head_attention_forward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def replace_sdpa() -> TorchFunctionMode:
    """A context in which this thread's calls of `torch.nn.functional.scaled_dot_product_attention` go to `sdpa`.

    Unlike `activate_sdpa` it also catches calls with a mask, calls in float32 and calls on the CPU, and reaches no
    further than the `with` block. `torch.nn.MultiheadAttention` and PyTorch's transformer layers go there too. It costs
    every PyTorch function called inside a little host time.

        with flashtile.replace_sdpa():
            model(...)
    """
    return _Replacing()
