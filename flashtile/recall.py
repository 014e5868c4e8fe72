"""Calls that were made before, so that a call which differs in addresses alone is neither checked nor planned again.

What a call is known by holds everything that checks and plans look at; of a function, what it was traced to and the
tensors that it captures now; of dropout, that there is a seed.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from flashtile import autograd, sharding, trace
from flashtile.forgetting import make_room
from flashtile.masks import Mask, from_block_mask
from flashtile.problem import Inputs
from flashtile.request import SIXTEEN, Arguments, Packing, autocast, build, eight_of, mask_value, seed_of
from flashtile.scaled import Scaled

_KEPT = 4096
SIMPLE = frozenset((type(None), bool, int, float, str, tuple, torch.dtype))
_VALUES = Arguments._fields.index("mask")
"""How many of the arguments are plain values."""
_NO_MASK = Mask("")
_NO_SCORE = trace.Lifted("", ())
_UNKNOWN = (None, None)
_known: dict[Any, autograd.Call] = {}


def attention(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None = None) -> Any:
    """(out, lse) of the call."""
    if sharding.current is not None and not arguments.sharding:
        sharded = sharding.current.attend(q, k, v, arguments, packing)
        if sharded is not None:
            return sharded
    if type(q) not in autograd.PLAIN and hasattr(q, "device_mesh"):
        from flashtile import dtensors

        return dtensors.attention(q, k, v, arguments, packing)
    key, inputs = _find(q, k, v, arguments, packing)
    call = _known.get(key)
    if call is not None:
        if arguments.dropout_p:
            # Drawn once a call, and not before it is known that nobody else draws it.
            inputs = inputs._replace(seed=seed_of(arguments, inputs.q))
        return autograd.eager(inputs, call)
    inputs, options = build(q, k, v, arguments, packing)
    if not autograd.plainly_eager(inputs):
        return autograd.attention(inputs, options)
    call = autograd.Call.of(inputs, options)
    if key is not None:
        keep(_known, key, call)
    return autograd.eager(inputs, call)


def _find(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None) -> tuple[Any, Any]:
    """(all that decides what the call comes to, beside its tensors; these); (None, None): that cannot be said of it."""
    eight = SIXTEEN
    if type(q) is Scaled and type(k) is Scaled and type(v) is Scaled:
        eight = eight_of(q, k, v)
        q, k, v = q.data, k.data, v.data
    if autograd.watched() or type(q) not in autograd.PLAIN or not worth_it(q):
        return _UNKNOWN
    if torch._C._is_any_autocast_enabled() and not eight.tensors:
        if type(k) not in autograd.PLAIN or type(v) not in autograd.PLAIN:
            return _UNKNOWN
        q, k, v = autocast(q), autocast(k), autocast(v)
    given: tuple[Any, ...] = arguments
    values, (allowed, blocks, score_mod, bias, slopes, sinks, seed) = given[:_VALUES], given[_VALUES:]
    offsets: tuple[Any, ...] = (None, None, None, None)
    if packing is not None:
        offsets, values = packing[:4], values + packing[4:]
    window = arguments.window
    kinds = (*map(type, values), *(map(type, window) if type(window) is tuple else ()))
    if not SIMPLE.issuperset(kinds):
        return _UNKNOWN
    mask = _NO_MASK if allowed is None and blocks is None else _mask(allowed, blocks)
    if mask is None:
        return _UNKNOWN
    score = _NO_SCORE if score_mod is None else trace.lift(score_mod, "score")
    drawn = None if type(seed) is int and -(2**63) <= seed < 2**63 else seed
    tensors = layouts((q, k, v, *offsets, bias, slopes, sinks, drawn, *mask.tensors, *score.tensors, *eight.tensors))
    if tensors is None:
        return _UNKNOWN
    made_for = None if blocks is None else getattr(blocks, "seq_lengths", None)
    switches = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), packing is None, type(seed))
    key = (tensors, values, kinds, mask.token, score.key, switches, made_for, eight[1:])
    inputs = (q, k, v, *offsets, bias, slopes, sinks, None, mask.tensors, score.tensors, eight.tensors)
    return key, Inputs._make(inputs)


def _mask(allowed: Any, blocks: Any) -> Mask | None:
    """What the arguments `mask` and `block_mask` come to; None: not what they should be."""
    mask = _NO_MASK if allowed is None else mask_value(allowed)
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


_look = attrgetter("layout", "shape", "dtype", "device", "requires_grad")


def layouts(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
    """What tensors are, of their addresses the alignment alone; None: one is more than a tensor, or has no address."""
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) not in autograd.PLAIN:
            return None
        seen = _look(tensor)
        if seen[0] is not torch.strided:
            return None
        found.append((seen, tensor.stride(), tensor.data_ptr() & 15))
    return tuple(found)
