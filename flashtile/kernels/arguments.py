"""A call in the kernels' words: tensors as tuples of pointer and strides, the mask's window, what changes scores."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashtile import lower
from flashtile.kernels.words import Dropout, Grid, Modifiers, Numbers, Packing, Rows, Rules, Size, Stats, Window, odd
from flashtile.lower.rules import without_ones
from flashtile.problem import Inputs, Problem
from flashtile.queues import apart
from flashtile.region import region
from flashtile.scores import four_dimensions, sharing


def rows_of(tensor: Tensor) -> Rows:
    """A dense (batch, seqlen, heads, d) or packed (total, heads, d) tensor; copied where kernels could not address it.

    Columns lie side by side, and the offsets inside of a tile fit into 32 bits.
    """
    if tensor.stride(-1) != 1 or tensor.stride(-3) >= 2**22:
        tensor = tensor.contiguous()
    batch = tensor.stride(0) if tensor.ndim == 4 else 0
    return Rows(tensor, batch, tensor.stride(-3), tensor.stride(-2))


def values_of(inputs: Inputs) -> Rows:
    """Of 8-bit values, which lie on their side unless packed, `row` is the stride of a column."""
    v = inputs.v
    if not inputs.scaled or inputs.cu_seqlens_q is not None:
        return rows_of(v)
    return Rows(v, v.stride(0), v.stride(2), v.stride(1))


def grid_of(tensor: Tensor) -> Grid:
    """A contiguous (batch, heads, rows, columns) tensor."""
    return Grid(tensor, *map(odd, (*tensor.stride()[:2], *tensor.shape[2:])))


PADDED = 128
"""Rows of `Stats` are padded to a multiple of this, which all tiles of queries divide: kernels may read them whole."""


def empty_stats(shape: Sequence[int], fill: float, device: torch.device, written: bool = False) -> Tensor:
    """(..., rows), float32, with memory behind each row that holds `fill`; `written`: a kernel writes all rows."""
    rows = -(-shape[-1] // PADDED) * PADDED
    if written and rows == shape[-1]:
        return memory_for(shape, torch.float32, device)
    return torch.full((*shape[:-1], rows), fill, dtype=torch.float32, device=device)[..., : shape[-1]]


def is_padded(tensor: Tensor) -> bool:
    """Whether `stats_of` takes a dense (batch, heads, seqlen) or packed (heads, total) tensor as it is."""
    return tensor.stride(-1) == 1 and not any(stride % PADDED for stride in tensor.stride()[:-1])


def padded(tensor: Tensor, fill: float) -> Tensor:
    """Such a tensor, or a copy that is one."""
    if is_padded(tensor):
        return tensor
    return empty_stats(tensor.shape, fill, tensor.device).copy_(tensor)


@lru_cache(maxsize=1024)
def _pattern(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number that looks like as many, or a contiguous tensor of none or one."""
    own = () if math.prod(shape) > 1 else shape
    return apart(lambda: torch.empty(own, dtype=dtype, device=device)).expand(shape)


def memory_for(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, in half its time: PyTorch takes longer to read a shape than to make a tensor like another.

    What is like a number that looks like many is contiguous (a test holds this)."""
    return torch.empty_like(_pattern(shape, dtype, device))


def pattern_of(tensor: Tensor) -> Tensor:
    """What contiguous tensors of that kind are made like, without their memory."""
    return _pattern(tensor.shape, tensor.dtype, tensor.device)


def unwritten(tensor: Tensor, problem: Problem) -> Tensor:
    """Contiguous memory for as many numbers; zeros where rows between packed sequences belong to no program."""
    make = torch.zeros_like if problem.varlen else torch.empty_like
    return make(tensor, memory_format=torch.contiguous_format)


def outputs_of(inputs: Inputs, problem: Problem) -> Tensor:
    """`unwritten` memory for the output."""
    q = inputs.q
    if problem.headdim == problem.headdim_v and problem.out_dtype is q.dtype:
        return unwritten(q, problem)
    shape = (*q.shape[:-1], problem.headdim_v)
    if problem.varlen:
        return torch.zeros(shape, dtype=problem.out_dtype, device=q.device)
    return memory_for(shape, problem.out_dtype, q.device)


def stats_of(tensor: Tensor) -> Stats:
    """Of a tensor with `padded` rows."""
    return Stats(tensor, tensor.stride(0) if tensor.ndim == 3 else 0, tensor.stride(-2))


def numbers_of(tensor: Tensor) -> Numbers:
    """Of a dense (batch, heads, seqlen) or packed (heads, total) tensor whose rows lie side by side."""
    return Numbers(tensor, odd(tensor.stride(0) if tensor.ndim == 3 else 0), odd(tensor.stride(-2)))


def packing_of(inputs: Inputs) -> Packing:
    """Where packed sequences lie."""
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        return Packing(None, None, None, None, None)
    offsets = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqused_q, inputs.seqused_k)
    rows = [None if tensor is None else tensor.contiguous() for tensor in offsets]
    return Packing(*[*rows, odd(len(inputs.cu_seqlens_q) - 1)])


def programs_of(problem: Problem, total: int, tile: int) -> int:
    """Programs a head, for `total` rows, packed or of one batch entry (see `sweep.slots`)."""
    if not problem.varlen:
        return -(-total // tile)
    return total // tile + problem.batch if problem.batch else 0


def size_of(problem: Problem, heads: int, tiles: int) -> Size:
    lengths = (0, 0) if problem.varlen else (problem.seqlen_q, problem.seqlen_kv)
    return Size(*map(odd, (*lengths, heads, tiles)))


def rules_of(inputs: Inputs, problem: Problem, score: Any, totals: Any, mask: Any) -> Rules:
    """`score`, `totals` and `mask`: arguments of the functions that the kernel calls, or None."""
    factor = math.log2(math.e) * (1.0 if modified(problem) else problem.scale)
    modifiers = _modifiers(inputs, problem, score, totals, mask)
    origin = inputs.seed[1:] if inputs.seed is not None and inputs.seed.ndim and problem.dropout_p else None
    return Rules(_window(problem), modifiers, _dropout(inputs, problem), factor, problem.scale, origin)


def _window(problem: Problem) -> Window:
    left, right, _, _ = region(problem.mask)
    return Window(*(None if limit is None else odd(limit) for limit in (left, right)))


def _modifiers(inputs: Inputs, problem: Problem, *functions: Any) -> Modifiers:
    bias = inputs.bias
    strides: list[Any] = [None, None, None, None]
    shared = None
    if bias is not None:
        bias = four_dimensions(bias)
        strides = [stride if size > 1 else 0 for stride, size in zip(bias.stride(), bias.shape, strict=True)]
        strides = [*without_ones(*strides)]
        entries = sharing(bias, problem.batch)
        shared = odd(entries) if entries > 1 else None
    slopes = inputs.alibi_slopes
    slopes_batch = None
    if slopes is not None:
        slopes = slopes.contiguous()
        (slopes_batch,) = without_ones(slopes.stride(0) if slopes.ndim == 2 and len(slopes) > 1 else 0)
    return Modifiers(*(problem.softcap or None, bias, *strides, shared, slopes, slopes_batch, *functions))


def _dropout(inputs: Inputs, problem: Problem) -> Dropout | None:
    if inputs.seed is None or not problem.dropout_p:
        return None
    return Dropout(inputs.seed, round(problem.dropout_p * 2**32), 1 / (1 - problem.dropout_p))


def modified(problem: Problem) -> bool:
    """Whether anything changes scores between the dot product and the mask; a scale that turns their order does too,
    for the largest dot product then has not the largest score."""
    return problem.scale <= 0 or bool(set(problem.modified) - {"sinks", "dropout_p"})


_LARGE_SOFTCAP = 1000.0


def exact(problem: Problem) -> bool:
    """Whether softcap is computed to the last bit: for float32 inputs, and where 1e-7 of it would show in scores."""
    return problem.dtype is torch.float32 or problem.softcap > _LARGE_SOFTCAP


def functions_of(
    inputs: Inputs, problem: Problem, totals: Sequence[Tensor | None] | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """(the functions that kernels call, by parameter; the arguments of SCORE, DERIVATIVE and MASK, for `rules_of`).

    `totals`: where gradients of captured tensors go; None: this is a forward pass, which has no DERIVATIVE.
    """
    rest, key = region(problem.mask).rest, problem.score_mod
    quick = problem.dtype is not torch.float32
    score = lower.score_hook(key, inputs.score, quick) if key else None
    derivative = lower.derivative_hook(key, totals, quick) if key and totals is not None else None
    mask = lower.mask_hook(rest, inputs.mask) if rest else None
    functions = {"SCORE": score and score.function, "MASK": mask and mask.function}
    if totals is not None:
        functions["DERIVATIVE"] = derivative and derivative.function
    return functions, [hook and (hook.arguments or None) for hook in (score, derivative, mask)]


def beside(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """What kernels read beside queries, keys, values and lists of tiles."""
    *plain, mask, score, scaled = inputs[3:]
    return (*plain, *mask, *score, *scaled)
