"""Launches of a call over a KV cache: rows are appended, parts of the keys attended to, and the parts joined."""

from typing import Any

import torch
from torch import Tensor

from flashtile.backends.portable.decode import decode_kernel
from flashtile.backends.portable.launch import Call, Machine
from flashtile.backends.portable.meta import block, copy_engine, cut, meta_of
from flashtile.kernels.arguments import beside, numbers_of, rows_of, size_of
from flashtile.kernels.caches import append_kernel, cache_of, combine_kernel, rotary_of, scale_of, stored
from flashtile.kernels.tape import Tape, perform
from flashtile.kernels.words import Cache, Parts, odd
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.region import region
from flashtile.tuning.decoding import COLUMNS, COMBINE, DecodeConfig, append_rows
from flashtile.tuning.portable import Tiles

KERNELS = (append_kernel, decode_kernel, combine_kernel)


def decode(
    inputs: Inputs,
    cache: CacheTensors,
    problem: Problem,
    config: DecodeConfig,
    machine: Machine = Machine(),
    memory: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, splits = inputs.q, config.splits
    out, lse = _results(problem, 1, problem.out_dtype, q.device)
    parts = _results(problem, splits, torch.float32, q.device) if splits > 1 else (out, lse)
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device) if cache.rotary_cos is not None else q

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine._replace(tape=tape), inputs, problem)
        words = cache_of(cache)
        _append(call, cache, words, turned)
        _attend(call, cache, words, config, turned, parts)
        if splits > 1:
            _combine(call, config, parts, (out, lse))

    tensors = (q, inputs.k, inputs.v, out, lse, *parts, turned, *cache, *beside(inputs))
    perform(launches, tensors, memory)
    return out, lse


def _results(problem: Problem, splits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for (out, lse) of each part, one part after the other."""
    batch, rows, heads = splits * problem.batch, problem.seqlen_q, problem.heads
    out = torch.empty((batch, rows, heads, problem.headdim_v), dtype=dtype, device=device)
    return out, torch.empty((batch, heads, rows), dtype=torch.float32, device=device)


def _early(call: Call) -> bool:
    """Whether a kernel may be launched before the one that it waits for has ended: with sm_90 and later."""
    there = call.machine.copy_engine
    return copy_engine(call.inputs.q.device) if there is None else there


def _append(call: Call, cache: CacheTensors, words: Cache, turned: Tensor) -> None:
    """New rows, and queries that are to be turned."""
    problem, inputs, cached = call.problem, call.inputs, call.problem.cached
    if cached is None or cache.k is None or cache.v is None:
        return
    rotary = rotary_of(cache)
    heads = problem.heads_kv + (problem.heads if rotary is not None else 0)
    rows = max(cached.appended, problem.seqlen_q if rotary is not None else 0)
    tile = append_rows(rows, max(problem.headdim, problem.headdim_v))
    count = -(-rows // tile)
    window = region(problem.mask)
    call.run(
        append_kernel,
        problem.batch * heads * count,
        Tiles(tile, tile, 1, 1),
        *(rows_of(cache.k), rows_of(cache.v), stored(inputs.k), stored(inputs.v)),
        *(rows_of(inputs.q), rows_of(turned), words, scale_of(cache.k_scale), scale_of(cache.v_scale), rotary),
        *(size_of(problem, heads, count), odd(problem.heads_kv)),
        TILE=tile,
        DIM=problem.headdim,
        DIM_V=problem.headdim_v,
        BLOCK=block(problem.headdim),
        BLOCK_V=block(problem.headdim_v),
        HALF=cached.rotary // 2,
        INTERLEAVED=cached.interleaved,
        MOVING=window.left is not None or window.right is not None,
        PAGE=cached.page,
        EARLY=_early(call),
        enable_fp_fusion=True,
    )


def _attend(
    call: Call, cache: CacheTensors, words: Cache, config: DecodeConfig, q: Tensor, parts: tuple[Tensor, Tensor]
) -> None:
    problem, inputs = call.problem, call.inputs
    parted = Parts(odd(config.splits), None if config.part is None else odd(config.part), odd(problem.batch))
    latent = _latent(inputs, problem)
    early = _early(call)
    after = early and cache.k is not None
    launched = {"launch_pdl": True} if after else {}

    def attempt(tiles: Tiles) -> None:
        count = -(-problem.seqlen_q * problem.group // tiles.tile_q)
        call.run(
            decode_kernel,
            problem.batch * config.splits * problem.heads_kv * count,
            tiles,
            *(rows_of(q), stored(inputs.k), stored(inputs.v), rows_of(parts[0]), numbers_of(parts[1]), words),
            *(scale_of(cache.k_scale), scale_of(cache.v_scale)),
            *(size_of(problem, problem.heads_kv, count), call.rules, parted, inputs.sinks),
            META=meta_of(problem, tiles, False, False, False, latent=latent),
            AFTER=after,
            EARLY=early and config.splits > 1,
            enable_fp_fusion=call.fused(),
            **launched,
        )

    call.fit(decode_kernel, config.tiles, attempt, meta_of(problem, config.tiles, False, False, False, latent=latent))


def _latent(inputs: Inputs, problem: Problem) -> bool:
    """Whether values are the first columns of the keys' first tile, as in multi-head latent attention (DeepSeek-V2,
    section 2.1): they are then read once."""
    k, v = inputs.k, inputs.v
    return v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and problem.headdim_v == cut(problem)[0]


def _combine(call: Call, config: DecodeConfig, parts: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> None:
    problem, early = call.problem, _early(call)
    launched = {"launch_pdl": True} if early else {}
    call.run(
        combine_kernel,
        problem.batch * problem.heads * problem.seqlen_q,
        Tiles(1, COMBINE, max(1, block(problem.headdim_v) // COLUMNS), 1),
        *(rows_of(parts[0]), numbers_of(parts[1]), rows_of(whole[0]), numbers_of(whole[1])),
        *(size_of(problem, problem.heads, problem.seqlen_q), Parts(odd(config.splits), None, odd(problem.batch))),
        DIM=problem.headdim_v,
        BLOCK=block(problem.headdim_v),
        AT_ONCE=COMBINE,
        EARLY=early,
        enable_fp_fusion=True,
        **launched,
    )
