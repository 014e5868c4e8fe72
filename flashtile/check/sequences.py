"""Where packed sequences lie: cu_seqlens, seqused, max_seqlen."""

from itertools import pairwise
from typing import Any

from torch import Tensor

from flashtile.check.tensors import INTEGERS, beside, broadcasts, integers, is_integer, shape_of, tensor


def packing(q: Tensor, lengths: dict[str, Any], max_seqlens: dict[str, Any]) -> None:
    """cu_seqlens_q, cu_seqlens_k and seqused_*: `lengths`; max_seqlen_*: `max_seqlens`. Reads no tensor."""
    sizes = {}
    for name, value in lengths.items():
        if value is None and name.startswith("seqused"):
            continue
        tensor(name, value)
        integers(name, value)
        if value.ndim != 1:
            raise ValueError(f"{name}: got shape {shape_of(value)}, need one dimension; try {name}.flatten()")
        beside(name, value, q)
        sizes[name] = value.shape[0] - 1 if name.startswith("cu") else value.shape[0]
    batch = sizes["cu_seqlens_q"]
    if batch < 0:
        raise ValueError("cu_seqlens_q: got an empty tensor, need (sequences + 1,) offsets; try a tensor of one 0")
    for name, size in sizes.items():
        if size != batch:
            raise ValueError(f"{name}: got {size} sequences, need {batch} as cu_seqlens_q; cu_seqlens have one more")
    for name, value in max_seqlens.items():
        _max_seqlen(name, value)


def _max_seqlen(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in INTEGERS:
            raise TypeError(
                f"{name}: got a {value.dtype} tensor of shape {shape_of(value)}, need one integer; try {name}.max()"
            )
    elif value is not None and not is_integer(value):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int, an integer tensor or None; try None")
    elif value is not None and value < 0:
        raise ValueError(f"{name}: got {value}, need 0 or more; try None")


def packing_complete(given: dict[str, Any]) -> None:
    """`explain` describes a packed call as soon as one of `given` is not None; then cu_seqlens must all be there."""
    named = [name for name, value in given.items() if value is not None]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if named and name not in named:
            raise ValueError(f"{name}: got None beside {', '.join(named)}, need it too; try cumulated lengths")


def offsets(side: str, values: list[int], used: list[int] | None, total: int, longest: int | None) -> None:
    """The contents of cu_seqlens and seqused; runs inside the operator, on devices where the host can read them."""
    name = f"cu_seqlens_{side}"
    if values[0] < 0:
        raise ValueError(f"{name}: got {values[0]} as its start, need 0 or more; try 0")
    lengths = [end - begin for begin, end in pairwise(values)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name}: got {values[index]} before {values[index + 1]}, need offsets that never decrease; "
                "try the cumulated lengths: lengths.cumsum(0) after a 0"
            )
    if values[-1] > total:
        raise ValueError(f"{name}: got {values[-1]} as its end, need at most the {total} tokens that {side} has")
    for index, (length, count) in enumerate(zip(lengths, used or lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(
                f"seqused_{side}: got {count} for sequence {index}, need 0 to {length}, the room that {name} gives it"
            )
        if longest is not None and count > longest:
            raise ValueError(
                f"max_seqlen_{side}: got {longest}, need at least {count}, the length of sequence {index}; try None"
            )


def packed_bias(value: Tensor | None, batch: int, heads: int, longest_q: int, longest_k: int) -> None:
    """Runs inside the operator, where the longest sequence is known."""
    if value is not None:
        broadcasts("bias", value, (batch, heads, longest_q, longest_k), at_least=True)
