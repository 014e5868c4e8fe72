"""The backward kernels (FlashAttention-2, Dao 2023, algorithm 2, split in two so that nothing is summed by atomics).

With P = exp(S - lse) recomputed tile by tile and delta = rowsum(dO * O) - dlse,

    dP = dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dV = P^T dO,  dK = scale dS^T Q.

One kernel walks the key tiles of a query tile and gives dQ; one walks the query tiles of a key tile, of all the query
heads that share it, and gives dK and dV. Every sum has a fixed order: results repeat bit for bit.
"""

import triton
import triton.language as tl

from flashtile.backends.portable.sweep import (
    LOG2E,
    alibi_distance,
    allowed,
    kept,
    key_range,
    key_span,
    lengths_of,
    load_rows,
    load_tile,
    locate,
    modify,
    number_of,
    open_tiles,
    program_of,
    query_range,
    query_span,
    stats_pointers,
    store_rows,
    visited,
)


@triton.jit
def delta_kernel(out, grad_out, grad_lse, delta, packing, size, META: tl.constexpr):
    """delta = rowsum(dO * O) - dlse, a query tile a program."""
    i_batch, i_head, i_tile, first_q, _, seqlen_q, _ = locate(packing, size, False)
    o_query = i_tile * META.tile_q + tl.arange(0, META.tile_q)
    b_out = load_rows(out, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim_v, META.block_dv)
    b_grad = load_rows(grad_out, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim_v, META.block_dv)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse is not None:
        pointers = stats_pointers(grad_lse, i_batch, i_head, first_q, o_query)
        b_delta -= tl.load(pointers, mask=o_query < seqlen_q, other=0.0)
    tl.store(stats_pointers(delta, i_batch, i_head, first_q, o_query), b_delta, mask=o_query < seqlen_q)


@triton.jit
def load_stats(lse, delta, i_batch, i_head, first_q, o_query, seqlen_q):
    """(lse, delta). Rows that saw no key or do not exist get lse inf: all their weights are 0."""
    m_rows = o_query < seqlen_q
    b_lse = tl.load(stats_pointers(lse, i_batch, i_head, first_q, o_query), mask=m_rows, other=float("inf"))
    b_delta = tl.load(stats_pointers(delta, i_batch, i_head, first_q, o_query), mask=m_rows, other=0.0)
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse), b_delta


@triton.jit
def grad_scores(
    b_dots,
    b_grad_weights,
    b_lse,
    b_delta,
    m_kept,
    m_edge,
    window,
    modifiers,
    dropout,
    i_batch,
    i_head,
    o_query,
    o_key,
    seqlen_q,
    seqlen_k,
    factor,
    scale,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
    COLLECT: tl.constexpr,
):
    """(weights as the values saw them, gradient at the dot products, gradient at the scores before ALiBi).

    The tile lies either way round: `b_lse`, `b_delta`, `o_query` and `o_key` broadcast to it. MASKED: see
    `forward_sweep`; `m_edge`: this is a tile at the edge. COLLECT: gradients of captured tensors are added.
    """
    b_scores = b_dots
    b_capped = b_dots
    b_plain = b_dots
    if META.modified:
        shift = 0 if META.alibi_top_left else seqlen_k - seqlen_q
        b_scores, b_capped, b_plain = modify(
            b_dots * scale, modifiers, i_batch, i_head, o_query, o_key, shift, seqlen_q, seqlen_k, SCORE
        )
    diagonal = 0 if META.window_top_left else seqlen_k - seqlen_q
    m_valid = o_query < seqlen_q
    if MASKED == "edges":
        if m_edge:
            m_tile = allowed(window, modifiers, i_batch, i_head, o_query, o_key, diagonal, seqlen_q, seqlen_k, MASK)
            b_scores = tl.where(m_tile, b_scores, -float("inf"))
    if MASKED == "always":
        m_valid = allowed(window, modifiers, i_batch, i_head, o_query, o_key, diagonal, seqlen_q, seqlen_k, MASK)
        b_scores = tl.where(m_valid, b_scores, -float("inf"))
    if META.modified:
        # The difference first: a large score times log2(e) would be rounded where it is large.
        b_weights = tl.exp2((b_scores - b_lse) * factor)
    else:
        b_weights = tl.exp2(b_scores * factor - b_lse * LOG2E)
    b_dropped = b_weights
    if dropout is not None:
        b_dropped = tl.where(m_kept, b_weights * dropout.factor, 0.0)
        b_grad_weights = tl.where(m_kept, b_grad_weights * dropout.factor, 0.0)
    b_grad = b_weights * (b_grad_weights - b_delta)
    if SCORE is not None:
        b_grad = DERIVATIVE(
            b_plain, i_batch, i_head, o_query, o_key, modifiers.score, modifiers.totals, b_grad, m_valid, COLLECT
        )
    if MASKED == "always":
        # Under the mask a derivative may be infinite, and a key may hold NaN: 0 does not stop them.
        b_grad = tl.where(m_valid, b_grad, 0.0)
    b_outer = b_grad
    if META.modified:
        if modifiers.softcap is not None:
            b_ratio = b_capped / modifiers.softcap
            b_grad *= 1.0 - b_ratio * b_ratio
    return b_dropped, b_grad, b_outer


@triton.jit
def query_sweep(
    b_dq,
    b_slope,
    b_q,
    b_grad_out,
    b_lse,
    b_delta,
    k,
    v,
    k_tiles,
    v_tiles,
    window,
    modifiers,
    dropout,
    i_batch,
    i_head,
    o_query,
    begin_key,
    end_key,
    seqlen_q,
    seqlen_k,
    factor,
    scale,
    p_list,
    begin,
    end,
    full_begin,
    full_end,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dQ of a query tile: its key tiles [begin, end), of the list at `p_list` if there is one."""
    TILE: tl.constexpr = META.tile_kv
    o_rows = o_query[:, None]
    for i_step in tl.range(begin, end):
        i_tile = i_step
        if p_list is not None:
            i_tile = tl.load(p_list + i_step)
        o_columns = (i_tile * TILE + tl.arange(0, TILE))[None, :]
        b_k = load_tile(k_tiles, k, i_tile, begin_key, end_key, META.headdim, TILE, META.block_d, META.tma)
        b_v = load_tile(v_tiles, v, i_tile, begin_key, end_key, META.headdim_v, TILE, META.block_dv, META.tma)
        if MASK is not None and MASKED == "always":
            diagonal = 0 if META.window_top_left else seqlen_k - seqlen_q
            m_tile = allowed(window, modifiers, i_batch, i_head, o_rows, o_columns, diagonal, seqlen_q, seqlen_k, MASK)
            # A weight of 0 does not stop NaN: what no row sees must not be in a product.
            m_seen = tl.max(m_tile.to(tl.int32), 0)[:, None] > 0
            b_k = tl.where(m_seen, b_k, 0.0)
            b_v = tl.where(m_seen, b_v, 0.0)
        m_kept = None
        if dropout is not None:
            m_kept = kept(dropout, i_batch, i_head, o_query, i_tile * TILE, TILE)
        b_dots = tl.dot(b_q, tl.trans(b_k), input_precision=META.precision)
        b_grad_weights = tl.dot(b_grad_out, tl.trans(b_v), input_precision=META.precision)
        m_edge = (i_step < full_begin) | (i_step >= full_end)
        _, b_grad, b_outer = grad_scores(
            b_dots,
            b_grad_weights,
            b_lse[:, None],
            b_delta[:, None],
            m_kept,
            m_edge,
            window,
            modifiers,
            dropout,
            i_batch,
            i_head,
            o_rows,
            o_columns,
            seqlen_q,
            seqlen_k,
            factor,
            scale,
            META,
            SCORE,
            DERIVATIVE,
            MASK,
            MASKED,
            True,
        )
        if META.slope_gradient:
            shift = 0 if META.alibi_top_left else seqlen_k - seqlen_q
            b_slope -= tl.sum(b_outer * alibi_distance(o_rows, o_columns, shift), 1)
        b_dq = tl.dot(b_grad.to(b_k.dtype), b_k, b_dq, input_precision=META.precision)
    return b_dq, b_slope


@triton.jit
def query_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dq,
    slope,
    packing,
    size,
    window,
    visits,
    modifiers,
    dropout,
    factor,
    scale,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
):
    """dQ, and each query's part of its slope's gradient; gradients of captured tensors are added on the way."""
    TILE: tl.constexpr = META.tile_q
    BLOCK_D: tl.constexpr = META.block_d
    i_batch, i_head, i_tile, first_q, first_k, seqlen_q, seqlen_k = locate(packing, size, META.reversed)
    o_query = i_tile * TILE + tl.arange(0, TILE)
    b_q = load_rows(q, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim, META.block_d)
    b_grad_out = load_rows(grad_out, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim_v, META.block_dv)
    b_grad_out = b_grad_out.to(b_q.dtype)
    b_lse, b_delta = load_stats(lse, delta, i_batch, i_head, first_q, o_query, seqlen_q)
    b_dq = tl.zeros([TILE, BLOCK_D], tl.float32)
    b_slope = tl.zeros((TILE,), tl.float32)

    diagonal = 0 if META.window_top_left else seqlen_k - seqlen_q
    first_row = i_tile * TILE
    last_row = tl.minimum(first_row + TILE, seqlen_q) - 1
    begin_key, end_key = key_range(window, diagonal, first_row, last_row, seqlen_k)
    i_head_kv = i_head // META.group
    k_tiles = open_tiles(
        k, i_batch, i_head_kv, first_k, begin_key, end_key, META.headdim, META.tile_kv, META.block_d, META.tma
    )
    v_tiles = open_tiles(
        v, i_batch, i_head_kv, first_k, begin_key, end_key, META.headdim_v, META.tile_kv, META.block_dv, META.tma
    )
    begin, full_begin, full_end, end = key_span(window, diagonal, first_row, last_row, seqlen_k, META.tile_kv)
    p_list = None
    if META.masked == "lists":
        end, every, p_list = visited(visits, i_batch, i_head, i_tile)
        begin = 0
    b_dq, b_slope = query_sweep(
        b_dq,
        b_slope,
        b_q,
        b_grad_out,
        b_lse,
        b_delta,
        k,
        v,
        k_tiles,
        v_tiles,
        window,
        modifiers,
        dropout,
        i_batch,
        i_head,
        o_query,
        begin_key,
        end_key,
        seqlen_q,
        seqlen_k,
        factor,
        scale,
        p_list,
        begin,
        end,
        full_begin,
        full_end,
        META,
        SCORE,
        DERIVATIVE,
        MASK,
        "edges" if META.masked == "edges" else "always",
    )
    if META.masked == "lists":
        b_dq, b_slope = query_sweep(
            b_dq,
            b_slope,
            b_q,
            b_grad_out,
            b_lse,
            b_delta,
            k,
            v,
            k_tiles,
            v_tiles,
            window,
            modifiers,
            dropout,
            i_batch,
            i_head,
            o_query,
            begin_key,
            end_key,
            seqlen_q,
            seqlen_k,
            factor,
            scale,
            p_list,
            end,
            every,
            full_begin,
            full_end,
            META,
            SCORE,
            DERIVATIVE,
            MASK,
            "never",
        )
    store_rows(dq, i_batch, i_head, first_q, o_query, seqlen_q, b_dq * scale, META.headdim, META.block_d)
    if META.slope_gradient:
        tl.store(stats_pointers(slope, i_batch, i_head, first_q, o_query), b_slope, mask=o_query < seqlen_q)


@triton.jit
def key_sweep(
    b_dk,
    b_dv,
    b_k,
    b_v,
    q,
    grad_out,
    q_tiles,
    grad_tiles,
    lse,
    delta,
    window,
    modifiers,
    dropout,
    i_batch,
    i_head,
    first_key,
    first_q,
    begin_row,
    end_row,
    seqlen_q,
    seqlen_k,
    factor,
    scale,
    p_list,
    begin,
    end,
    full_begin,
    full_end,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dK and dV of a key tile from query tiles [begin, end) of one head. Tiles of scores lie (keys, queries)."""
    TILE: tl.constexpr = META.tile_q
    TILE_KV: tl.constexpr = META.tile_kv
    o_columns = (first_key + tl.arange(0, TILE_KV))[:, None]
    for i_step in tl.range(begin, end):
        i_tile = i_step
        if p_list is not None:
            i_tile = tl.load(p_list + i_step)
        o_query = i_tile * TILE + tl.arange(0, TILE)
        o_rows = o_query[None, :]
        b_q = load_tile(q_tiles, q, i_tile, begin_row, end_row, META.headdim, TILE, META.block_d, META.tma)
        b_grad_out = load_tile(
            grad_tiles, grad_out, i_tile, begin_row, end_row, META.headdim_v, TILE, META.block_dv, META.tma
        ).to(b_v.dtype)
        b_lse, b_delta = load_stats(lse, delta, i_batch, i_head, first_q, o_query, seqlen_q)
        m_kept = None
        if dropout is not None:
            m_kept = tl.trans(kept(dropout, i_batch, i_head, o_query, first_key, TILE_KV))
        b_dots = tl.dot(b_k, tl.trans(b_q), input_precision=META.precision)
        b_grad_weights = tl.dot(b_v, tl.trans(b_grad_out), input_precision=META.precision)
        m_edge = (i_step < full_begin) | (i_step >= full_end)
        b_weights, b_grad, _ = grad_scores(
            b_dots,
            b_grad_weights,
            b_lse[None, :],
            b_delta[None, :],
            m_kept,
            m_edge,
            window,
            modifiers,
            dropout,
            i_batch,
            i_head,
            o_rows,
            o_columns,
            seqlen_q,
            seqlen_k,
            factor,
            scale,
            META,
            SCORE,
            DERIVATIVE,
            MASK,
            MASKED,
            False,
        )
        b_dv = tl.dot(b_weights.to(b_grad_out.dtype), b_grad_out, b_dv, input_precision=META.precision)
        b_dk = tl.dot(b_grad.to(b_q.dtype), b_q, b_dk, input_precision=META.precision)
    return b_dk, b_dv


@triton.jit
def key_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    packing,
    size,
    window,
    visits,
    modifiers,
    dropout,
    factor,
    scale,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
):
    """dK and dV of a key tile, from all query heads that share it."""
    TILE: tl.constexpr = META.tile_kv
    BLOCK_D: tl.constexpr = META.block_d
    BLOCK_DV: tl.constexpr = META.block_dv
    i_batch, i_head_kv, i_tile, first_q, first_k, seqlen_q, seqlen_k = locate(packing, size, False)
    first_key = i_tile * TILE
    last_key = tl.minimum(first_key + TILE, seqlen_k) - 1
    o_key = first_key + tl.arange(0, TILE)
    diagonal = 0 if META.window_top_left else seqlen_k - seqlen_q
    seen_begin, seen_end = key_range(window, diagonal, 0, seqlen_q - 1, seqlen_k)
    b_k = load_rows(k, i_batch, i_head_kv, first_k, o_key, seen_begin, seen_end, META.headdim, META.block_d)
    b_v = load_rows(v, i_batch, i_head_kv, first_k, o_key, seen_begin, seen_end, META.headdim_v, META.block_dv)
    b_dk = tl.zeros([TILE, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE, BLOCK_DV], tl.float32)

    begin_row, end_row = query_range(window, diagonal, first_key, last_key, seqlen_q)
    for i_member in tl.range(0, META.group):
        i_head = i_head_kv * META.group + i_member
        q_tiles = open_tiles(
            q, i_batch, i_head, first_q, begin_row, end_row, META.headdim, META.tile_q, META.block_d, META.tma
        )
        grad_tiles = open_tiles(
            grad_out,
            i_batch,
            i_head,
            first_q,
            begin_row,
            end_row,
            META.headdim_v,
            META.tile_q,
            META.block_dv,
            META.tma,
        )
        begin, full_begin, full_end, end = query_span(window, diagonal, first_key, last_key, seqlen_q, META.tile_q)
        p_list = None
        if META.masked == "lists":
            end, every, p_list = visited(visits, i_batch, i_head, i_tile)
            begin = 0
        b_dk, b_dv = key_sweep(
            b_dk,
            b_dv,
            b_k,
            b_v,
            q,
            grad_out,
            q_tiles,
            grad_tiles,
            lse,
            delta,
            window,
            modifiers,
            dropout,
            i_batch,
            i_head,
            first_key,
            first_q,
            begin_row,
            end_row,
            seqlen_q,
            seqlen_k,
            factor,
            scale,
            p_list,
            begin,
            end,
            full_begin,
            full_end,
            META,
            SCORE,
            DERIVATIVE,
            MASK,
            "edges" if META.masked == "edges" else "always",
        )
        if META.masked == "lists":
            b_dk, b_dv = key_sweep(
                b_dk,
                b_dv,
                b_k,
                b_v,
                q,
                grad_out,
                q_tiles,
                grad_tiles,
                lse,
                delta,
                window,
                modifiers,
                dropout,
                i_batch,
                i_head,
                first_key,
                first_q,
                begin_row,
                end_row,
                seqlen_q,
                seqlen_k,
                factor,
                scale,
                p_list,
                end,
                every,
                full_begin,
                full_end,
                META,
                SCORE,
                DERIVATIVE,
                MASK,
                "never",
            )
    store_rows(dk, i_batch, i_head_kv, first_k, o_key, seqlen_k, b_dk * scale, META.headdim, META.block_d)
    store_rows(dv, i_batch, i_head_kv, first_k, o_key, seqlen_k, b_dv, META.headdim_v, META.block_dv)


@triton.jit(do_not_specialize=["heads", "batches", "tiles_q", "tiles_k"])
def bias_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad,
    packing,
    size,
    window,
    modifiers,
    dropout,
    factor,
    scale,
    heads,
    batches,
    tiles_q,
    tiles_k,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    SUM_QUERIES: tl.constexpr,
    SUM_KEYS: tl.constexpr,
):
    """One tile of the bias's gradient: the sum of dS over the entries and heads (or queries, or keys) that share it.

    `size.heads`, `size.tiles`: heads, and tiles of one head, of `grad`. `heads`, `batches`: how many of each share one.
    """
    TILE_Q: tl.constexpr = META.tile_q
    TILE_KV: tl.constexpr = META.tile_kv
    i_batch_grad, i_head_grad, i_tile = program_of(size)
    across = 1 if SUM_KEYS else tiles_k
    i_tile_q = i_tile // across
    i_tile_k = i_tile % across
    b_sum = tl.zeros([TILE_Q, TILE_KV], tl.float32)
    steps = tiles_q if SUM_QUERIES else (tiles_k if SUM_KEYS else 1)
    for i_member in tl.range(0, batches * heads):
        i_batch = i_batch_grad + i_member // heads
        i_head = i_head_grad + i_member % heads
        first_q, first_k, seqlen_q, seqlen_k = lengths_of(packing, size, i_batch)
        for i_step in tl.range(0, steps):
            first_row = (i_step if SUM_QUERIES else i_tile_q) * TILE_Q
            first_key = (i_step if SUM_KEYS else i_tile_k) * TILE_KV
            last_row = tl.minimum(first_row + TILE_Q, seqlen_q) - 1
            diagonal = 0 if META.window_top_left else seqlen_k - seqlen_q
            begin_key, end_key = key_range(window, diagonal, first_row, last_row, seqlen_k)
            if (first_row < seqlen_q) & (first_key < end_key) & (first_key + TILE_KV > begin_key):
                o_query = first_row + tl.arange(0, TILE_Q)
                o_key = first_key + tl.arange(0, TILE_KV)
                i_head_kv = i_head // META.group
                b_q = load_rows(q, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim, META.block_d)
                b_grad_out = load_rows(
                    grad_out, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim_v, META.block_dv
                )
                b_k = load_rows(k, i_batch, i_head_kv, first_k, o_key, begin_key, end_key, META.headdim, META.block_d)
                b_v = load_rows(
                    v, i_batch, i_head_kv, first_k, o_key, begin_key, end_key, META.headdim_v, META.block_dv
                )
                b_lse, b_delta = load_stats(lse, delta, i_batch, i_head, first_q, o_query, seqlen_q)
                o_rows, o_columns = o_query[:, None], o_key[None, :]
                m_kept = None
                if dropout is not None:
                    m_kept = kept(dropout, i_batch, i_head, o_query, first_key, TILE_KV)
                b_dots = tl.dot(b_q, tl.trans(b_k), input_precision=META.precision)
                b_grad_weights = tl.dot(b_grad_out.to(b_v.dtype), tl.trans(b_v), input_precision=META.precision)
                _, _, b_outer = grad_scores(
                    b_dots,
                    b_grad_weights,
                    b_lse[:, None],
                    b_delta[:, None],
                    m_kept,
                    True,
                    window,
                    modifiers,
                    dropout,
                    i_batch,
                    i_head,
                    o_rows,
                    o_columns,
                    seqlen_q,
                    seqlen_k,
                    factor,
                    scale,
                    META,
                    SCORE,
                    DERIVATIVE,
                    MASK,
                    "always",
                    False,
                )
                b_sum += b_outer
    rows = number_of(grad.rows)
    columns = number_of(grad.columns)
    base = grad.pointer + i_batch_grad.to(tl.int64) * number_of(grad.batch)
    base += i_head_grad.to(tl.int64) * number_of(grad.head)
    o_query = i_tile_q * TILE_Q + tl.arange(0, TILE_Q)
    o_key = i_tile_k * TILE_KV + tl.arange(0, TILE_KV)
    if SUM_QUERIES:
        tl.store(base + o_key, tl.sum(b_sum, 0), mask=o_key < columns)
    elif SUM_KEYS:
        tl.store(base + o_query, tl.sum(b_sum, 1), mask=o_query < rows)
    else:
        pointers = base + o_query.to(tl.int64)[:, None] * columns + o_key[None, :]
        tl.store(pointers, b_sum, mask=(o_query < rows)[:, None] & (o_key < columns)[None, :])
