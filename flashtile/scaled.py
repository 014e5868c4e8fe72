"""8-bit floats with scales: what they stand for, how they are laid out, and how tensors are rounded to them.

A number is `data * scale`. Queries share a scale in blocks of 64 rows of a head, keys and values in blocks of 128, or
all rows of a head do, or all of a tensor (FlashAttention-3, Shah et al. 2024, section 3.3). Queries and keys may be
turned by one orthogonal matrix before they are rounded, which changes no product and spreads what is far larger than
the rest over all columns: a Hadamard matrix after random signs (QuIP, Chee et al. 2023).

Values of a batch lie on their side, (batch, heads, headdim_v, seqlen): tensor cores take 8-bit operands only along the
dimension that is summed. There, in groups of 16, key 8 j + 2 t + e (t below 4, j and e below 2) lies at place
4 t + 2 j + e, because a thread holds scores of the former keys where a second product wants weights of the latter: no
thread needs to ask another one for them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.problem import Inputs, Problem
from flashtile.queues import apart

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
GRANULARITIES = ("tensor", "head", "block")
QUERIES = 64
"""Rows of queries that share a scale in blocks."""
KEYS = 128
"""The same of keys and values."""
GROUP = 16
"""Values lie in groups of this many keys."""
SMALLEST = 2.0**-64
"""The least scale: what is smaller by far is as good as 0, and quotients of scales must not overflow."""


@dataclass(frozen=True)
class Scaled:
    """An 8-bit tensor and its scales, as `flashtile.fp8.quantize` returns them and `flashtile.attention` takes them.

    data: (batch, seqlen, heads, headdim) or packed (total, heads, headdim); the values of a batch `turned`, see above.
    scale: float32, (batch, heads, blocks), packed (heads, blocks); one block where a head has one scale.
    dtype: what the numbers were before; the output's default.
    granularity: "tensor", "head" or "block".
    seqlen: rows of a sequence; `turned` values are padded to a multiple of 16.
    rows: those that share a scale in blocks, 64 of queries, 128 of keys and values.
    source: the tensor that was rounded, where a gradient is wanted of it.
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype
    granularity: str
    seqlen: int
    rows: int
    turned: bool = False
    source: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, seqlen, heads, headdim) or (total, heads, headdim)."""
        if not self.turned:
            return tuple(self.data.shape)
        batch, heads, columns, _ = self.data.shape
        return batch, self.seqlen, heads, columns

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, in `dtype`, default: what they were before. Turned queries and keys stay turned."""
        data = straight(self.data, self.seqlen) if self.turned else self.data
        return multiplied(data, self.scale, self.rows).to(dtype or self.dtype)


class Quantized(NamedTuple):
    """Queries, keys and values in 8 bits: `attention(*quantized)`."""

    q: Scaled
    k: Scaled
    v: Scaled


def blocks(seqlen: int, rows: int) -> int:
    """How many blocks of `rows` there are; at least one."""
    return max(1, -(-seqlen // rows))


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of a format."""
    return float(torch.finfo(dtype).max)


def multiplied(data: Tensor, scale: Tensor, rows: int) -> Tensor:
    """data * scale in float32; `rows` rows share a scale, or all where there is one for a head."""
    seqlen = data.shape[-3]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(rows, -1)[..., :seqlen]
    return data.float() * scale.transpose(-1, -2)[..., None]


def turned(v: Tensor) -> Tensor:
    """(batch, seqlen, heads, columns) -> (batch, heads, columns, seqlen to a multiple of 16), in the order above."""
    padding = -v.shape[1] % GROUP
    padded = torch.cat((v, v.new_zeros(v.shape[0], padding, *v.shape[2:])), 1) if padding else v
    groups = padded.permute(0, 2, 3, 1).unflatten(-1, (-1, 2, 4, 2))
    return groups.transpose(-3, -2).flatten(-4).contiguous()


def straight(data: Tensor, seqlen: int) -> Tensor:
    """The inverse of `turned`."""
    groups = data.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2)
    return groups.flatten(-4).permute(0, 3, 1, 2)[:, :seqlen]


class Rotation(NamedTuple):
    """An orthogonal matrix: columns are multiplied by `signs`, (headdim,); then each run of as many columns as `matrix`
    is wide, by that and by `factor`. matrix: entries -1, 0 and 1."""

    signs: Tensor
    matrix: Tensor
    factor: float

    def apply(self, tensor: Tensor) -> Tensor:
        """Rows of float32 times the matrix."""
        headdim, width = tensor.shape[-1], len(self.matrix)
        padded = torch.nn.functional.pad(tensor * self.signs, (0, -headdim % width))
        return (padded.unflatten(-1, (-1, width)) @ self.matrix).flatten(-2)[..., :headdim] * self.factor


WIDEST, NARROWEST = 128, 16
"""Columns of a `Rotation.matrix`: at most those of a tile that any GPU holds, at least what tensor cores multiply."""


def rotation(headdim: int, seed: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Random signs, and Hadamard matrices along the diagonal, each as wide as the largest power of two, up to 128, that
    divides headdim."""
    size = min(headdim & -headdim, WIDEST)
    signs, matrix = _rotation(headdim, size, seed, device, dtype)
    return Rotation(signs, matrix, float(size) ** -0.5)


@lru_cache(maxsize=64)
def _rotation(headdim: int, size: int, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    generator = torch.Generator().manual_seed(seed)
    signs = 1.0 - 2.0 * torch.randint(2, (headdim,), generator=generator)
    matrix = torch.block_diag(*[hadamard] * max(1, NARROWEST // size))
    return apart(lambda: (signs.to(device, dtype), matrix.to(device, dtype)))


def rounded(tensor: Tensor, dtype: torch.dtype, granularity: str, rows: int) -> tuple[Tensor, Tensor]:
    """(data, scale) of float32 rows (batch, seqlen, heads, columns) or (total, heads, columns).

    A scale makes the largest finite number of its rows the largest of the format. What is not finite becomes NaN.
    """
    seqlen = tensor.shape[-3]
    sizes = torch.where(tensor.isfinite(), tensor, 0.0).abs().amax(-1).transpose(-1, -2)
    if granularity == "block":
        padding = blocks(seqlen, rows) * rows - seqlen
        peak = torch.nn.functional.pad(sizes, (0, padding)).unflatten(-1, (-1, rows)).amax(-1)
    elif granularity == "head":
        peak = sizes.amax(-1, keepdim=True)
    else:
        peak = sizes.amax().expand(*sizes.shape[:-1], 1)
    scale = torch.where(peak == 0, 1.0, (peak * (1.0 / largest(dtype))).clamp(min=SMALLEST))
    data = multiplied(tensor, 1.0 / scale, rows).clamp(-largest(dtype), largest(dtype))
    return torch.where(tensor.isfinite(), data, torch.nan).to(dtype), scale


def plain(inputs: Inputs, problem: Problem) -> tuple[Inputs, Problem]:
    """The same call in float32, for a backend that multiplies no 8-bit numbers."""
    if not problem.scaled:
        return inputs, problem
    q_scale, k_scale, v_scale = inputs.scaled[:3]
    v = inputs.v if problem.varlen else straight(inputs.v, problem.seqlen_kv)
    q = multiplied(inputs.q, q_scale, QUERIES)
    k, v = multiplied(inputs.k, k_scale, KEYS), multiplied(v, v_scale, KEYS)
    return inputs._replace(q=q, k=k, v=v, scaled=()), replace(problem, dtype=torch.float32, scaled="")
