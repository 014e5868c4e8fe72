"""The backward kernels (FlashAttention-2, Dao 2023, algorithm 2, split in two so that nothing is summed by atomics).

With P = exp(S - lse) recomputed tile by tile and delta = rowsum(dO * O) - dlse,

    dP = dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dV = P^T dO,  dK = scale dS^T Q.

One kernel walks the key tiles of a query tile and gives dQ; one walks the query tiles of a key tile, of all the query
heads that share it, and gives dK and dV, or in two launches one after the other, where both do not fit into registers.
Every sum has a fixed order: results repeat bit for bit.
"""

import triton
import triton.language as tl

from flashtile.kernels.places import (
    diagonal_of,
    key_range,
    keys_of_tile,
    locate,
    masked_in,
    phases_of,
    query_range,
    query_span,
    stats_pointers,
    steps_of,
    tile_at,
    with_head,
)
from flashtile.kernels.rules import alibi_distance, allowed, grad_scores, has_nan, kept, only_seen
from flashtile.kernels.tiles import (
    dots,
    load_aside,
    load_kept,
    load_kept_queries,
    load_queries,
    load_stats,
    load_tile,
    open_keys,
    open_tiles,
    store_rows,
)


@triton.jit
def delta_kernel(out, grad_out, grad_lse, delta, packing, size, META: tl.constexpr):
    """delta = rowsum(dO * O) - dlse, a query tile a program."""
    place = locate(packing, size, None, META.tile_q, False, False, False)
    o_query = place.tile * META.tile_q + tl.arange(0, META.tile_q)
    b_out = load_queries(out, place, o_query, META.headdim_v, META.block_dv)
    b_grad = load_queries(grad_out, place, o_query, META.headdim_v, META.block_dv)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(stats_pointers(grad_lse, place, o_query), mask=o_query < place.seqlen_q, other=0.0)
    tl.store(stats_pointers(delta, place, o_query), b_delta, mask=o_query < place.seqlen_q)


@triton.jit
def query_sweep(
    b_dq, b_slope, b_q, b_grad_out, b_lse, b_delta, o_query, keys, values, place, rules, steps,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """dQ of a query tile, and the slope's gradient, from the key tiles that `steps` names. GUARDED: see
    `forward_sweep`; gradients of captured tensors were added the time before."""
    TILE: tl.constexpr = META.tile_kv
    o_rows = o_query[:, None]
    STAGES: tl.constexpr = 1 if GUARDED else None
    # Of more columns warps would make some products twice; beside a function of scores there are no registers left.
    KEYS_ASIDE: tl.constexpr = META.aside and META.block_d <= 64 and SCORE is None
    LISTS: tl.constexpr = META.masked == "lists"
    i_next = tile_at(steps, steps.begin, LISTS)
    for i_step in tl.range(steps.begin, steps.end, num_stages=STAGES, disable_licm=META.lean):
        i_tile = i_next
        i_next = tile_at(steps, i_step + 1, LISTS)
        o_columns = (i_tile * TILE + tl.arange(0, TILE))[None, :]
        if KEYS_ASIDE:
            b_k = load_aside(keys, i_tile, META.headdim, TILE, META.block_d)
        else:
            b_k = load_tile(keys, i_tile, META.headdim, TILE, META.block_d, META.tma)
        if META.aside:
            b_v = load_aside(values, i_tile, META.headdim_v, TILE, META.block_dv)
        else:
            b_v = load_tile(values, i_tile, META.headdim_v, TILE, META.block_dv, META.tma)
        if GUARDED and MASKED == "always":
            b_k = only_seen(allowed(place, rules, o_rows, o_columns, META, MASK), b_k)
        m_kept = None
        if rules.dropout is not None:
            m_kept = kept(rules, place, o_query, i_tile * TILE, TILE)
        b_dots = dots(b_q, b_k, META)
        b_grad_weights = dots(b_grad_out, b_v, META)
        m_edge = (i_step < steps.full_begin) | (i_step >= steps.full_end)
        _, b_grad, b_outer = grad_scores(
            b_dots, b_grad_weights, b_lse[:, None], b_delta[:, None], m_kept, m_edge, o_rows, o_columns, place, rules,
            META, SCORE, DERIVATIVE, MASK, MASKED, GUARDED, not GUARDED,
        )  # fmt: skip
        if META.slope_gradient:
            b_slope -= tl.sum(b_outer * alibi_distance(place, o_rows, o_columns, META), 1)
        b_dq = tl.dot(b_grad.to(b_k.dtype), b_k, b_dq, input_precision=META.precision)
    return b_dq, b_slope


@triton.jit
def walk_keys_back(
    b_q, b_grad_out, b_lse, b_delta, o_query, keys, values, place, rules, visits,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """(dQ, the slope's gradient) of a query tile from all key tiles that it meets."""
    TILE: tl.constexpr = META.tile_q
    LISTS: tl.constexpr = META.masked == "lists"
    BLOCK_D: tl.constexpr = META.block_d
    b_dq = tl.zeros([TILE, BLOCK_D], tl.float32)
    b_slope = tl.zeros([TILE], tl.float32)
    begin, full_begin, full_end, end = keys_of_tile(place, rules.window, META)
    for PHASE in tl.static_range(phases_of(LISTS, GUARDED)):
        steps = steps_of(visits, place, begin, full_begin, full_end, end, LISTS, PHASE, GUARDED)
        b_dq, b_slope = query_sweep(
            b_dq, b_slope, b_q, b_grad_out, b_lse, b_delta, o_query, keys, values, place, rules, steps,
            META, SCORE, DERIVATIVE, MASK, masked_in(META.masked, PHASE, GUARDED), GUARDED,
        )  # fmt: skip
    return b_dq, b_slope


@triton.jit
def query_kernel(
    q, k, v, grad_out, lse, delta, dq, slope, packing, size, rules, visits,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dQ, and each query's part of its slope's gradient; gradients of captured tensors are added on the way."""
    TILE: tl.constexpr = META.tile_q
    place = locate(packing, size, visits, TILE, False, META.reversed, META.masked == "lists")
    o_query = place.tile * TILE + tl.arange(0, TILE)
    b_q = load_kept_queries(q, place, META.headdim, META.block_d, META)
    b_grad_out = load_kept_queries(grad_out, place, META.headdim_v, META.block_dv, META).to(b_q.dtype)
    b_lse, b_delta = load_stats(lse, delta, place, o_query, META.packed)
    keys, values = open_keys(k, v, place, rules.window, META)
    b_dq, b_slope = walk_keys_back(
        b_q, b_grad_out, b_lse, b_delta, o_query, keys, values, place, rules, visits,
        META, SCORE, DERIVATIVE, MASK, False,
    )  # fmt: skip
    if META.repeats:
        if has_nan(b_dq):  # it may come from a key that nobody sees
            b_dq, b_slope = walk_keys_back(
                b_q, b_grad_out, b_lse, b_delta, o_query, keys, values, place, rules, visits,
                META, SCORE, DERIVATIVE, MASK, True,
            )  # fmt: skip
    b_dq *= rules.scale
    store_rows(dq, place.batch, place.head, place.first_q, o_query, place.seqlen_q, b_dq, META.headdim, META.block_d)
    if META.slope_gradient:
        tl.store(stats_pointers(slope, place, o_query), b_slope, mask=o_query < place.seqlen_q)


@triton.jit
def key_sweep(
    b_dk, b_dv, b_k, b_v, queries, grads, lse, delta, place, rules, steps,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a key tile from the query tiles of one head that `steps` names; scores lie (keys, queries)."""
    TILE: tl.constexpr = META.tile_q
    first_key = place.tile * META.tile_kv
    o_columns = (first_key + tl.arange(0, META.tile_kv))[:, None]
    STAGES: tl.constexpr = 1 if GUARDED else None
    LISTS: tl.constexpr = META.masked == "lists"
    i_next = tile_at(steps, steps.begin, LISTS)
    for i_step in tl.range(steps.begin, steps.end, num_stages=STAGES, disable_licm=META.lean):
        i_tile = i_next
        i_next = tile_at(steps, i_step + 1, LISTS)
        o_query = i_tile * TILE + tl.arange(0, TILE)
        b_q = load_tile(queries, i_tile, META.headdim, TILE, META.block_d, META.tma)
        b_grad_out = load_tile(grads, i_tile, META.headdim_v, TILE, META.block_dv, META.tma).to(b_k.dtype)
        b_lse, b_delta = load_stats(lse, delta, place, o_query, META.packed)
        m_kept = None
        if rules.dropout is not None:
            m_kept = tl.trans(kept(rules, place, o_query, first_key, META.tile_kv))
        b_dots = dots(b_k, b_q, META)
        b_grad_weights = b_dots  # for dV alone nobody asks for it
        if META.gives != "dv":
            b_grad_weights = dots(b_v, b_grad_out, META)
        m_edge = (i_step < steps.full_begin) | (i_step >= steps.full_end)
        b_weights, b_grad, _ = grad_scores(
            b_dots, b_grad_weights, b_lse[None, :], b_delta[None, :], m_kept, m_edge, o_query[None, :], o_columns,
            place, rules, META, SCORE, DERIVATIVE, MASK, MASKED, GUARDED and MASKED == "always", False,
        )  # fmt: skip
        if META.gives != "dk":
            b_dv = tl.dot(b_weights.to(b_grad_out.dtype), b_grad_out, b_dv, input_precision=META.precision)
        if META.gives != "dv":
            b_dk = tl.dot(b_grad.to(b_q.dtype), b_q, b_dk, input_precision=META.precision)
    return b_dk, b_dv


@triton.jit
def open_queries(q, grad_out, place, begin, end, window, META: tl.constexpr):
    """The `Source`s of queries and of their outputs' gradients."""
    i_batch, i_head, first = place.batch, place.head, place.first_q
    NONE: tl.constexpr = window.left is not None or window.right is not None
    queries = open_tiles(q, i_batch, i_head, first, begin, end, META.headdim, META.tile_q, META.block_d, META.tma, NONE)
    grads = open_tiles(
        grad_out, i_batch, i_head, first, begin, end, META.headdim_v, META.tile_q, META.block_dv, META.tma, NONE
    )
    return queries, grads


@triton.jit
def walk_queries(
    b_k, b_v, q, grad_out, lse, delta, shared, rules, visits,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """(dK, dV) of a key tile from all query tiles that it meets, of all heads that share it."""
    TILE: tl.constexpr = META.tile_kv
    LISTS: tl.constexpr = META.masked == "lists"
    BLOCK_D: tl.constexpr = META.block_d
    BLOCK_DV: tl.constexpr = META.block_dv
    b_dk = tl.zeros([TILE, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE, BLOCK_DV], tl.float32)
    first_key = shared.tile * TILE
    last_key = tl.minimum(first_key + TILE, shared.seqlen_k) - 1
    diagonal = diagonal_of(shared, META.window_top_left)
    begin_row, end_row = query_range(rules.window, diagonal, first_key, last_key, shared.seqlen_q)
    begin, full_begin, full_end, end = query_span(
        rules.window, diagonal, first_key, last_key, shared.seqlen_q, META.tile_q
    )
    for i_member in tl.range(0, META.group, disable_licm=META.lean):
        place = with_head(shared, shared.head * META.group + i_member)
        queries, grads = open_queries(q, grad_out, place, begin_row, end_row, rules.window, META)
        for PHASE in tl.static_range(phases_of(LISTS, GUARDED)):
            steps = steps_of(visits, place, begin, full_begin, full_end, end, LISTS, PHASE, GUARDED)
            b_dk, b_dv = key_sweep(
                b_dk, b_dv, b_k, b_v, queries, grads, lse, delta, place, rules, steps,
                META, SCORE, DERIVATIVE, MASK, masked_in(META.masked, PHASE, GUARDED), GUARDED,
            )  # fmt: skip
    return b_dk, b_dv


@triton.jit
def key_kernel(
    q, k, v, grad_out, lse, delta, dk, dv, packing, size, rules, visits,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dK and dV of a key tile, or one of them, from all query heads that share it."""
    TILE: tl.constexpr = META.tile_kv
    shared = locate(packing, size, visits, TILE, True, False, META.masked == "lists")  # its head is one of the keys'
    i_batch, i_head, first, seqlen_k = shared.batch, shared.head, shared.first_k, shared.seqlen_k
    o_key = shared.tile * TILE + tl.arange(0, TILE)
    diagonal = diagonal_of(shared, META.window_top_left)
    seen, unseen = key_range(rules.window, diagonal, 0, shared.seqlen_q - 1, seqlen_k)
    first_key = shared.tile * TILE
    b_k = load_kept(k, i_batch, i_head, first, first_key, seen, unseen, TILE, META.headdim, META.block_d, META)
    b_v = load_kept(v, i_batch, i_head, first, first_key, seen, unseen, TILE, META.headdim_v, META.block_dv, META)
    b_dk, b_dv = walk_queries(
        b_k, b_v, q, grad_out, lse, delta, shared, rules, visits, META, SCORE, DERIVATIVE, MASK, False
    )
    if META.repeats:
        if has_nan(b_dk) | has_nan(b_dv):  # it may come from what nobody sees
            b_dk, b_dv = walk_queries(
                b_k, b_v, q, grad_out, lse, delta, shared, rules, visits, META, SCORE, DERIVATIVE, MASK, True
            )
    if META.gives != "dv":
        store_rows(dk, i_batch, i_head, first, o_key, seqlen_k, b_dk * rules.scale, META.headdim, META.block_d)
    if META.gives != "dk":
        store_rows(dv, i_batch, i_head, first, o_key, seqlen_k, b_dv, META.headdim_v, META.block_dv)
