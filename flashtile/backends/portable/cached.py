"""Launches of a call over a KV cache: rows are appended, parts of the keys attended to, and the parts joined."""

from typing import Any

import torch
from torch import Tensor

from flashtile.backends import AGAIN
from flashtile.backends.portable.decode import decode_kernel
from flashtile.backends.portable.launch import Call, Machine
from flashtile.backends.portable.meta import copy_engine, cut, meta_of
from flashtile.kernels import cached
from flashtile.kernels.again import Again, tensors_of
from flashtile.kernels.arguments import numbers_of, rows_of, size_of
from flashtile.kernels.cached import Launch, append, combine, parts_of, results
from flashtile.kernels.caches import cache_of, scale_of, stored
from flashtile.kernels.tape import Tape, perform
from flashtile.kernels.words import Cache
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.tuning.decoding import COLUMNS, DecodeConfig, parts_at_once
from flashtile.tuning.portable import Tiles

KERNELS = (decode_kernel, *cached.KERNELS)


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
    out, lse = results(problem, 1, problem.out_dtype, q.device)
    parts = results(problem, splits, torch.float32, q.device) if splits > 1 else (out, lse)
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device) if cache.rotary_cos is not None else q

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine._replace(tape=tape), inputs, problem)
        words = cache_of(cache)
        early = _early(call)
        _run(call, append(inputs, cache, problem, words, turned, config.append, early))
        _attend(call, cache, words, config, turned, parts, early)
        if splits > 1:
            _run(call, combine(problem, splits, parts, (out, lse), parts_at_once(splits), COLUMNS, early))

    given = (q, inputs.k, inputs.v, *cache, inputs.alibi_slopes, inputs.sinks)
    made = (out, lse, *(parts if splits > 1 else ()), *(() if turned is q else (turned,)))
    tape = perform(launches, (*tensors_of(given), *made), memory)
    if tape is not None and memory is not None:
        memory.setdefault(AGAIN, Again(given, made)).note(tape, given)
    return out, lse


def _early(call: Call) -> bool:
    """Whether a kernel may be launched before the one that it waits for has ended: with sm_90 and later."""
    there = call.machine.copy_engine
    return copy_engine(call.inputs.q.device) if there is None else there


def _run(call: Call, launch: Launch | None) -> None:
    if launch is not None:
        options = {"launch_pdl": True} if launch.early else {}
        tiles = Tiles(1, 1, launch.warps, 1)
        call.run(
            launch.kernel, launch.programs, tiles, *launch.arguments, **launch.constants,
            enable_fp_fusion=True, **options,
        )  # fmt: skip


def _attend(
    call: Call,
    cache: CacheTensors,
    words: Cache,
    config: DecodeConfig,
    q: Tensor,
    parts: tuple[Tensor, Tensor],
    early: bool,
) -> None:
    problem, inputs = call.problem, call.inputs
    parted = parts_of(problem, config.splits, config.part)
    # Values that lie in the keys' first tile of columns are read once.
    latent = problem.cached is not None and problem.cached.latent and problem.headdim_v == cut(problem)[0]
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
