"""Launches of latent attention over a KV cache: as the portable backend's, with another sweep."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.hopper import calls
from flashtile.backends.hopper.calls import Call, Machine
from flashtile.backends.hopper.descriptors import descriptor
from flashtile.backends.hopper.latent import latent_kernel
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels import cached
from flashtile.kernels.arguments import beside, exact, functions_of, modified, numbers_of, rows_of, rules_of, size_of
from flashtile.kernels.caches import cache_of, scale_of
from flashtile.kernels.tape import Tape, perform
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.region import region
from flashtile.tuning.decoding import COLUMNS, LATENT_NARROW, LATENT_REGISTERS, DecodeConfig, parts_at_once

KERNELS = (latent_kernel, *cached.KERNELS)


@dataclass(frozen=True)
class LatentMeta:
    """What the kernel is compiled for, beside types: see `Meta`. page: rows of a page, 0: there are none."""

    tile_kv: int
    stages: int
    narrow: int
    group: int
    page: int
    modified: bool
    exact: bool
    window_top_left: bool
    alibi_top_left: bool


@lru_cache(maxsize=4096)
def meta_of(problem: Problem, config: DecodeConfig) -> LatentMeta:
    return LatentMeta(
        tile_kv=config.tiles.tile_kv,
        stages=config.tiles.stages,
        narrow=LATENT_NARROW if problem.cached is not None and problem.cached.stored is not None else 0,
        group=problem.group,
        page=problem.cached.page if problem.cached is not None else 0,
        modified=modified(problem),
        exact=exact(problem),
        window_top_left=region(problem.mask).top_left,
        alibi_top_left=problem.alignment == "top_left",
    )


def decode(
    inputs: Inputs,
    cache: CacheTensors,
    problem: Problem,
    config: DecodeConfig,
    machine: Machine | None = None,
    memory: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    splits, device = config.splits, inputs.q.device
    out, lse = cached.results(problem, 1, problem.out_dtype, device)
    parts = cached.results(problem, splits, torch.float32, device) if splits > 1 else (out, lse)
    if problem.seqlen_q > 1 and inputs.q.stride(1) != problem.heads * inputs.q.stride(2):
        # Rows of all queries and heads are to lie at one distance.
        inputs = inputs._replace(q=inputs.q.contiguous())
    q = inputs.q
    turned = torch.empty(q.shape, dtype=q.dtype, device=device) if cache.rotary_cos is not None else q

    def launches(tape: Tape | None) -> None:
        functions, arguments = functions_of(inputs, problem, None)
        words = cache_of(cache)
        shared = {"rules": rules_of(inputs, problem, *arguments), "cache": words}
        meta: Any = meta_of(problem, config)
        call = Call(machine or calls.DEVICE, tape, inputs, problem, config, meta, shared, functions)
        _run(call, cached.append(inputs, cache, problem, words, turned, config.append, True))
        _attend(call, cache, turned, parts)
        if splits > 1:
            _run(call, cached.combine(problem, splits, parts, (out, lse), parts_at_once(splits), COLUMNS, True))

    between = (*(parts if splits > 1 else ()), *(() if turned is q else (turned,)))
    perform(launches, (q, inputs.k, out, lse, *between, *cache, *beside(inputs)), memory)
    return out, lse


def _run(call: Call, around: cached.Launch | None) -> None:
    if around is None:
        return
    names = [parameter.name for parameter in around.kernel.params]
    given = dict(zip(names, around.arguments, strict=False)) | around.constants
    call.launch(around.kernel, around.programs, given, num_warps=around.warps, **_early(around.early))


def _early(early: bool) -> Mapping[str, bool]:
    """Launched before the kernel that it waits for has ended."""
    return {"launch_pdl": True} if early else {}


def _attend(call: Call, cache: CacheTensors, q: Tensor, parts: tuple[Tensor, Tensor]) -> None:
    problem, config, rows = call.problem, call.config, ROWS.value
    tiles = -(-problem.seqlen_q * problem.heads // rows)
    columns, rest = problem.headdim_v, problem.headdim - problem.headdim_v
    packed = q.as_strided(
        (problem.batch, problem.seqlen_q * problem.heads, 1, problem.headdim),
        (q.stride(0), q.stride(2), q.stride(2), 1),
    )
    after = cache.k is not None
    given = {
        "q_desc": descriptor(packed, rows, columns),
        "q_rest_desc": descriptor(packed, rows, 2 * rest),
        "k_desc": descriptor(call.inputs.k, config.tiles.tile_kv, columns),
        "k_rest_desc": descriptor(call.inputs.k, config.tiles.tile_kv, rest),
        "out": rows_of(parts[0]),
        "lse": numbers_of(parts[1]),
        "size": size_of(problem, 1, tiles),
        "parts": cached.parts_of(problem, config.splits, config.part),
        "AFTER": after,
        "k_scale": scale_of(cache.k_scale),
        "v_scale": scale_of(cache.v_scale),
        "EARLY": config.splits > 1,
        **call.shared,
    }
    programs = problem.batch * config.splits * tiles
    call.launch(latent_kernel, programs, given, num_warps=4, maxnreg=LATENT_REGISTERS, **_early(after))
