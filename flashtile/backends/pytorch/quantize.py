"""Rounding to 8-bit floats in PyTorch operations, in float32."""

import torch
from torch import Tensor

from flashtile.scaled import KEYS, QUERIES, rotation, rounded, turned

Rounded = tuple[Tensor, Tensor]


def quantize(
    q: Tensor, k: Tensor, v: Tensor, granularity: str, incoherent: bool, dtype: torch.dtype, seed: int
) -> tuple[Rounded, Rounded, Rounded]:
    """(data, scale) of each, the values of a batch turned."""
    q, k, v = q.float(), k.float(), v.float()
    if incoherent:
        turn = rotation(q.shape[-1], seed, q.device, q.dtype)
        q, k = turn.apply(q), turn.apply(k)
    data, scale = rounded(v, dtype, granularity, KEYS)
    return (
        rounded(q, dtype, granularity, QUERIES),
        rounded(k, dtype, granularity, KEYS),
        (turned(data) if v.ndim == 4 else data, scale),
    )
