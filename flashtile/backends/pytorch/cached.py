"""Calls over a KV cache on the PyTorch backend: rows are appended, then one sequence after the other is dense."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashtile import check, kvcache
from flashtile.backends import Memory
from flashtile.backends.pytorch import native, sweep
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.region import region
from flashtile.tuning.cpu import SweepConfig

Dense = Callable[[Inputs, Problem, SweepConfig, int], tuple[Tensor, Tensor]]


def refuses_native(problem: Problem) -> str | None:
    """What stands against PyTorch's own operator for each sequence: it takes one query, which sees all keys."""
    if problem.cached is not None and problem.cached.stored is not None:
        return "the cache is quantised"
    return native.refuses(_plain(problem))


def _plain(problem: Problem) -> Problem:
    """The same without the mask, where that hides nothing."""
    return replace(problem, mask=native.PLAIN) if problem.seqlen_q == 1 and native.causal(problem.mask) else problem


def decode_natively(
    inputs: Inputs, cache: CacheTensors, problem: Problem, config: SweepConfig, memory: Memory
) -> tuple[Tensor, Tensor]:
    """`decode` by PyTorch's own operator."""
    return _one_by_one(inputs, cache, _plain(problem), native.forward)


def decode(
    inputs: Inputs, cache: CacheTensors, problem: Problem, config: SweepConfig, memory: Memory
) -> tuple[Tensor, Tensor]:
    """(out, lse). Reads lengths on the host: on a GPU it waits for them."""
    return _one_by_one(inputs, cache, problem, sweep.forward)


def _one_by_one(inputs: Inputs, cache: CacheTensors, problem: Problem, dense: Dense) -> tuple[Tensor, Tensor]:
    if inputs.q.device.type != "cpu":  # there it was done, before anybody was asked to run
        check.cache_values(inputs, cache, problem)
    cached = problem.cached
    interleaved, appended = (cached.interleaved, cached.appended) if cached is not None else (True, 0)
    kvcache.append(inputs.k, inputs.v, cache, interleaved)
    q = inputs.q
    if cache.rotary_cos is not None and cache.rotary_sin is not None:
        window = region(problem.mask)
        moving = window.left is not None or window.right is not None
        places = kvcache.query_positions(cache, problem.seqlen_q, moving)
        q = kvcache.turned(q, cache.rotary_cos, cache.rotary_sin, places, interleaved)
    out = q.new_zeros(*q.shape[:3], problem.headdim_v, dtype=problem.out_dtype)
    lse = q.new_full((problem.batch, problem.heads, problem.seqlen_q), -torch.inf, dtype=problem.accumulator)
    rows = range(problem.batch) if cache.batch_idx is None else cache.batch_idx.tolist()
    pads = [0] * problem.batch if cache.leftpad is None else cache.leftpad.tolist()
    for index, (row, pad, length) in enumerate(zip(rows, pads, cache.seqlens.tolist(), strict=True)):
        end = length + appended
        stores = ((inputs.k, cache.k_scale), (inputs.v, cache.v_scale))
        k, v = (
            kvcache.gathered(store, cache.block_table, row, pad, end, scale, problem.accumulator)
            for store, scale in stores
        )
        one, here = inputs._replace(q=q[index : index + 1], k=k, v=v), slice(index, index + 1)
        # Tiles for this length alone: bits do not depend on the cache's capacity.
        part = problem.one_sequence(problem.seqlen_q, end - pad)
        out[here], lse[here] = dense(one, part, sweep.configure(part), index)
    return out, lse
