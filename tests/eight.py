"""8-bit calls and their oracle, for the CPU, emulators and GPUs.

The truth is the float64 reference on what the 8-bit numbers stand for: rounding the inputs is `quantize`, which
is tested apart. The textbook formula of the tolerance rule (see `oracle`) rounds as such kernels must: the
weights, relative to their row's largest, to the format of the values.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import State, fp8, masks, reference, scaled
from flashtile.fp8 import Quantized
from tests import oracle
from tests.oracle import Ratio
from tests.problems import Draw, Shape, dense, offsets, packed

LIFT = 2.0**8
"""What weights are multiplied by before they are rounded to 8 bits."""


@dataclass(frozen=True)
class Eight:
    """A call: sizes, what shares a scale, options of `attention` that the reference takes too."""

    name: str
    shape: Shape
    granularity: str = "block"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float8_e4m3fn
    incoherent: bool = True

    @property
    def formula(self) -> dict[str, Any]:
        """Of the options those that say what is computed."""
        return {name: value for name, value in self.options.items() if name != "out_dtype"}

    def options_on(self, device: torch.device | str) -> dict[str, Any]:
        """The options with their tensors on a device."""
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()}

    def tensors(self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, of which some blocks are far larger than others."""
        shape, draw = self.shape, Draw(self.name, device)
        queries, keys = (shape.batch, shape.seqlen_q), (shape.batch, shape.seqlen_kv)
        if shape.lengths_q is not None and shape.lengths_kv is not None:
            queries, keys = (sum(shape.lengths_q),), (sum(shape.lengths_kv),)
        q = draw.normal(*queries, shape.heads, shape.headdim)
        k = draw.normal(*keys, shape.heads_kv, shape.headdim)
        v = draw.normal(*keys, shape.heads_kv, shape.headdim_v)
        v[..., :128, :, :] *= 20.0
        k[..., 128:256, :, :] *= 2.0
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def quantized(self, device: str = "cpu") -> Quantized:
        return fp8.quantize(*self.tensors(device), self.granularity, self.incoherent, dtype=self.dtype)


def _document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx // 90 == kv_idx // 90


CASES = (
    Eight("plain_heads", dense(1, 100, 150, 2, 2, 64), "head"),
    Eight("causal_gqa", dense(1, 130, 300, 2, 1, 128), "block", {"causal": True}),
    Eight("tensor_window", dense(1, 150, 150, 1, 1, 64), "tensor", {"window": (70, 3)}),
    Eight("wide", dense(1, 70, 200, 1, 1, 256), "block"),
    Eight("softcap", dense(1, 70, 200, 1, 1, 64), "block", {"causal": True, "softcap": 10.0}),
    Eight("document", dense(1, 200, 200, 1, 1, 64), "block", {"mask": _document}),
    Eight("e5m2", dense(1, 70, 150, 1, 1, 64), "block", {}, torch.float8_e5m2, False),
    Eight("out_float32", dense(1, 70, 150, 1, 1, 64), "block", {"causal": True, "out_dtype": torch.float32}),
    Eight("odd_columns", dense(1, 70, 150, 1, 1, 96, 48), "block", {"causal": True}),
    Eight("sinks", dense(1, 70, 150, 2, 1, 64), "head", {"causal": True, "sinks": torch.tensor([4.0, -1.0])}),
)


PACKED = (
    Eight("packed_tensor", packed((70, 30), (90, 60), 1, 1, 64), "tensor"),
    Eight("packed_heads_causal", packed((100, 0, 33, 7), (37, 21, 0, 250), 2, 1, 64), "head", {"causal": True}),
    Eight("packed_blocks", packed((37, 150, 1), (101, 5, 200), 2, 2, 128), "block"),
    Eight("packed_causal_gqa", packed((70, 5, 130), (200, 0, 290), 2, 1, 128), "block", {"causal": True}),
    Eight("packed_window", packed((300, 20), (330, 50), 1, 1, 64), "block", {"window": (70, 3)}),
    Eight("packed_top_left", packed((20, 150), (50, 170), 1, 1, 64), "block", {"mask": masks.causal("top_left")}),
    Eight("packed_wide", packed((30, 40), (150, 90), 1, 1, 256), "block", {"causal": True}),
    Eight("packed_softcap", packed((20, 70), (90, 150), 1, 1, 64), "block", {"causal": True, "softcap": 10.0}),
    Eight("packed_document", packed((20, 150), (50, 170), 1, 1, 64), "block", {"mask": _document}),
    Eight("packed_e5m2", packed((70, 50), (90, 60), 1, 1, 96), "head", {}, torch.float8_e5m2, False),
    Eight("packed_sinks", packed((70, 5, 33), (90, 0, 150), 2, 1, 64), "block", {"sinks": torch.tensor([4.0, -1.0])}),
    Eight("packed_float32", packed((33, 50), (90, 60), 1, 1, 64), "block", {"out_dtype": torch.float32}),
)
"""Sequences that begin within blocks and within groups of values, some of them empty."""


def attend_packed(case: Eight, quantized: Quantized, **options: Any) -> State:
    """`attention_varlen` over the sequences of a case."""
    device = quantized.q.data.device
    bounds = [offsets(lengths or ()).to(device) for lengths in (case.shape.lengths_q, case.shape.lengths_kv)]
    state: State = flashtile.attention_varlen(
        *quantized, *bounds, return_lse=True, **{**case.options_on(device), **options}
    )
    return state


def check_packed(case: Eight, quantized: Quantized, found: State, lse_extra: float = 0.0) -> list[Ratio]:
    """`check` of each sequence."""
    q, k, v = (part.dequantize(torch.float64).cpu() for part in quantized)
    out, lse, ratios = found.out.cpu(), found.lse.cpu(), []
    bounds = [offsets(lengths or ()).tolist() for lengths in (case.shape.lengths_q, case.shape.lengths_kv)]
    for first_q, end_q, first_k, end_k in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        rows, keys = slice(first_q, end_q), slice(first_k, end_k)
        if first_k == end_k:
            assert not out[rows].any()
            nothing = case.options.get("sinks", torch.tensor(-torch.inf)).view(-1, 1).expand_as(lse[:, rows])
            torch.testing.assert_close(lse[:, rows], nothing)
        elif first_q < end_q:
            one = State(out[None, rows], lse[None, :, rows])
            ratios += check_numbers(case, q[None, rows], k[None, keys], v[None, keys], one, lse_extra)
    return ratios


def check(case: Eight, quantized: Quantized, found: State, lse_extra: float = 0.0) -> list[Ratio]:
    """Asserts the tolerance rule; `lse_extra`: of accumulators that hold fewer bits than float32."""
    q, k, v = (part.dequantize(torch.float64).cpu() for part in quantized)
    return check_numbers(case, q, k, v, found, lse_extra)


def check_numbers(case: Eight, q: Tensor, k: Tensor, v: Tensor, found: State, lse_extra: float) -> list[Ratio]:
    """The same of what 8-bit numbers stand for."""
    truth = reference.attention(q, k, v, **case.formula)
    single = reference.attention(q.float(), k.float(), v.float(), dtype=torch.float32, **case.formula)
    errors = {"out": _textbook(case, q, k, v) - truth.out, "lse": oracle._error(single.lse, truth.lse)}
    ratios = []
    for name, value, right in (("out", found.out, truth.out), ("lse", found.lse, truth.lse)):
        extra = lse_extra if name == "lse" else 0.0
        ratios += oracle.compare_one(name, value.cpu(), right, [errors[name]], case.shape, extra)
    worst = max(ratios, key=lambda ratio: ratio.value)
    assert worst.value <= 1, f"{case.name} {worst.name}: error {worst.error:.3e}, allowed {worst.allowed:.3e}"
    return ratios


def with_nan(queries: tuple[int, ...], keys: tuple[int, ...], columns: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v to round: a column that is far larger than the others, and a NaN."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in (queries, keys, (*keys[:-1], columns))]
    for tensor in tensors:
        tensor[..., 3] *= 10
        tensor[..., 0, 0][..., :1] = torch.nan
    return [tensor.to(dtype) for tensor in tensors]


def rounded(
    tensors: list[Tensor], granularity: str, incoherent: bool, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """What PyTorch makes of q, k and v: (data, scale) of each, values of a batch turned."""
    found = []
    for tensor, rows in zip(tensors, (scaled.QUERIES, scaled.KEYS, scaled.KEYS), strict=True):
        wide, values = tensor.float(), tensor is tensors[2]
        if incoherent and not values:
            wide = scaled.rotation(tensor.shape[-1], 0, tensor.device, torch.float32).apply(wide)
        data, scale = scaled.rounded(wide, dtype, granularity, rows)
        found.append((scaled.turned(data) if values and tensor.ndim == 4 else data, scale))
    return found


def _textbook(case: Eight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output with weights rounded to 8 bits; the formats without negative zero end at less than `LIFT`."""
    lift = min(LIFT, 2.0 ** math.floor(math.log2(torch.finfo(case.dtype).max)))
    keys = k.shape[1]
    identity = torch.eye(keys, dtype=k.dtype)[None, :, None].expand(k.shape[0], keys, k.shape[2], keys)
    weights = reference.attention(q, k, identity, **case.formula).out
    largest = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if "sinks" in case.options:
        # What is left of 1 is the weight of the sink, which may be the largest.
        largest = largest.maximum(1.0 - weights.sum(-1, keepdim=True))
    rounded = (weights / largest * lift).float().to(case.dtype).double() * (largest / lift)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bqhk,bkhd->bqhd", rounded, values)
