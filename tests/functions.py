"""Functions of scores and masks with awkward steps, and kernels that run what `lower` makes of them on one tile."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile import lower, trace
from flashtile.kernels.rules import apart
from flashtile.mask_nodes import At, parse
from flashtile.masks import Mask

BATCH, HEADS, ROWS, COLUMNS = 2, 3, 16, 32
STEP_BY_STEP: dict[str, Any] = {"enable_fp_fusion": False}  # a fused multiply-add in half precision rounds once


@triton.jit
def _places(b, h, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    if TURNED:
        o_query, o_key = tl.arange(0, ROWS)[None, :], tl.arange(0, COLUMNS)[:, None]
    else:
        o_query, o_key = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    heads = tl.num_programs(1)
    return o_query, o_key, (b * heads + h) * ROWS * COLUMNS + o_query * COLUMNS + o_key


@triton.jit
def score_kernel(
    scores, out, first_q, first_k, arguments, SCORE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    b, h = tl.program_id(0), tl.program_id(1)
    o_query, o_key, place = _places(b, h, ROWS, COLUMNS, False)
    o_query += first_q
    o_key += first_k
    result = SCORE(tl.load(scores + place), b, h, o_query, o_key, apart(o_query, o_key), arguments)
    tl.store(out + place, result)


@triton.jit
def derivative_kernel(
    scores,
    grads,
    out,
    first_q,
    first_k,
    arguments,
    totals,
    DERIVATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNED: tl.constexpr,
):
    b, h = tl.program_id(0), tl.program_id(1)
    o_query, o_key, place = _places(b, h, ROWS, COLUMNS, TURNED)
    score, grad = tl.load(scores + place), tl.load(grads + place)
    valid = grad == grad
    result = DERIVATIVE(score, b, h, o_query + first_q, o_key + first_k, arguments, totals, grad, valid, COLLECT=True)
    tl.store(out + place, result)


@triton.jit
def mask_kernel(out, first_q, first_k, shift, arguments, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    b, h = tl.program_id(0), tl.program_id(1)
    o_query, o_key, place = _places(b, h, ROWS, COLUMNS, False)
    tl.store(out + place, MASK(b, h, o_query + first_q, o_key + first_k, shift, arguments).to(tl.int8))


def _indices(first_q: int, first_k: int, sizes: Sequence[int] = (BATCH, HEADS, ROWS, COLUMNS)) -> list[Tensor]:
    firsts, shapes = (0, 0, first_q, first_k), ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    return [first + torch.arange(size).view(shape) for first, size, shape in zip(firsts, sizes, shapes, strict=True)]


def _scores() -> Tensor:
    """Of all sizes and signs, with zeros, whole numbers, infinities and NaN."""
    scores = torch.randn(BATCH, HEADS, ROWS, COLUMNS) * torch.logspace(-3, 2, COLUMNS)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, 3.5, math.inf, -math.inf, math.nan])
    scores[:, :, 0, : len(special)] = special
    return scores


def _close(found: Tensor, expected: Tensor, beside: float = 0.0) -> None:
    wanted = expected.expand(found.shape)
    torch.testing.assert_close(found.cpu(), wanted, rtol=3e-6, atol=1e-6 + beside, equal_nan=True)


def check_score(
    function: Callable[..., Any], device: str, first_q: int = 5, first_k: int = 3, quick: float | None = None
) -> None:
    """Values and derivatives of both orientations of the tile. quick: as for inputs of half precision; the absolute
    error that is promised there."""
    lifted = trace.lift(function, "score")
    assert lower.unsupported(lifted.key) is None
    traced, indices, scores = trace.graph(lifted.key), _indices(first_q, first_k), _scores()
    tensors = [tensor.detach() for tensor in lifted.tensors]
    out = torch.full(scores.shape, 777.0, device=device)
    hook = lower.score_hook(lifted.key, [tensor.to(device) for tensor in tensors], quick is not None)
    shape = {"ROWS": ROWS, "COLUMNS": COLUMNS, **STEP_BY_STEP}
    place = (out, first_q, first_k, hook.arguments or None)
    score_kernel[(BATCH, HEADS)](scores.to(device), *place, SCORE=hook.function, **shape)
    _close(out, traced.evaluate(scores, *indices, tensors), quick or 0.0)
    # NaN and infinity are scores that no derivative needs to survive: they would fill every sum.
    scores, grads = scores.nan_to_num(1.5, 2.0, -3.0), torch.randn_like(scores)
    wanted = [tensor.is_floating_point() for tensor in tensors]
    expected, sums = traced.derivative(scores, *indices, tensors, grads, wanted)
    for turned in (False, True):
        totals = [None if exact is None else torch.zeros(exact.shape, device=device) for exact in sums]
        derivative = lower.derivative_hook(lifted.key, totals, quick is not None)
        if derivative is None:
            assert torch.equal(expected, grads)
            continue
        given = (scores.to(device), grads.to(device), *place, derivative.arguments or None)
        derivative_kernel[(BATCH, HEADS)](*given, DERIVATIVE=derivative.function, TURNED=turned, **shape)
        _close(out, expected, quick or 0.0)
        for total, exact in zip(totals, sums, strict=True):
            if total is not None and exact is not None:
                torch.testing.assert_close(total.cpu(), exact.float(), rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TABLE = torch.linspace(-1.0, 2.0, 40)
GRID = torch.randn(HEADS, 41, generator=torch.Generator().manual_seed(3)).t()  # (41, heads), strided
HALVES = torch.randn(HEADS, generator=torch.Generator().manual_seed(4)).to(F16)
BRAINS = torch.randn(HEADS, generator=torch.Generator().manual_seed(5)).to(BF16)
SMALL = torch.tensor([3, 250, 7, 255], dtype=torch.uint8)
NARROW = torch.tensor([2**31 - 5, -(2**31), 7], dtype=torch.int32)
WIDE = torch.tensor([2**40, -(2**41), 3])
FLAGS = torch.tensor([True, False, True])
LEVEL, COUNT = torch.tensor(0.75), torch.tensor(4)

QUICK = {"tanh": 4e-6, "tanh_of_all": 8e-7, "tanh_as_factor": 0.0, "tanh_far_up": 0.0}
"""Of functions for scores of half precision: 2e-7, as often as they take a tanh whose absolute error alone counts."""

SCORES: dict[str, Callable[..., Any]] = {
    "add": lambda s, b, h, q, k: s + 1.5,
    "constant": lambda s, b, h, q, k: s * 0 + 2,
    "sub_scaled": lambda s, b, h, q, k: torch.sub(s, q, alpha=0.5),
    "rsub": lambda s, b, h, q, k: 2 - s,
    "distance": lambda s, b, h, q, k: s - (q - k).abs() * 0.25,
    "heads_slope": lambda s, b, h, q, k: s + torch.exp2(-(h + 1) * 0.5) * (k - q),
    "tanh": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "tanh_of_all": lambda s, b, h, q, k: torch.where(q > k, -torch.tanh(s / 3.0), s) / 0.25 - q,
    "tanh_as_factor": lambda s, b, h, q, k: torch.tanh(s) / (s.abs() + 2.0),
    "tanh_far_up": lambda s, b, h, q, k: 1e4 * torch.tanh(s * 1e-4),
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s) * torch.nn.functional.silu(s),
    "softplus": lambda s, b, h, q, k: torch.nn.functional.softplus(s),
    "softplus_beta": lambda s, b, h, q, k: torch.nn.functional.softplus(s, beta=3.0, threshold=2.0),
    "relu": lambda s, b, h, q, k: torch.relu(s) + torch.clamp(s, min=-1.0) - torch.clamp(s, max=1.0),
    "clamp": lambda s, b, h, q, k: s.clamp(-1.5, 2.0) + (q - k).clamp(-4, 4),
    "clamp_crossed": lambda s, b, h, q, k: s.clamp(2.0, -1.0),
    "extrema": lambda s, b, h, q, k: torch.maximum(s, -s * 0.5) + torch.minimum(s, s * s),
    "sign": lambda s, b, h, q, k: s * torch.sign(k - q) + torch.sign(s),
    "powers": lambda s, b, h, q, k: s**2 + (s.abs() + 0.5) ** 1.5 - (s.abs() + 1.0) ** -0.5,
    "base": lambda s, b, h, q, k: s * 2.0 ** (-(q - k).abs()),
    "cube": lambda s, b, h, q, k: s.clamp(-3, 3) ** 3,
    "logs": lambda s, b, h, q, k: torch.log(s.abs() + 1) + torch.log1p(s.abs()) + torch.log2(s.abs() + 2),
    "exps": lambda s, b, h, q, k: torch.exp(-s.abs()) + torch.expm1(-s.abs()) + torch.exp2(-s.abs()),
    "roots": lambda s, b, h, q, k: torch.sqrt(s.abs() + 1) + torch.rsqrt(s.abs() + 1) + 1 / (s.abs() + 1),
    "waves": lambda s, b, h, q, k: s + torch.sin(q * 0.5) * torch.cos(k * 0.25),
    "erf": lambda s, b, h, q, k: torch.erf(s),
    "rounding": lambda s, b, h, q, k: torch.floor(s) + torch.ceil(s) * 3 + torch.trunc(s) * 5 + torch.round(s) * 7,
    "where": lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf),
    "where_numbers": lambda s, b, h, q, k: s + torch.where((q + k) % 3 == 0, 1.0, -2.0),
    "where_integers": lambda s, b, h, q, k: s + torch.where(q > k, q, k * 2),
    "masked_fill": lambda s, b, h, q, k: s.masked_fill(k > q, -5.0),
    "booleans": lambda s, b, h, q, k: s + (q > 3) + (k > 4) + ((q > 3) + (k > 4)) * 1 + ((q > 3) * (k > 4)) * 2,
    "boolean_extrema": lambda s, b, h, q, k: s + torch.maximum(q > 8, k > 9) * 2 + torch.minimum(q > 8, k > 9),
    "floor_division": lambda s, b, h, q, k: s + (q - k) // 4 + (k - q) // 3 * 100 + (q - 8) // -3,
    "remainder": lambda s, b, h, q, k: s + (q - k) % 4 + (q - k) % -3 * 100,
    "true_division": lambda s, b, h, q, k: s + q / (k + 1) + torch.div(q - k, 4, rounding_mode="floor"),
    "bits": lambda s, b, h, q, k: s + (q & 3) + (q | k) * 2 + (q ^ k) * 3 + (~q) + (q << 2) + (k >> 1),
    "large_products": lambda s, b, h, q, k: s + (q * k) % 1009 + (q * q * k) // 2**40,
    "large_minimum": lambda s, b, h, q, k: s + (q * k * 4096).clamp(0, 7),
    "half_steps": lambda s, b, h, q, k: (s.to(F16) * 0.75 + 0.375).to(F32),
    "half_beside_integers": lambda s, b, h, q, k: s + (HALVES[h] + q * 4099) * 1e-3,
    "half_compared": lambda s, b, h, q, k: s + (HALVES[h] * 0 + 0.1 >= 0.1) * 4 + (s.to(F16) > q * 257) * 2,
    "casts": lambda s, b, h, q, k: s + (q * 77).to(torch.int8) * 0.5 + (q * k).to(torch.uint8),
    "whole_part": lambda s, b, h, q, k: s - s.clamp(-1e6, 1e6).int() + TABLE[k].long() + (TABLE[q] != 0),
    "table": lambda s, b, h, q, k: s + TABLE[(q - k).clamp(-20, 19) + 20],
    "table_from_the_end": lambda s, b, h, q, k: s + TABLE[-(k % 8) - 1],
    "table_read_twice": lambda s, b, h, q, k: s * TABLE[q] + TABLE[k],
    "grid": lambda s, b, h, q, k: s + GRID[(q - k).clamp(-20, 20) + 20, h] * GRID[-1, h],
    "gain": lambda s, b, h, q, k: s * HALVES[h] + HALVES[0 * b] * LEVEL,
    "halves_product": lambda s, b, h, q, k: s + HALVES[h] * HALVES[2 - h],
    "numbers": lambda s, b, h, q, k: s * LEVEL + COUNT * (q // COUNT),
    "unsigned": lambda s, b, h, q, k: s + (SMALL[k % 4] + 10) + SMALL[b] * SMALL[1],
    "narrow": lambda s, b, h, q, k: s + (NARROW[h] + 10) * 1e-9 + (NARROW[h] * 3) * 1e-9,
    "wide": lambda s, b, h, q, k: s + (WIDE[h] + k) * 1e-11,
    "flags": lambda s, b, h, q, k: torch.where(FLAGS[h] & (q > 4), s * 2, s),
    "not": lambda s, b, h, q, k: torch.where(~FLAGS[h] | torch.logical_not(k - 4), s, -s),
    "tests": lambda s, b, h, q, k: torch.where(torch.isnan(s) | torch.isinf(s), 0.0, s),
}

BRAINS_SCORES: dict[str, Callable[..., Any]] = {
    "steps": lambda s, b, h, q, k: (s.to(BF16) / 3).to(F32),
    "compared": lambda s, b, h, q, k: s + (s.to(BF16) > q * 257) * 2,
    "gain": lambda s, b, h, q, k: s * BRAINS[h] + BRAINS[0 * b] * LEVEL,
    "products": lambda s, b, h, q, k: s + HALVES[h] * BRAINS[2 - h] + BRAINS[h] * BRAINS[b],
}
"""Triton's interpreter cuts bfloat16 off instead of rounding: only a device computes these right."""


def check_mask(mask: Mask, device: str, sizes: tuple[int, ...], first_q: int = 0, first_k: int = 0) -> None:
    """One tile, larger than all of the mask."""
    assert lower.unsupported_mask(mask.token) is None
    tensors = [tensor.to(device) for tensor in mask.tensors]
    hook, shift = lower.mask_hook(mask.token, tensors), sizes[3] - sizes[2]
    out = torch.full((*sizes[:2], 64, 64), 7, dtype=torch.int8, device=device)
    given = (out, first_q, first_k, shift, hook.arguments or None)
    mask_kernel[sizes[:2]](*given, MASK=hook.function, ROWS=64, COLUMNS=64)
    index = _indices(first_q, first_k, sizes)
    expected = parse(mask.token).allows(At(*index, shift), mask.tensors)
    assert torch.equal(out[:, :, : sizes[2], : sizes[3]].cpu(), expected.expand(sizes).to(torch.int8))


MASKS: dict[str, Callable[..., Any]] = {
    "products": lambda b, h, q, k: (q * k) % 7 < 3,
    "tables": lambda b, h, q, k: (WIDE[h % 3] % 5 > q - k) ^ FLAGS[k % 3],
    "numbers": lambda b, h, q, k: (q > 2.5) & (k < COUNT * 3) | (k < LEVEL),
    "truth": lambda b, h, q, k: torch.logical_and(q - 4, k - 4) | (q == k).logical_not() & FLAGS[b],
    "halves": lambda b, h, q, k: HALVES[h] + q > HALVES[b] + k,
}
