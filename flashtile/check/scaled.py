"""What `flashtile.fp8.quantize` takes, and what attention takes of it."""

from collections.abc import Sequence
from typing import Any

import torch

from flashtile.check.tensors import beside, heads_and_sizes, is_integer, qkv, shape_of, tensor, tensors
from flashtile.scaled import FORMATS, GRANULARITIES, KEYS, QUERIES, Scaled, blocks

OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)
_WAY_OUT = "try attention(*flashtile.fp8.quantize(q, k, v))"


def quantizable(q: Any, k: Any, v: Any, granularity: Any, incoherent: Any, dtype: Any, seed: Any) -> None:
    """The arguments of `quantize`."""
    tensors(q, k, v)
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dtype is torch.float64:
            raise TypeError(f"{name}: got torch.float64, need float16, bfloat16 or float32; try {name}.float()")
    qkv(q, k, v, varlen=q.ndim == 3)
    if granularity not in GRANULARITIES:
        known = ", ".join(map(repr, GRANULARITIES))
        raise ValueError(f"granularity: got {granularity!r}, need one of {known}; 'block' errs least")
    if not isinstance(incoherent, bool):
        raise TypeError(f"incoherent: got {type(incoherent).__name__}, need True or False")
    if dtype is not None and dtype not in FORMATS:
        raise ValueError(f"dtype: got {dtype}, need {_names(FORMATS)}, or None for what the device multiplies")
    if not is_integer(seed):
        raise TypeError(f"seed: got {type(seed).__name__}, need an int; queries and keys must be given the same one")


def scaled(q: Any, k: Any, v: Any, varlen: bool) -> None:
    """8-bit queries, keys and values of one call against each other."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Scaled):
            raise TypeError(f"{name}: got {type(value).__name__}, need flashtile.fp8.Scaled as the others; {_WAY_OUT}")
        _one(name, value, q, varlen)
    wanted = not varlen
    if v.turned is not wanted or q.turned or k.turned:
        said = "values on their side, all else not" if wanted else "nothing on its side"
        raise ValueError(f"turned: got {q.turned}, {k.turned}, {v.turned} of q, k, v, need {said}; {_WAY_OUT}")
    queries, keys, values = (torch.empty(value.shape, device="meta") for value in (q, k, v))
    heads_and_sizes(queries, keys, values)


def _one(name: str, value: Scaled, q: Scaled, varlen: bool) -> None:
    """One of them by itself, and beside q."""
    tensor(f"{name}.data", value.data)
    tensor(f"{name}.scale", value.scale)
    if value.data.dtype not in FORMATS or value.data.dtype != q.data.dtype:
        wanted = _names(FORMATS) if value is q else f"{q.data.dtype} as q"
        raise TypeError(f"{name}.data: got {value.data.dtype}, need {wanted}; {_WAY_OUT}")
    if value.granularity != q.granularity:
        raise ValueError(f"{name}.granularity: got {value.granularity!r}, need {q.granularity!r} as q; {_WAY_OUT}")
    shape = value.shape
    if len(shape) != (3 if varlen else 4):
        layout = "(total, heads, headdim)" if varlen else "(batch, seqlen, heads, headdim)"
        hint = "for batched tensors try attention" if varlen else "for packed tensors try attention_varlen"
        raise ValueError(f"{name}: got shape {shape}, need {layout}; {hint}")
    if not varlen and shape[0] != q.shape[0]:
        raise ValueError(f"{name}: got batch {shape[0]}, need {q.shape[0]} as q")
    beside(f"{name}.data", value.data, q.data)
    beside(f"{name}.scale", value.scale, q.data)
    rows = QUERIES if name == "q" else KEYS
    count = blocks(shape[-3], rows) if value.granularity == "block" else 1
    wanted_shape = (*shape[:-3], shape[-2], count)
    if value.scale.dtype is not torch.float32 or shape_of(value.scale) != wanted_shape:
        got = f"{value.scale.dtype} of shape {shape_of(value.scale)}"
        raise ValueError(f"{name}.scale: got {got}, need torch.float32 of shape {wanted_shape}; {_WAY_OUT}")


def scaled_out_dtype(value: Any) -> None:
    if value is not None and value not in OUTPUTS:
        raise ValueError(f"out_dtype: got {value!r}, need {_names(OUTPUTS)} for 8-bit inputs, or None")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
