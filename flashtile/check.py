"""Every error a user can meet: what the argument was, what is allowed, what to do. Checks exist only here."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile import mask_nodes, masks
from flashtile.problem import Inputs, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
ALIGNMENTS = ("bottom_right", "top_left")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor")


def _beside(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, need {q.device} as q; try {name}.to(q.device)")


def _floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: got {tensor.dtype}, need a floating-point tensor; try {name}.float()")


def qkv(q: Tensor, k: Tensor, v: Tensor, varlen: bool = False) -> None:
    """Types, ranks, dtypes, devices and sizes of q, k and v."""
    layout = "(total, heads, headdim)" if varlen else "(batch, seqlen, heads, headdim)"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _tensor(name, tensor)
        if tensor.ndim != (3 if varlen else 4):
            hint = "attention_varlen takes packed, attention batched tensors"
            raise ValueError(f"{name}: got shape {_shape(tensor)}, need {layout}; {hint}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {tensor.dtype}, need float16, bfloat16, float32 or float64; try {name}.float()"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, need {q.dtype} as q; try {name}.to(q.dtype)")
        _beside(name, tensor, q)
    if not varlen:
        for name, tensor in (("k", k), ("v", v)):
            if tensor.shape[0] != q.shape[0]:
                raise ValueError(f"{name}: got batch {tensor.shape[0]}, need {q.shape[0]} as q; try {name}.expand(...)")
    if v.shape[-3] != k.shape[-3]:
        raise ValueError(f"v: got {v.shape[-3]} keys, need {k.shape[-3]} as k; each key has one value")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v: got {v.shape[-2]} heads, need {k.shape[-2]} as k")
    if q.shape[-2] == 0 or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"k: got {k.shape[-2]} heads, need a divisor of q's {q.shape[-2]} heads (grouped-query attention)"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: got headdim {k.shape[-1]}, need {q.shape[-1]} as q; only v's may differ")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q, v: got headdims {q.shape[-1]} and {v.shape[-1]}, need at least 1")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, need True or False")


def deterministic(value: Any) -> None:
    if value is not None:
        flag("deterministic", value)


def alignment(value: Any) -> None:
    if value not in ALIGNMENTS:
        raise ValueError(f"alignment: got {value!r}, need 'bottom_right' or 'top_left'")


def window(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"window: got {value!r}, need a pair (left, right) of key counts, None for no limit")
    for side in value:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window: got {value!r}, need ints or None, as in (128, 0)")
        if side is not None and side < 0:
            raise ValueError(f"window: got {value!r}, need counts of 0 or more; None, not -1, means no limit")


def mask_argument(value: Any) -> None:
    if isinstance(value, Tensor):
        if value.dtype is not torch.bool:
            raise TypeError(
                f"mask: got a {value.dtype} tensor, need bool (True: may attend); additive masks go to the argument bias"
            )
        if value.ndim > 4:
            raise ValueError(
                f"mask: got shape {_shape(value)}, need one that broadcasts to (batch, heads, seqlen_q, seqlen_kv)"
            )
    elif hasattr(value, "kv_num_blocks"):
        raise TypeError("mask: got a FlexAttention BlockMask; hand it to the argument block_mask")
    elif not (value is None or isinstance(value, masks.Mask) or callable(value)):
        raise TypeError(
            f"mask: got {type(value).__name__}, need a flashtile.masks.Mask, a bool tensor or a function "
            "mask_mod(b, h, q_idx, kv_idx)"
        )


def block_mask(value: Any, q: Tensor, k: Tensor, varlen: bool) -> None:
    if value is None:
        return
    if not hasattr(value, "kv_num_blocks") or not hasattr(value, "mask_mod"):
        raise TypeError(f"block_mask: got {type(value).__name__}, need a FlexAttention BlockMask; masks go to mask")
    if varlen:
        raise NotImplementedError("block_mask: packed sequences have no block mask; try mask=block_mask.mask_mod")
    lengths = tuple(getattr(value, "seq_lengths", (q.shape[1], k.shape[1])))
    if lengths != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"block_mask: got one made for lengths {lengths}, need ({q.shape[1]}, {k.shape[1]}); make it anew with "
            "create_block_mask, or pass its function: mask=block_mask.mask_mod"
        )


def score_mod(value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"score_mod: got {type(value).__name__}, need a function score_mod(score, b, h, q_idx, kv_idx)")


def broadcasts(name: str, tensor: Tensor, sizes: Sequence[int], at_least: bool) -> None:
    """`at_least`: packed calls share one table, whose last two sizes may pass the sequence's."""
    shape = (1,) * (4 - tensor.ndim) + _shape(tensor)
    rules = (False, False, at_least, at_least)
    fits = len(shape) == 4 and all(
        size == 1 or size == full or (loose and size > full)
        for size, full, loose in zip(shape, sizes, rules, strict=True)
    )
    if not fits:
        wanted = "(batch, heads, seqlen_q, seqlen_kv)"
        raise ValueError(f"{name}: got shape {_shape(tensor)}, need one that broadcasts to {wanted} = {tuple(sizes)}")


def bias(value: Any, q: Tensor, k: Tensor, varlen: bool) -> None:
    if value is None:
        return
    _tensor("bias", value)
    _floating("bias", value)
    _beside("bias", value, q)
    if value.ndim > 4:
        raise ValueError(
            f"bias: got shape {_shape(value)}, need at most 4 dimensions (batch, heads, seqlen_q, seqlen_kv)"
        )
    if not varlen:
        broadcasts("bias", value, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), at_least=False)


def alibi_slopes(value: Any, q: Tensor, batch: int) -> None:
    if value is None:
        return
    _tensor("alibi_slopes", value)
    _floating("alibi_slopes", value)
    _beside("alibi_slopes", value, q)
    heads = q.shape[-2]
    if _shape(value) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: got shape {_shape(value)}, need (heads,) = ({heads},) or (batch, heads) = "
            f"({batch}, {heads})"
        )


def sinks(value: Any, q: Tensor) -> None:
    if value is None:
        return
    _tensor("sinks", value)
    _floating("sinks", value)
    _beside("sinks", value, q)
    if _shape(value) != (q.shape[-2],):
        raise ValueError(f"sinks: got shape {_shape(value)}, need (heads,) = ({q.shape[-2]},), one logit a query head")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, need a number")


def softcap(value: Any) -> None:
    if value is None:
        return
    _number("softcap", value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"softcap: got {value!r}, need a finite number of 0 or more (0 or None: no cap)")


def scale(value: Any) -> None:
    if value is None:
        return
    _number("scale", value)
    if not math.isfinite(value):
        raise ValueError(f"scale: got {value!r}, need a finite number (None: headdim ** -0.5)")


def dropout(dropout_p: Any, seed: Any, q: Tensor) -> None:
    _number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p!r}, need a probability in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: got a {seed.dtype} tensor of shape {_shape(seed)}, need one int64 number")
        _beside("seed", seed, q)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: got {type(seed).__name__}, need an int, an int64 tensor or None (drawn from torch's)")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, need one that fits in 64 bits")


def out_dtype(value: Any, q: Tensor) -> None:
    if value is not None and value not in (q.dtype, torch.float32):
        raise ValueError(f"out_dtype: got {value!r}, need None, q's dtype ({q.dtype}) or torch.float32")


def backend(value: Any, names: Sequence[str]) -> None:
    if value is not None and value not in names:
        known = ", ".join(repr(name) for name in names)
        raise ValueError(f"backend: got {value!r}, need None (the fastest that fits) or one of {known}")


def packing(q: Tensor, k: Tensor, lengths: dict[str, Any], max_seqlens: dict[str, Any]) -> None:
    """cu_seqlens_q, cu_seqlens_k and seqused_*: `lengths`; max_seqlen_*: `max_seqlens`. Reads no tensor."""
    sizes = {}
    for name, tensor in lengths.items():
        if tensor is None and name.startswith("seqused"):
            continue
        _tensor(name, tensor)
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name}: got {tensor.dtype}, need int32 or int64; try {name}.int()")
        if tensor.ndim != 1:
            raise ValueError(f"{name}: got shape {_shape(tensor)}, need one dimension")
        _beside(name, tensor, q)
        sizes[name] = tensor.shape[0] - 1 if name.startswith("cu") else tensor.shape[0]
    batch = sizes["cu_seqlens_q"]
    if batch < 0:
        raise ValueError("cu_seqlens_q: got an empty tensor, need (sequences + 1,) offsets that start at 0")
    for name, size in sizes.items():
        if size != batch:
            raise ValueError(f"{name}: describes {size} sequences, need {batch} as cu_seqlens_q")
    for name, value in max_seqlens.items():
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.dtype not in INTEGERS:
                raise TypeError(f"{name}: got a {value.dtype} tensor of shape {_shape(value)}, need one integer")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            raise TypeError(f"{name}: got {type(value).__name__}, need an int, an integer tensor or None")
        elif value is not None and value < 0:
            raise ValueError(f"{name}: got {value}, need 0 or more")


def offsets(side: str, values: list[int], used: list[int] | None, total: int, longest: int | None) -> None:
    """The contents of cu_seqlens and seqused, on devices where the host can read them."""
    name = f"cu_seqlens_{side}"
    if values[0] < 0:
        raise ValueError(f"{name}: starts at {values[0]}, need 0 or more")
    if values[-1] > total:
        raise ValueError(f"{name}: ends at {values[-1]}, need at most {total}, the tokens that {side} has")
    lengths = [end - begin for begin, end in zip(values, values[1:], strict=False)]
    if any(length < 0 for length in lengths):
        raise ValueError(f"{name}: got {values[:8]}..., need offsets that never decrease")
    for index, (length, count) in enumerate(zip(lengths, used or lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"seqused_{side}: got {count} for sequence {index}, need 0 to {length}, the room it has")
        if longest is not None and count > longest:
            raise ValueError(f"max_seqlen_{side}: got {longest}, need at least {count}, the length of sequence {index}")


def packed_bias(value: Tensor | None, batch: int, heads: int, longest_q: int, longest_k: int) -> None:
    if value is not None:
        broadcasts("bias", value, (batch, heads, longest_q, longest_k), at_least=True)


def states(values: Any) -> None:
    """What `merge` takes."""
    if not isinstance(values, (list, tuple)) or len(values) == 0:
        raise ValueError(f"states: got {values!r}, need a list of one or more (out, lse) pairs")
    for index, pair in enumerate(values):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise TypeError(f"states[{index}]: got {type(pair).__name__}, need a pair (out, lse) of tensors")
        out, lse = pair
        if not (out.dtype.is_floating_point and lse.dtype in (torch.float32, torch.float64)):
            raise TypeError(
                f"states[{index}]: got out {out.dtype} and lse {lse.dtype}, need floating-point out and float32 lse"
            )
        rows = _shape(lse.transpose(-1, -2)) if lse.ndim >= 2 else None
        if rows != _shape(out)[:-1] or lse.ndim not in (2, 3):
            raise ValueError(
                f"states[{index}]: got out {_shape(out)} with lse {_shape(lse)}, need (batch, seqlen, "
                "heads, headdim) with (batch, heads, seqlen), or (total, heads, headdim) with (heads, total)"
            )
        if _shape(out) != _shape(values[0][0]):
            raise ValueError(f"states[{index}]: got out {_shape(out)}, need {_shape(values[0][0])} as the first")


def mask(inputs: Inputs, problem: Problem) -> None:
    """The tensors of a Mask against the sizes of the problem; runs inside the operator, where sizes are known."""
    _mask_node(mask_nodes.parse(problem.mask), list(inputs.mask), inputs.q, problem)


def _mask_node(node: mask_nodes.Node, tensors: list[Tensor], q: Tensor, problem: Problem) -> None:
    for tensor in tensors:
        _beside("mask", tensor, q)
    if isinstance(node, mask_nodes.Both):
        split = node.left.arity
        _mask_node(node.left, tensors[:split], q, problem)
        _mask_node(node.right, tensors[split:], q, problem)
    elif isinstance(node, mask_nodes.Prefix) and tensors:
        if tensors[0].dtype not in INTEGERS or _shape(tensors[0]) != (problem.batch,):
            raise ValueError(
                f"mask prefix: got {tensors[0].dtype} lengths of shape {_shape(tensors[0])}, need integers "
                f"(batch,) = ({problem.batch},)"
            )
    elif isinstance(node, mask_nodes.Document):
        for name, ids, length in zip(("query", "key"), tensors, (problem.seqlen_q, problem.seqlen_kv), strict=True):
            _document_ids(name, ids, length, problem)
    elif isinstance(node, mask_nodes.Dense):
        sizes = (problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_kv)
        broadcasts("mask", tensors[0], sizes, at_least=problem.varlen)
    elif isinstance(node, mask_nodes.Block):
        _block_state(node, tensors[0], problem)
        _mask_node(node.inner, tensors[1:], q, problem)


def _document_ids(name: str, ids: Tensor, length: int, problem: Problem) -> None:
    if ids.dtype not in INTEGERS or ids.ndim not in (1, 2):
        raise ValueError(
            f"mask document: got {ids.dtype} {name} ids of shape {_shape(ids)}, need integers "
            "(seqlen,) or (batch, seqlen)"
        )
    rows = ids.shape[0] if ids.ndim == 2 else 1
    fits = ids.shape[-1] >= length if problem.varlen else ids.shape[-1] == length
    if not fits or rows not in (1, problem.batch):
        raise ValueError(
            f"mask document: got {name} ids of shape {_shape(ids)}, need (seqlen,) = ({length},) or "
            f"(batch, seqlen) = ({problem.batch}, {length})"
        )


def _block_state(node: mask_nodes.Block, state: Tensor, problem: Problem) -> None:
    blocks = (-(-problem.seqlen_q // node.block_q), -(-problem.seqlen_kv // node.block_kv))
    fits = (
        state.ndim == 4
        and state.dtype is torch.int8
        and state.shape[0] in (1, problem.batch)
        and state.shape[1] in (1, problem.heads)
        and tuple(state.shape[2:]) == blocks
    )
    if not fits:
        raise ValueError(
            f"mask block: got {state.dtype} state of shape {_shape(state)}, need bool or int8 (batch or 1, "
            f"heads or 1, {blocks[0]}, {blocks[1]}) for blocks of {node.block_q} x {node.block_kv}"
        )
