"""q, k and v, and what the checks of every tensor argument share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def is_integer(value: Any) -> bool:
    """An int, symbolic or not; True and False are flags, not numbers."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor; try torch.as_tensor({name})")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name}: got a {value.layout} tensor, need a strided one; try .to_dense(), or attention_varlen"
        )


def beside(name: str, value: Tensor, other: Tensor, owner: str = "q") -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}, need {other.device} as {owner}; try {name}.to({owner}.device)"
        )


def floating(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got {value.dtype}, need a floating-point tensor; try {name}.float()")


def integers(name: str, value: Tensor) -> None:
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: got {value.dtype}, need int32 or int64; try {name}.int()")


def broadcasts(name: str, value: Tensor, sizes: Sequence[int], at_least: bool) -> None:
    """`at_least`: packed calls share one table, whose last two sizes may pass the sequence's."""
    shape = (1,) * (4 - value.ndim) + shape_of(value)
    rules = (False, False, at_least, at_least)
    fits = len(shape) == 4 and all(
        size == 1 or size == full or (loose and size > full)
        for size, full, loose in zip(shape, sizes, rules, strict=True)
    )
    if not fits:
        wanted = "(batch, heads, seqlen_q, seqlen_kv)"
        raise ValueError(
            f"{name}: got shape {shape_of(value)}, need one that broadcasts to {wanted} = {tuple(sizes)}; "
            "sizes of 1 broadcast, missing leading dimensions too"
        )


def tensors(q: Any, k: Any, v: Any) -> None:
    """Types and dtypes of q, k and v, each by itself."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        tensor(name, value)
        if value.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {value.dtype}, need float16, bfloat16, float32 or float64; try {name}.float()"
            )


def qkv(q: Tensor, k: Tensor, v: Tensor, varlen: bool) -> None:
    """Ranks, dtypes, devices and sizes of q, k and v against each other."""
    layout = "(total, heads, headdim)" if varlen else "(batch, seqlen, heads, headdim)"
    hint = "for batched tensors try attention" if varlen else "for packed tensors try attention_varlen"
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.ndim != (3 if varlen else 4):
            raise ValueError(f"{name}: got shape {shape_of(value)}, need {layout}; {hint}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name}: got {value.dtype}, need {q.dtype} as q; try {name}.to(q.dtype)")
        beside(name, value, q)
        if not varlen and value.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: got batch {value.shape[0]}, need {q.shape[0]} as q; try {name}.expand(...)")
    heads_and_sizes(q, k, v)


def heads_and_sizes(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """The sizes of queries, keys and values against each other; `names`: what the caller knows them by."""
    q_name, k_name, v_name = names
    if v.shape[-3] != k.shape[-3]:
        raise ValueError(f"{v_name}: got {v.shape[-3]} keys, need {k.shape[-3]} as {k_name}; each key has one value")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"{v_name}: got {v.shape[-2]} heads, need {k.shape[-2]} as {k_name}; each key head has one value head"
        )
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if heads == 0:
        raise ValueError(f"{q_name}: got 0 heads, need at least 1; the layout is (..., seqlen, heads, headdim)")
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(
            f"{k_name}: got {heads_kv} heads, need a divisor of q's {heads} (grouped-query attention); "
            "the layout is (..., seqlen, heads, headdim), try .transpose(-3, -2) if yours has heads first"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name}: got headdim {k.shape[-1]}, need {q.shape[-1]} as q; only v's may differ")
    if q.shape[-1] == 0:
        raise ValueError(f"{q_name}: got headdim 0, need at least 1; try one column of zeros in q and k")
    if v.shape[-1] == 0:
        raise ValueError(f"{v_name}: got headdim 0, need at least 1; try one column of zeros")
