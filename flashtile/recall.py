"""Calls that were made before, so that a call which differs in addresses alone is neither checked nor planned again.

What a call is known by holds everything that checks and plans look at; of a function, what it was traced to and the
tensors that it captures now. Calls with dropout, with a BlockMask and under autocast are not kept.
"""

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import autograd, sharding, trace
from flashtile.forgetting import make_room
from flashtile.masks import Mask
from flashtile.problem import Inputs
from flashtile.request import Arguments, Packing, build, eight_of, mask_value

_KEPT = 4096
SIMPLE = frozenset((type(None), bool, int, float, str, tuple, torch.dtype))
_values = attrgetter(
    "causal",
    "window",
    "softcap",
    "scale",
    "alignment",
    "out_dtype",
    "return_lse",
    "deterministic",
    "batch_invariant",
    "backend",
    "sharding",
)
_NO_MASK = Mask("")
_NO_SCORE = trace.Lifted("", ())
_known: dict[Any, autograd.Call] = {}


class _Found(NamedTuple):
    """A call as the operators take it, and what it is known by (None: it is not kept)."""

    key: Any
    inputs: Inputs


def attention(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None = None) -> Any:
    """(out, lse) of the call."""
    if sharding.current is not None and not arguments.sharding:
        sharded = sharding.current.attend(q, k, v, arguments, packing)
        if sharded is not None:
            return sharded
    if type(q) not in autograd.PLAIN and hasattr(q, "device_mesh"):
        from flashtile import dtensors

        return dtensors.attention(q, k, v, arguments, packing)
    found = _find(q, k, v, arguments, packing)
    if found is not None and (call := _known.get(found.key)) is not None:
        return autograd.eager(found.inputs, call)
    inputs, options = build(q, k, v, arguments, packing)
    if not autograd.plainly_eager(inputs):
        return autograd.attention(inputs, options)
    call = autograd.Call.of(inputs, options)
    if found is not None:
        keep(_known, found.key, call)
    return autograd.eager(inputs, call)


def _find(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None) -> _Found | None:
    """All that decides what the call comes to, beside its tensors; None: that cannot be said of it."""
    eight = eight_of(q, k, v)
    if eight.tensors:
        q, k, v = q.data, k.data, v.data
    if autograd.watched() or type(q) not in autograd.PLAIN or not worth_it(q):
        return None
    if torch.is_autocast_enabled(q.device.type) or arguments.dropout_p:
        return None
    if arguments.seed is not None or arguments.block_mask is not None:
        return None
    values = _values(arguments)
    offsets: tuple[Tensor | None, ...] = (None, None, None, None)
    if packing is not None:
        offsets = packing[:4]
        values += packing[4:]
    kinds = tuple(map(type, values))
    if not SIMPLE.issuperset(kinds) or not SIMPLE.issuperset(map(type, arguments.window or ())):
        return None
    mask = _NO_MASK if arguments.mask is None else mask_value(arguments.mask)
    score = _NO_SCORE if arguments.score_mod is None else trace.lift(arguments.score_mod, "score")
    beside = (arguments.bias, arguments.alibi_slopes, arguments.sinks)
    tensors = layouts((q, k, v, *offsets, *beside, *mask.tensors, *score.tensors, *eight.tensors))
    if tensors is None:
        return None
    switches = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), packing is None)
    key = (tensors, values, kinds, mask.token, score.key, switches, eight[1:])
    bias, slopes, sinks = beside
    cu_q, cu_k, used_q, used_k = offsets
    lists = (mask.tensors, score.tensors, eight.tensors)
    inputs = Inputs(q, k, v, cu_q, cu_k, used_q, used_k, bias, slopes, sinks, None, *lists)
    return _Found(key, inputs)


def keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Puts it in; the oldest make room."""
    make_room(known, _KEPT)
    known[key] = value


def worth_it(q: Tensor) -> bool:
    """Beside a GPU's work the host's time counts; on the CPU it is little of a call, and lengths can be checked."""
    return q.is_cuda


def layouts(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
    """What tensors are, of their addresses the alignment alone; None: one is more than a tensor."""
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) in autograd.PLAIN:
            kind = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.data_ptr() & 15)
            found.append((tensor.shape, tensor.stride(), *kind))
        else:
            return None
    return tuple(found)
