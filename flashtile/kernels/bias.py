"""The gradient of a bias, in its own shape: no full-size memory, sums in a fixed order."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.arguments import grid_of, size_of
from flashtile.kernels.places import diagonal_of, key_range, lengths_of, number_of, program_of
from flashtile.kernels.rules import grad_scores, kept
from flashtile.kernels.tiles import dots, load_queries, load_rows, load_stats
from flashtile.kernels.words import Place
from flashtile.problem import Problem
from flashtile.scores import four_dimensions

PROGRAMS = 1024
"""Of the kernel, up to which the entries that share a bias are shared out among more of them: enough for any GPU."""

LEAST = 8
"""Entries that one sums up at least, so that partial sums take an eighth of a full-size bias, and mostly far less."""


@dataclass(frozen=True)
class Sums:
    """A gradient that is added to `total`, through `partial`, which may be the same memory; `given`: what the kernel
    is told of it, `programs`: how many of it."""

    total: Tensor
    partial: Tensor
    given: dict[str, Any]
    programs: int

    @classmethod
    def of(cls, problem: Problem, total: Tensor, tile_q: int, tile_kv: int) -> "Sums":
        """For tiles of so many queries and keys."""
        total = four_dimensions(total)
        rows, columns = total.shape[2:]
        longest_q = rows if rows > 1 else problem.max_seqlen_q or problem.seqlen_q
        longest_k = columns if columns > 1 else problem.max_seqlen_k or problem.seqlen_kv
        sum_keys = columns == 1 and longest_k > 1
        sum_queries = rows == 1 and longest_q > 1 and not sum_keys
        tiles_q, tiles_k = -(-longest_q // tile_q), -(-longest_k // tile_kv)
        count = tiles_q if sum_keys else tiles_k if sum_queries else tiles_q * tiles_k
        if sum_keys or sum_queries:
            # One row of partial sums an entry and head, so that there are enough programs.
            grid_rows, grid_columns = (longest_q, 1) if sum_keys else (1, longest_k)
            partial = torch.zeros((problem.batch, problem.heads, grid_rows, grid_columns), device=total.device)
        else:
            entries = total.shape[0]
            parts = parts_of(problem.batch // entries, count * entries * total.shape[1], entries > 1)
            partial = total if parts == 1 else torch.empty((entries * parts, *total.shape[1:]), device=total.device)
        given = {
            "grad": grid_of(partial),
            "size": size_of(problem, partial.shape[1], count),
            "heads": problem.heads // partial.shape[1],
            "batches": -(-problem.batch // partial.shape[0]),
            "entries": problem.batch,
            "tiles_q": tiles_q,
            "tiles_k": tiles_k,
            "SUM_QUERIES": sum_queries,
            "SUM_KEYS": sum_keys,
        }
        return cls(total, partial, given, count * partial.shape[0] * partial.shape[1])

    def join(self) -> None:
        """Once the kernel has run."""
        if self.partial is not self.total:
            of_each = self.partial.unflatten(0, (self.total.shape[0], -1)).sum(1)
            self.total.add_(of_each.sum_to_size(self.total.shape))


def parts_of(sharing: int, programs: int, alike: bool = False) -> int:
    """Into how many parts the entries that share a bias are cut, each with a sum and programs of its own; `alike`: of
    equal size, as parts that follow those of another entry of the bias must be."""
    most = max(1, min(sharing // LEAST, PROGRAMS // max(1, programs)))
    return next(parts for parts in range(most, 0, -1) if not alike or sharing % parts == 0)


@triton.jit
def bias_tile(
    q, k, v, grad_out, lse, delta, place, rules, first_row, first_key, begin_key, end_key,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dS of one tile of one head, where the bias joins."""
    o_query = first_row + tl.arange(0, META.tile_q)
    o_key = first_key + tl.arange(0, META.tile_kv)
    i_head = place.head // META.group
    b_q = load_queries(q, place, o_query, META.headdim, META.block_d)
    b_grad_out = load_queries(grad_out, place, o_query, META.headdim_v, META.block_dv)
    b_k = load_rows(k, place.batch, i_head, place.first_k, o_key, begin_key, end_key, META.headdim, META.block_d)
    b_v = load_rows(v, place.batch, i_head, place.first_k, o_key, begin_key, end_key, META.headdim_v, META.block_dv)
    b_lse, b_delta = load_stats(lse, delta, place, o_query, META.packed)
    b_dots = dots(b_q, b_k, META)
    b_grad_weights = dots(b_grad_out.to(b_v.dtype), b_v, META)
    # After the products: drawing exchanges numbers through shared memory, and no barrier may come between the stores of
    # operands and the fence that shows them to the tensor cores.
    m_kept = None
    if rules.dropout is not None:
        m_kept = kept(rules, place, o_query, first_key, META.tile_kv)
    _, _, b_outer = grad_scores(
        b_dots, b_grad_weights, b_lse[:, None], b_delta[:, None], m_kept, True, o_query[:, None], o_key[None, :],
        place, rules, META, SCORE, DERIVATIVE, MASK, "always", True, False,
    )  # fmt: skip
    return b_outer


@triton.jit
def reach(place, rules, first_row, first_key, META: tl.constexpr):
    """(the first key that a tile's queries see, where the last one ends, whether any lies in the tile)."""
    last_row = tl.minimum(first_row + META.tile_q, place.seqlen_q) - 1
    diagonal = diagonal_of(place, META.window_top_left)
    begin_key, end_key = key_range(rules.window, diagonal, first_row, last_row, place.seqlen_k)
    seen = (first_row < place.seqlen_q) & (first_key < end_key) & (first_key + META.tile_kv > begin_key)
    return begin_key, end_key, seen


@triton.jit
def store_bias(grad, i_batch, i_head, first_row, first_key, b_sum, SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr):
    """A tile of the gradient, or the row or column that its sum is."""
    rows = number_of(grad.rows)
    columns = number_of(grad.columns)
    base = grad.pointer + i_batch.to(tl.int64) * number_of(grad.batch) + i_head.to(tl.int64) * number_of(grad.head)
    o_query = first_row + tl.arange(0, b_sum.shape[0])
    o_key = first_key + tl.arange(0, b_sum.shape[1])
    if SUM_QUERIES:
        tl.store(base + o_key, tl.sum(b_sum, 0), mask=o_key < columns)
    elif SUM_KEYS:
        tl.store(base + o_query, tl.sum(b_sum, 1), mask=o_query < rows)
    else:
        pointers = base + o_query.to(tl.int64)[:, None] * columns + o_key[None, :]
        tl.store(pointers, b_sum, mask=(o_query < rows)[:, None] & (o_key < columns)[None, :])


@triton.jit(do_not_specialize=["heads", "batches", "entries", "tiles_q", "tiles_k"])
def bias_kernel(
    q, k, v, grad_out, lse, delta, grad, packing, size, rules, heads, batches, entries, tiles_q, tiles_k,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr,
    SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient: the sum of dS over the entries and heads (or queries, or keys) that share it.

    `size.heads`, `size.tiles`: heads, and tiles of one head, of `grad`. `heads`, `batches`: how many of each share one,
    of `entries` in all.
    """
    TILE_Q: tl.constexpr = META.tile_q
    TILE_KV: tl.constexpr = META.tile_kv
    i_batch_grad, i_head_grad, i_tile = program_of(size)
    across = 1 if SUM_KEYS else tiles_k
    i_tile_q = i_tile // across
    i_tile_k = i_tile % across
    b_sum = tl.zeros([TILE_Q, TILE_KV], tl.float32)
    steps = tiles_q if SUM_QUERIES else (tiles_k if SUM_KEYS else 1)
    first = i_batch_grad * batches
    # One loop, so that tiles come while those before are worked on. Where all entries are of one length a tile that
    # the window hides is hidden in all of them, and nothing is asked in there.
    ALIKE: tl.constexpr = not SUM_QUERIES and not SUM_KEYS and packing.sequences is None
    members = tl.minimum(batches, entries - first) * heads
    if ALIKE:
        _, _, seqlen_q, seqlen_k = lengths_of(packing, size, 0)
        place = Place(0, 0, i_tile, 0, 0, seqlen_q, seqlen_k)
        _, _, seen = reach(place, rules, i_tile_q * TILE_Q, i_tile_k * TILE_KV, META)
        members = tl.where(seen, members, 0)
    for i_turn in tl.range(0, members * steps):
        i_member = i_turn // steps
        i_step = i_turn % steps
        i_batch = first + i_member // heads
        first_q, first_k, seqlen_q, seqlen_k = lengths_of(packing, size, i_batch)
        place = Place(i_batch, i_head_grad + i_member % heads, i_tile, first_q, first_k, seqlen_q, seqlen_k)
        first_row = (i_step if SUM_QUERIES else i_tile_q) * TILE_Q
        first_key = (i_step if SUM_KEYS else i_tile_k) * TILE_KV
        begin_key, end_key, seen = reach(place, rules, first_row, first_key, META)
        if ALIKE:
            b_sum += bias_tile(
                q, k, v, grad_out, lse, delta, place, rules, first_row, first_key, begin_key, end_key,
                META, SCORE, DERIVATIVE, MASK,
            )  # fmt: skip
        elif seen:
            b_sum += bias_tile(
                q, k, v, grad_out, lse, delta, place, rules, first_row, first_key, begin_key, end_key,
                META, SCORE, DERIVATIVE, MASK,
            )  # fmt: skip
    store_bias(grad, i_batch_grad, i_head_grad, i_tile_q * TILE_Q, i_tile_k * TILE_KV, b_sum, SUM_QUERIES, SUM_KEYS)
