"""Calls that were made before, so that a call which differs in addresses alone is neither checked nor planned again.

What a call is known by holds everything that checks and plans look at. Calls with functions, with masks that hold
tensors, with dropout and under autocast are not kept: what those depend on is not all written on their arguments.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from flashtile import autograd
from flashtile.masks import Mask
from flashtile.problem import Inputs
from flashtile.request import Arguments, Packing, build

_KEPT = 4096
_SIMPLE = frozenset((type(None), bool, int, float, str, tuple, torch.dtype))
_values = attrgetter(
    "causal", "window", "block_mask", "score_mod", "softcap", "scale", "alignment", "out_dtype", "return_lse",
    "deterministic", "backend",
)  # fmt: skip
_known: dict[Any, autograd.Call] = {}


def attention(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, packing: Packing | None = None) -> Any:
    """(out, lse) of the call."""
    key = None if autograd.watched() else _key(q, k, v, arguments, packing)
    if key is not None and (call := _known.get(key)) is not None:
        return autograd.eager(_inputs(q, k, v, arguments, packing), call)
    inputs, options = build(q, k, v, arguments, packing)
    if not autograd.plainly_eager(inputs):
        return autograd.attention(inputs, options)
    call = autograd.Call.of(inputs, options)
    if key is not None:
        while len(_known) >= _KEPT:
            _known.pop(next(iter(_known)), None)
        _known[key] = call
    return autograd.eager(inputs, call)


def _worth_it(q: Tensor) -> bool:
    """Beside a GPU's work the host's time counts; on the CPU it is little of a call, and lengths can be checked."""
    return q.is_cuda


def _inputs(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, packing: Packing | None) -> Inputs:
    """What `build` makes of a call that has a `_key`."""
    offsets = (None,) * 4 if packing is None else packing[:4]
    return Inputs(*(q, k, v, *offsets, arguments.bias, arguments.alibi_slopes, arguments.sinks))


def _key(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, packing: Packing | None) -> Any:
    """All that decides what the call comes to; None: that cannot be said of it."""
    if type(q) not in autograd.PLAIN or not _worth_it(q) or torch.is_autocast_enabled(q.device.type):
        return None
    if arguments.dropout_p or arguments.seed is not None:
        return None
    tensors: tuple[Tensor | None, ...] = (q, k, v, arguments.bias, arguments.alibi_slopes, arguments.sinks)
    mask = arguments.mask
    values = (mask.token if type(mask) is Mask and not mask.tensors else mask, *_values(arguments))
    if packing is not None:
        tensors += packing[:4]
        values += packing[4:]
    kinds = tuple(map(type, values))
    if not _SIMPLE.issuperset(kinds):
        return None
    layouts: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            layouts.append(None)
        elif type(tensor) in autograd.PLAIN:
            layouts.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad))
        else:
            return None
    window = arguments.window
    if type(window) is tuple and not _SIMPLE.issuperset(map(type, window)):
        return None
    switches = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), packing is None)
    return (*layouts, *values, *kinds, *switches)
