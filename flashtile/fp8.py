"""FP8 attention: queries, keys and values rounded to 8-bit floats, whose products cost half as much.

`attention(*quantize(q, k, v))` and `attention_varlen(*quantize(q, k, v), ...)` take every option that they take with 16
bits. FlashAttention-3 (Shah et al. 2024), section 3.3: scales of blocks, and incoherent processing.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashtile import check, plan
from flashtile.scaled import GROUP, KEYS, QUERIES, Quantized, Scaled, blocks, turned

__all__ = ["Quantized", "Scaled", "quantize", "scaled"]


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    granularity: str = "block",
    incoherent: bool = True,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Quantized:
    """Rounds queries, keys and values to 8-bit floats with scales, for `attention` and `attention_varlen`.

    Where a gradient is wanted the tensors themselves are kept: the backward pass runs on them, in their precision, with
    the output and log-sum-exps of the 8-bit forward pass.

    Args:
        q, k, v: (batch, seqlen, heads, headdim) or packed (total, heads, headdim), float16, bfloat16 or float32.
        granularity: what shares a scale: a "block" of 64 queries or 128 keys of a head, a "head" of a batch entry (of
            packed tensors: of all sequences), or the whole "tensor". The first reads memory once, the others twice.
        incoherent: multiply queries and keys by one random orthogonal matrix (a Hadamard matrix after random signs)
            before they are rounded. Scores stay as they are; large single columns err less.
        dtype: torch.float8_e4m3fn (default), torch.float8_e5m2, or their fnuz forms (default where the device, a CDNA3,
            multiplies no other).
        seed: of the random signs.

    Returns:
        Quantized(q, k, v), each a `Scaled`: data, scale and what they mean. What is not finite becomes NaN.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check.quantizable(q, k, v, granularity, incoherent, dtype, seed)
    wants = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    dtype = dtype or plan.eight_bits(q.device)
    with torch.no_grad():
        run = _operator if torch.compiler.is_compiling() else _rounded
        found = run(q, k, v, granularity, incoherent, dtype, seed)
    parts = zip(found[:3], found[3:], strict=True)
    kinds = ((q, QUERIES, False), (k, KEYS, False), (v, KEYS, v.ndim == 4))
    return Quantized(
        *[
            Scaled(data, scale, source.dtype, granularity, source.shape[-3], rows, turned, source if wants else None)
            for (source, rows, turned), (data, scale) in zip(kinds, parts, strict=True)
        ]
    )


def scaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantized:
    """8-bit tensors that are there already, for `attention` and `attention_varlen`, which check them. No gradients.

    Args:
        q, k, v: (batch, seqlen, heads, headdim) or packed (total, heads, headdim), all of one 8-bit format.
        q_scale, k_scale, v_scale: float32 (batch, heads), packed (heads,): a number is data * scale.
        dtype: that of the output, unless the call says another.

    Returns:
        Quantized(q, k, v); the values of a batch are copied, for they lie on their side.
    """
    parts = ((q, q_scale, QUERIES), (k, k_scale, KEYS), (v, v_scale, KEYS))
    found = [
        Scaled(data.detach(), scale[..., None].contiguous(), dtype, "head", data.shape[-3], rows)
        for data, scale, rows in parts
    ]
    if v.ndim == 4:
        # As bytes: not every function that moves numbers knows 8-bit floats.
        on_its_side = turned(found[2].data.view(torch.uint8)).view(v.dtype)
        found[2] = replace(found[2], data=on_its_side, turned=True)
    return Quantized(*found)


def _rounded(
    q: Tensor, k: Tensor, v: Tensor, granularity: str, incoherent: bool, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """The data of q, k and v, then their scales."""
    parts = plan.quantizer(q)(q, k, v, granularity, incoherent, dtype, seed)
    return [data for data, _ in parts] + [scale for _, scale in parts]


@torch.library.custom_op(
    "flashtile::quantize",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, str granularity, bool incoherent, ScalarType dtype, int seed) -> Tensor[]",
)
def _operator(*arguments: Any) -> list[Tensor]:
    """`_rounded` as an operator, opaque to the compiler."""
    return _rounded(*arguments)


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, granularity: str, incoherent: bool, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    data, scales = [], []
    for tensor, rows, last in ((q, QUERIES, False), (k, KEYS, False), (v, KEYS, True)):
        *batch, seqlen, heads, columns = tensor.shape
        turned = last and bool(batch)
        shape = (*batch, heads, columns, (seqlen + GROUP - 1) // GROUP * GROUP) if turned else tensor.shape
        data.append(tensor.new_empty(shape, dtype=dtype))
        count = blocks(seqlen, rows) if granularity == "block" else 1
        scales.append(tensor.new_empty((*batch, heads, count), dtype=torch.float32))
    return data + scales
