"""The keyword arguments that `attention`, `attention_varlen` and `explain` share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile import masks
from flashtile.check.tensors import beside, broadcasts, floating, is_integer, shape_of, tensor
from flashtile.check.values import block_mask_value, dropout_p, seed_value, window_side

ALIGNMENTS = ("bottom_right", "top_left")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, need True or False; try bool({name})")


def deterministic(value: Any) -> None:
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"deterministic: got {value!r}, need True, False or None (PyTorch's global switch)")


def alignment(value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"alignment: got {type(value).__name__}, need the string 'bottom_right' or 'top_left'")
    if value not in ALIGNMENTS:
        raise ValueError(f"alignment: got {value!r}, need 'bottom_right' (default) or 'top_left'")


def window(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"window: got {type(value).__name__}, need a pair (left, right) of key counts; try ({value}, 0)"
        )
    if len(value) != 2:
        raise ValueError(f"window: got {len(value)} numbers, need a pair (left, right); try (128, 0)")
    window_side("window[0]", value[0])
    window_side("window[1]", value[1])


def mask_argument(value: Any) -> None:
    if isinstance(value, Tensor):
        tensor("mask", value)
        if value.dtype is not torch.bool:
            raise TypeError(
                f"mask: got a {value.dtype} tensor, need bool (True: may attend); try bias for an additive mask"
            )
        if value.ndim > 4:
            raise ValueError(
                f"mask: got shape {shape_of(value)}, need one that broadcasts to (batch, heads, seqlen_q, seqlen_kv)"
            )
    elif hasattr(value, "kv_num_blocks"):
        raise TypeError("mask: got a FlexAttention BlockMask, need a mask; try block_mask=...")
    elif not (value is None or isinstance(value, masks.Mask) or callable(value)):
        raise TypeError(
            f"mask: got {type(value).__name__}, need a flashtile.masks value, a bool tensor or a function "
            "mask_mod(b, h, q_idx, kv_idx); try causal=True or window=(left, right) for those"
        )


def block_mask(value: Any, q: Tensor, k: Tensor, varlen: bool) -> None:
    if value is None:
        return
    block_mask_value(value)
    if varlen:
        raise NotImplementedError(
            "block_mask: got one beside cu_seqlens_q, need none with packed sequences; try mask=block_mask.mask_mod"
        )
    lengths = tuple(getattr(value, "seq_lengths", (q.shape[1], k.shape[1])))
    if lengths != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"block_mask: got one made for lengths {lengths}, need ({q.shape[1]}, {k.shape[1]}); try making it anew "
            "with create_block_mask, or mask=block_mask.mask_mod"
        )
    beside("block_mask", value.kv_num_blocks, q)
    batch, heads = value.kv_num_blocks.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise ValueError(
            f"block_mask: got one made for batch {batch} and {heads} heads, need 1 or {q.shape[0]} and 1 or "
            f"{q.shape[2]}; try create_block_mask(mask_mod, B=None, H=None, ...)"
        )


def score_mod(value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(
            f"score_mod: got {type(value).__name__}, need a function score_mod(score, b, h, q_idx, kv_idx); "
            "a tensor to be added goes to the argument bias"
        )


def bias(value: Any, q: Tensor, k: Tensor, varlen: bool) -> None:
    if value is None:
        return
    _float_beside_q("bias", value, q)
    if value.ndim == 5 and not varlen:
        _shared_bias(value, q, k)
    elif value.ndim > 4:
        raise ValueError(
            f"bias: got shape {shape_of(value)}, need at most 4 dimensions (batch, heads, seqlen_q, seqlen_kv)"
        )
    elif not varlen:
        broadcasts("bias", value, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), at_least=False)


def _shared_bias(value: Tensor, q: Tensor, k: Tensor) -> None:
    """One of five dimensions."""
    (entries, one, *sizes), batch = shape_of(value), q.shape[0]
    full = (q.shape[2], q.shape[1], k.shape[1])
    divides = batch % entries == 0 if entries else batch == 0
    if one != 1 or not divides or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
        raise ValueError(
            f"bias: got shape {shape_of(value)}, need one that broadcasts to (batch, heads, seqlen_q, seqlen_kv) = "
            f"{(batch, *full)}, or (entries, 1, heads, seqlen_q, seqlen_kv) with entries that divide the batch"
        )


def alibi_slopes(value: Any, q: Tensor, batch: int) -> None:
    if value is None:
        return
    _float_beside_q("alibi_slopes", value, q)
    heads = q.shape[-2]
    if shape_of(value) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: got shape {shape_of(value)}, need (heads,) = ({heads},) or (batch, heads) = "
            f"({batch}, {heads}), one slope a query head"
        )


def sinks(value: Any, q: Tensor) -> None:
    if value is None:
        return
    _float_beside_q("sinks", value, q)
    if shape_of(value) != (q.shape[-2],):
        raise ValueError(
            f"sinks: got shape {shape_of(value)}, need (heads,) = ({q.shape[-2]},), one logit a query head"
        )


def _float_beside_q(name: str, value: Any, q: Tensor) -> None:
    tensor(name, value)
    floating(name, value)
    beside(name, value, q)


def _number(name: str, value: Any) -> None:
    if not isinstance(value, float) and not is_integer(value):
        raise TypeError(f"{name}: got {type(value).__name__}, need a number or None; try float({name})")


SMALLEST, LARGEST = 1e-30, 1e30
"""Numbers that kernels multiply by others in float32; in comparisons that a compiler follows where they are symbols."""


def softcap(value: Any) -> None:
    if value is None:
        return
    _number("softcap", value)
    if not (value == 0 or SMALLEST <= value <= LARGEST):
        raise ValueError(
            f"softcap: got {value!r}, need 0 or a number from {SMALLEST} to {LARGEST}; try None for no cap"
        )


def scale(value: Any) -> None:
    if value is None:
        return
    _number("scale", value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(
            f"scale: got {value!r}, need a number from -{LARGEST} to {LARGEST}; try None for headdim ** -0.5"
        )


def dropout(probability: Any, seed: Any, q: Tensor) -> None:
    dropout_p(probability)
    if seed is not None:
        seed_value(seed, "an int, an int64 tensor of one number or None (drawn from PyTorch's generator)")
    if isinstance(seed, Tensor):
        beside("seed", seed, q)


def out_dtype(value: Any, q: Tensor) -> None:
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"out_dtype: got {value!r}, need a torch.dtype or None; try torch.float32")
    if value not in (None, q.dtype, torch.float32):
        raise ValueError(f"out_dtype: got {value}, need q's dtype ({q.dtype}) or torch.float32; try out.to({value})")


def backend(value: Any, names: Sequence[str]) -> None:
    known = ", ".join([repr(name) for name in names])
    if value is not None and not isinstance(value, str):
        raise TypeError(f"backend: got {type(value).__name__}, need None (the fastest that fits) or one of {known}")
    if value is not None and value not in names:
        raise ValueError(f"backend: got {value!r}, need None (the fastest that fits) or one of {known}")
