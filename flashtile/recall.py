"""Calls that were made before, so that a call which differs in addresses alone is neither checked nor planned again.

What a call is known by holds everything that checks and plans look at; of a function, what it was traced to and the
tensors that it captures now; of dropout, that there is a seed.
"""

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import autograd, sharding, trace
from flashtile.forgetting import make_room
from flashtile.masks import Mask, from_block_mask
from flashtile.problem import Inputs
from flashtile.request import Arguments, Packing, autocast, build, eight_of, mask_value, seed_of

_KEPT = 4096
SIMPLE = frozenset((type(None), bool, int, float, str, tuple, torch.dtype))
_values = attrgetter(
    "causal",
    "window",
    "softcap",
    "scale",
    "dropout_p",
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
        inputs = found.inputs
        if arguments.dropout_p:
            # Drawn once a call, and not before it is known that nobody else draws it.
            inputs = inputs._replace(seed=seed_of(arguments, inputs.q))
        return autograd.eager(inputs, call)
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
    if not eight.tensors and torch.is_autocast_enabled(q.device.type):
        if type(k) not in autograd.PLAIN or type(v) not in autograd.PLAIN:
            return None
        q, k, v = autocast(q), autocast(k), autocast(v)
    values = _values(arguments)
    offsets: tuple[Tensor | None, ...] = (None, None, None, None)
    if packing is not None:
        offsets = packing[:4]
        values += packing[4:]
    window, seed = arguments.window, arguments.seed
    kinds = (*map(type, values), *(map(type, window) if type(window) is tuple else ()))
    if not SIMPLE.issuperset(kinds):
        return None
    given: Any = None if type(seed) is int and -(2**63) <= seed < 2**63 else seed
    mask = _mask(arguments)
    if mask is None:
        return None
    score = _NO_SCORE if arguments.score_mod is None else trace.lift(arguments.score_mod, "score")
    beside = (arguments.bias, arguments.alibi_slopes, arguments.sinks)
    tensors = layouts((q, k, v, *offsets, *beside, given, *mask.tensors, *score.tensors, *eight.tensors))
    if tensors is None:
        return None
    made_for = None if arguments.block_mask is None else getattr(arguments.block_mask, "seq_lengths", None)
    switches = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), packing is None, type(seed))
    key = (tensors, values, kinds, mask.token, score.key, switches, made_for, eight[1:])
    bias, slopes, sinks = beside
    cu_q, cu_k, used_q, used_k = offsets
    lists = (mask.tensors, score.tensors, eight.tensors)
    inputs = Inputs(q, k, v, cu_q, cu_k, used_q, used_k, bias, slopes, sinks, None, *lists)
    return _Found(key, inputs)


def _mask(arguments: Arguments) -> Mask | None:
    """What the arguments `mask` and `block_mask` come to; None: not what they should be."""
    mask = _NO_MASK if arguments.mask is None else mask_value(arguments.mask)
    blocks = arguments.block_mask
    if blocks is None:
        return mask
    if not (hasattr(blocks, "kv_num_blocks") and hasattr(blocks, "mask_mod")):
        return None
    return mask & from_block_mask(blocks)


def keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Puts it in; the oldest make room."""
    make_room(known, _KEPT)
    known[key] = value


def worth_it(q: Tensor) -> bool:
    """Beside a GPU's work the host's time counts; on the CPU it is little of a call, and lengths can be checked."""
    return q.is_cuda


def layouts(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
    """What tensors are, of their addresses the alignment alone; None: one is more than a tensor, or has no address."""
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) in autograd.PLAIN and tensor.layout is torch.strided:
            kind = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.data_ptr() & 15)
            found.append((tensor.shape, tensor.stride(), *kind))
        else:
            return None
    return tuple(found)
