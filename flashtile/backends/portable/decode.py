"""The kernel of calls over a KV cache: the forward sweep over a part of a sequence's keys, in pages or in one piece.

A query tile holds the queries of all the heads that share a key head (GQA packed: key tiles are read once for all of
them): its row r is query r // group of head r % group. Parts are joined by `combine_kernel`
(see `kernels.joining`).

Programs that run side by side read the same rows: first those of the query tiles, then those of the key heads, whose
columns lie side by side in memory.
"""

import triton
import triton.language as tl

from flashtile.backends.portable.forward import before_any_key, forward_sweep, normalized
from flashtile.kernels.caches import (
    cached_place,
    let_next_begin,
    open_cache,
    part_of,
    program_of_part,
    table_of,
    wait_for_kernel,
)
from flashtile.kernels.places import diagonal_of, key_range, key_span, number_of
from flashtile.kernels.tiles import narrowed, power_of_rows, scales_of_rows
from flashtile.kernels.words import Steps, Stored


@triton.jit
def packed_pointers(rows, i_batch, o_query, o_head, BLOCK: tl.constexpr):
    """Rows of (batch, row, head, column), each with a head of its own."""
    o_rows = o_query.to(tl.int64) * rows.row + o_head.to(tl.int64) * rows.head
    return rows.pointer + i_batch.to(tl.int64) * rows.batch + o_rows[:, None] + tl.arange(0, BLOCK)[None, :]


@triton.jit
def decode_kernel(
    q, k, v, out, lse, cache, k_scale, v_scale, size, rules, parts, sinks,
    META: tl.constexpr, AFTER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program a query tile of a key head and part of the keys. AFTER, EARLY: whether it was launched before the
    kernel before had ended, and whether that behind may be (see `let_next_begin`)."""
    wait_for_kernel(AFTER)
    TILE: tl.constexpr = META.tile_q
    BLOCK_DV: tl.constexpr = META.block_dv
    MASKED: tl.constexpr = META.masked
    i_batch, i_head, i_tile, i_part = program_of_part(size, parts)
    o_rows = i_tile * TILE + tl.arange(0, TILE)
    o_query, o_head = o_rows // META.group, i_head * META.group + o_rows % META.group
    place, i_row = cached_place(cache, size, i_batch, i_tile, o_head[:, None])
    m_rows = o_query < place.seqlen_q

    diagonal = diagonal_of(place, META.window_top_left)
    first_row = i_tile * TILE // META.group
    last_row = tl.minimum((i_tile * TILE + TILE - 1) // META.group, place.seqlen_q - 1)
    begin, full_begin, full_end, end = key_span(
        rules.window, diagonal, first_row, last_row, place.seqlen_k, META.tile_kv
    )
    begin, end = part_of(parts, i_part, begin, end)
    begin_key, end_key = key_range(rules.window, diagonal, first_row, last_row, place.seqlen_k)
    keys = open_cache(k, cache, i_row, i_head, place.first_k, begin_key, end_key)
    values = open_cache(v, cache, i_row, i_head, place.first_k, begin_key, end_key)

    m_q = m_rows[:, None] & (tl.arange(0, META.block_d) < META.headdim)[None, :]
    b_q = tl.load(packed_pointers(q, i_batch, o_query, o_head, META.block_d), mask=m_q, other=0.0)
    b_q_rest = None
    if META.rest:
        m_rest = m_rows[:, None] & (tl.arange(0, META.block_rest) < META.rest)[None, :]
        p_rest = packed_pointers(q, i_batch, o_query, o_head, META.block_rest) + META.headdim
        b_q_rest = tl.load(p_rest, mask=m_rest, other=0.0)
    b_q_scale = None
    if META.quantized:
        if b_q.dtype == tl.bfloat16:
            # Eight bits are exact in float16 too, and converted to it by one instruction for two of them.
            b_bits = power_of_rows(b_q)
            if META.rest:
                b_bits = tl.maximum(b_bits, power_of_rows(b_q_rest))
                b_q_rest = narrowed(b_q_rest, b_bits)
            b_q = narrowed(b_q, b_bits)
            b_q_scale = b_bits.to(tl.float32, bitcast=True)
    # The maximum is kept as scores, or as dot products if nothing modifies.
    unit = 1.0 if META.modified else rules.scale
    b_max, b_sum = before_any_key(sinks, o_head, unit, TILE)
    if sinks is not None:
        # A sink joins once, with the first part.
        b_max = tl.where(i_part == 0, b_max, -float("inf"))
        b_sum = tl.where(i_part == 0, b_sum, 0.0)
    b_out = tl.zeros([TILE, BLOCK_DV], tl.float32)
    steps = Steps(begin, begin, end, full_begin, full_end)
    b_out, b_max, b_sum = forward_sweep(
        b_out, b_max, b_sum, b_q, o_query, keys, values, place, rules, steps,
        META, None, None, MASKED, False,
        Stored(table_of(cache, i_row, place.first_k), k_scale, v_scale, i_head, b_q_scale), b_q_rest,
    )  # fmt: skip
    let_next_begin(EARLY)
    b_out, b_lse = normalized(b_out, b_max, b_sum, unit)
    if META.quantized:
        if v_scale.page is None:
            b_out *= scales_of_rows(v_scale, i_head, None)

    i_slot = i_part * number_of(parts.batches) + i_batch
    m_read = m_rows
    if number_of(parts.splits) > 1:
        # Of rows that saw no key of a part nobody uses the output.
        m_read = m_rows & (b_lse != -float("inf"))
    m_out = m_read[:, None] & (tl.arange(0, BLOCK_DV) < META.headdim_v)[None, :]
    p_out = packed_pointers(out, i_slot, o_query, o_head, BLOCK_DV)
    tl.store(p_out, b_out.to(out.pointer.dtype.element_ty), mask=m_out)
    p_lse = lse.pointer + i_slot.to(tl.int64) * number_of(lse.batch) + o_head.to(tl.int64) * number_of(lse.head)
    tl.store(p_lse + o_query, b_lse, mask=m_rows)
