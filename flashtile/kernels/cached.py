"""What goes on around a sweep over a KV cache, any backend's: rows are appended before, parts are joined after."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashtile.kernels.arguments import memory_for, numbers_of, rows_of, size_of
from flashtile.kernels.caches import append_kernel, rotary_of, scale_of, stored
from flashtile.kernels.joining import combine_kernel
from flashtile.kernels.words import Cache, Parts, odd
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.region import region

KERNELS = (append_kernel, combine_kernel)


class Launch(NamedTuple):
    """A kernel's arguments in order, then its constants by name. warps: of a program; early: it is launched before the
    kernel that it waits for has ended."""

    kernel: Any
    programs: int
    warps: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    early: bool = False


def results(problem: Problem, splits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for (out, lse) of each part, one part after the other."""
    batch, rows, heads = splits * problem.batch, problem.seqlen_q, problem.heads
    out = memory_for((batch, rows, heads, problem.headdim_v), dtype, device)
    return out, memory_for((batch, heads, rows), torch.float32, device)


def parts_of(problem: Problem, splits: int, part: int | None) -> Parts:
    """How the keys are cut, in the kernels' words: see `DecodeConfig`."""
    return Parts(odd(splits), None if part is None else odd(part), odd(problem.batch))


def append(
    inputs: Inputs,
    cache: CacheTensors,
    problem: Problem,
    words: Cache,
    turned: Tensor,
    most: int,
    early: bool,
) -> Launch | None:
    """New rows, and queries that are to be turned; None: there are none. most: rows of a program, a power of two.
    early: the next kernel may begin meanwhile."""
    cached = problem.cached
    if cached is None or cache.k is None or cache.v is None:
        return None
    rotary = rotary_of(cache)
    heads = problem.heads_kv + (problem.heads if rotary is not None else 0)
    rows = max(cached.appended, problem.seqlen_q if rotary is not None else 0)
    tile = min(most, triton.next_power_of_2(max(1, rows)))
    count = -(-rows // tile)
    window = region(problem.mask)
    arguments = (
        *(rows_of(cache.k), rows_of(cache.v), stored(inputs.k), stored(inputs.v)),
        *(rows_of(inputs.q), rows_of(turned), words, scale_of(cache.k_scale), scale_of(cache.v_scale), rotary),
        *(size_of(problem, heads, count), odd(problem.heads_kv)),
    )
    constants = {
        "TILE": tile,
        "DIM": problem.headdim,
        "DIM_V": problem.headdim_v,
        "BLOCK": _block(problem.headdim),
        "BLOCK_V": _block(problem.headdim_v),
        "HALF": cached.rotary // 2,
        "INTERLEAVED": cached.interleaved,
        "MOVING": window.left is not None or window.right is not None,
        "PAGE": cached.page,
        "EARLY": early,
    }
    return Launch(append_kernel, problem.batch * heads * count, 1, arguments, constants)


def combine(
    problem: Problem,
    splits: int,
    parts: tuple[Tensor, Tensor],
    whole: tuple[Tensor, Tensor],
    at_once: int,
    columns: int,
    early: bool,
) -> Launch:
    """Parts become one, `at_once` of them at a time; columns: of a warp."""
    arguments = (
        *(rows_of(parts[0]), numbers_of(parts[1]), rows_of(whole[0]), numbers_of(whole[1])),
        *(size_of(problem, problem.heads, problem.seqlen_q), parts_of(problem, splits, None)),
    )
    block = _block(problem.headdim_v)
    constants = {"DIM": problem.headdim_v, "BLOCK": block, "AT_ONCE": at_once, "ALL": splits <= at_once, "EARLY": early}
    programs = problem.batch * problem.heads * problem.seqlen_q
    return Launch(combine_kernel, programs, max(1, block // columns), arguments, constants, early)


def _block(columns: int) -> int:
    """Columns of a tile."""
    return max(16, triton.next_power_of_2(columns))
