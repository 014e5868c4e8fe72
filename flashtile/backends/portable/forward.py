"""The forward kernel: one query tile of one head walks its key tiles with the online softmax."""

import triton
import triton.language as tl

from flashtile.backends.portable.sweep import (
    allowed,
    kept,
    key_range,
    key_span,
    load_rows,
    load_tile,
    locate,
    modify,
    open_tiles,
    stats_pointers,
    store_rows,
    visited,
)


@triton.jit
def online_softmax(b_out, b_max, b_sum, b_scores, factor, EXACT: tl.constexpr):
    """(rescaled output, raised maximum, new sum, weights). The maximum of a row that has seen nothing is -inf.

    EXACT: the difference first, as large scores times `factor` would be rounded where they are large.
    """
    b_raised = tl.maximum(b_max, tl.max(b_scores, 1))
    b_base = tl.where(b_raised == -float("inf"), 0.0, b_raised)
    if EXACT:
        b_weights = tl.exp2((b_scores - b_base[:, None]) * factor)
    else:
        b_weights = tl.exp2(b_scores * factor - (b_base * factor)[:, None])
    b_rescale = tl.exp2((b_max - b_base) * factor)
    return b_out * b_rescale[:, None], b_raised, b_sum * b_rescale + tl.sum(b_weights, 1), b_weights


@triton.jit
def forward_sweep(
    b_out,
    b_max,
    b_sum,
    b_q,
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
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Key tiles [begin, end), of the list at `p_list` if there is one.

    MASKED: the mask is evaluated "always", "never", or at the "edges": outside of [full_begin, full_end).
    """
    TILE: tl.constexpr = META.tile_kv
    o_rows = o_query[:, None]
    for i_step in tl.range(begin, end):
        i_tile = i_step
        if p_list is not None:
            i_tile = tl.load(p_list + i_step)
        o_columns = (i_tile * TILE + tl.arange(0, TILE))[None, :]
        b_k = load_tile(k_tiles, k, i_tile, begin_key, end_key, META.headdim, TILE, META.block_d, META.tma)
        b_v = load_tile(v_tiles, v, i_tile, begin_key, end_key, META.headdim_v, TILE, META.block_dv, META.tma)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=META.precision)
        if META.modified:
            shift = 0 if META.alibi_top_left else seqlen_k - seqlen_q
            b_scores, _, _ = modify(
                b_scores * scale, modifiers, i_batch, i_head, o_rows, o_columns, shift, seqlen_q, seqlen_k, SCORE
            )
        diagonal = 0 if META.window_top_left else seqlen_k - seqlen_q
        if MASKED == "edges":
            if (i_step < full_begin) | (i_step >= full_end):
                m_tile = allowed(
                    window, modifiers, i_batch, i_head, o_rows, o_columns, diagonal, seqlen_q, seqlen_k, MASK
                )
                b_scores = tl.where(m_tile, b_scores, -float("inf"))
        if MASKED == "always":
            m_tile = allowed(window, modifiers, i_batch, i_head, o_rows, o_columns, diagonal, seqlen_q, seqlen_k, MASK)
            b_scores = tl.where(m_tile, b_scores, -float("inf"))
            # A weight of 0 does not stop NaN: what no row sees must not be in the product.
            b_v = tl.where(tl.max(m_tile.to(tl.int32), 0)[:, None] > 0, b_v, 0.0)
        b_out, b_max, b_sum, b_weights = online_softmax(b_out, b_max, b_sum, b_scores, factor, META.modified)
        if dropout is not None:
            b_weights = tl.where(kept(dropout, i_batch, i_head, o_query, i_tile * TILE, TILE), b_weights, 0.0)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision=META.precision)
    return b_out, b_max, b_sum


@triton.jit
def before_any_key(sinks, i_head, unit, TILE: tl.constexpr):
    """(maximum, sum) of the softmax: nothing seen, or with sinks one key of that score and value 0."""
    b_max = tl.full([TILE], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + i_head).to(tl.float32) / unit
        b_max = tl.zeros([TILE], tl.float32) + sink
        b_sum += tl.where(sink == -float("inf"), 0.0, 1.0)
    return b_max, b_sum


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    packing,
    size,
    window,
    visits,
    modifiers,
    dropout,
    sinks,
    factor,
    scale,
    META: tl.constexpr,
    SCORE: tl.constexpr,
    MASK: tl.constexpr,
):
    """One program a query tile and head. `factor` takes scores to base 2; `scale` is used where scores are modified."""
    TILE: tl.constexpr = META.tile_q
    BLOCK_DV: tl.constexpr = META.block_dv
    i_batch, i_head, i_tile, first_q, first_k, seqlen_q, seqlen_k = locate(packing, size, META.reversed)
    o_query = i_tile * TILE + tl.arange(0, TILE)
    b_q = load_rows(q, i_batch, i_head, first_q, o_query, 0, seqlen_q, META.headdim, META.block_d)
    b_out = tl.zeros([TILE, BLOCK_DV], tl.float32)
    unit = 1.0 if META.modified else scale  # the maximum is kept as scores, or as dot products that nothing modifies
    b_max, b_sum = before_any_key(sinks, i_head, unit, TILE)

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
    b_out, b_max, b_sum = forward_sweep(
        b_out,
        b_max,
        b_sum,
        b_q,
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
        MASK,
        "edges" if META.masked == "edges" else "always",
    )
    if META.masked == "lists":
        b_out, b_max, b_sum = forward_sweep(
            b_out,
            b_max,
            b_sum,
            b_q,
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
            MASK,
            "never",
        )

    # The sum is 0 where a row saw no key: out 0, lse -inf. NaN is not 0 and stays.
    m_empty = b_sum == 0.0
    b_base = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_lse = tl.where(m_empty, -float("inf"), b_base * unit + tl.log(b_sum))
    b_out = b_out / tl.where(m_empty, 1.0, b_sum)[:, None]
    if dropout is not None:
        b_out *= dropout.factor
    store_rows(out, i_batch, i_head, first_q, o_query, seqlen_q, b_out, META.headdim_v, META.block_dv)
    tl.store(stats_pointers(lse, i_batch, i_head, first_q, o_query), b_lse, mask=o_query < seqlen_q)
