"""The forward kernel: one query tile of one head walks its key tiles with the online softmax."""

import triton
import triton.language as tl

from flashtile.backends.portable.eight import (
    first_unit,
    in_own_unit,
    in_places,
    key_scales,
    load_turned,
    only_seen_turned,
    out_of_unit,
    query_scales,
)
from flashtile.kernels.places import keys_of_tile, locate, masked_in, phases_of, stats_pointers, steps_of, tile_at
from flashtile.kernels.rules import has_nan, kept, only, only_seen, ruled
from flashtile.kernels.tiles import (
    columns_from,
    dots,
    load_aside,
    load_kept_queries,
    load_tile,
    open_keys,
    pages_of_tile,
    scales_of_rows,
    store_rows,
    widened,
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
    b_out, b_max, b_sum, b_q, o_query, keys, values, place, rules, steps,
    META: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr,
    stored=None, b_q_rest=None, scales=None,
):  # fmt: skip
    """The key tiles that `steps` names. MASKED: the mask is evaluated "always", "never", or at the "edges". GUARDED:
    values that no row sees are not multiplied; a weight of 0 does not stop NaN. `stored`: keys and values lie in a
    cache; `b_q_rest`: see `Meta.rest`; `scales`: of 8-bit queries, keys and values."""
    TILE: tl.constexpr = META.tile_kv
    # What a row of the cache is in memory.
    DIM: tl.constexpr = META.headdim // META.held
    DIM_V: tl.constexpr = META.headdim_v // META.held
    REST: tl.constexpr = META.rest // META.held
    BLOCK: tl.constexpr = META.block_d // META.held
    BLOCK_V: tl.constexpr = META.block_dv // META.held
    BLOCK_REST: tl.constexpr = META.block_rest // META.held
    o_rows = o_query[:, None]
    STAGES: tl.constexpr = 1 if GUARDED else None
    LISTS: tl.constexpr = META.masked == "lists"
    i_next = tile_at(steps, steps.begin, LISTS)
    if META.page:
        b_next = pages_of_tile(keys, stored.table, i_next, TILE, META.page, META.whole)
    if META.scaled != "":
        b_unit = first_unit(META)
        b_q_scale = query_scales(scales, place, o_query, META)
    for i_step in tl.range(steps.begin, steps.end, num_stages=STAGES, disable_licm=META.lean):
        i_tile = i_next
        i_next = tile_at(steps, i_step + 1, LISTS)
        table, b_pages = None, None
        if META.page:
            table = stored.table
            # As of tiles, the pages of the next one are asked for a step ahead.
            b_pages = b_next
            b_next = pages_of_tile(keys, stored.table, i_next, TILE, META.page, META.whole)
        o_columns = (i_tile * TILE + tl.arange(0, TILE))[None, :]
        if META.aside:
            b_k = load_aside(keys, i_tile, DIM, TILE, BLOCK)
        else:
            b_k = load_tile(keys, i_tile, DIM, TILE, BLOCK, META.tma, table, b_pages, META.page, META.whole)
        if META.latent:
            b_v = b_k
        elif META.turned:
            b_v = load_turned(values, i_tile, META.headdim_v, TILE, META.block_dv)
        else:
            b_v = load_tile(values, i_tile, DIM_V, TILE, BLOCK_V, META.tma, table, b_pages, META.page, META.whole)
        if META.quantized:
            b_k, b_v = widened(b_k, b_q.dtype), widened(b_v, b_q.dtype)
        if META.eight == "halves":
            b_k, b_v = b_k.to(tl.float16), b_v.to(tl.float16)
        b_scores = dots(b_q, b_k, META)
        if META.rest:
            further = columns_from(keys, DIM)
            b_rest = load_tile(further, i_tile, REST, TILE, BLOCK_REST, False, table, b_pages, META.page, META.whole)
            b_scores = tl.dot(b_q_rest, tl.trans(widened(b_rest, b_q.dtype)), b_scores, input_precision=META.precision)
        if META.quantized:
            b_scores *= scales_of_rows(stored.k_scale, stored.head, b_pages)
            if stored.q_scale is not None:
                b_scores *= stored.q_scale[:, None]
            if stored.v_scale.page is not None:
                # As far apart as scales may be, bfloat16 holds the products.
                WIDE: tl.constexpr = b_v.dtype if stored.q_scale is None else tl.bfloat16
                b_v = (b_v.to(tl.float32) * scales_of_rows(stored.v_scale, stored.head, b_pages)[:, None]).to(WIDE)
        if META.scaled != "":
            b_k_scale, _ = key_scales(scales[1], place, i_tile, META)
            b_scores *= b_q_scale[:, None] * b_k_scale
        m_edge = (i_step < steps.full_begin) | (i_step >= steps.full_end)
        b_scores, m_tile, _, _ = ruled(b_scores, m_edge, o_rows, o_columns, place, rules, META, SCORE, MASK, MASKED)
        if GUARDED and MASKED == "always":
            b_v = only_seen_turned(m_tile, b_v) if META.turned else only_seen(m_tile, b_v)
        b_out, b_max, b_sum, b_weights = online_softmax(b_out, b_max, b_sum, b_scores, rules.factor, META.modified)
        if rules.dropout is not None:
            b_weights = only(kept(rules, place, o_query, i_tile * TILE, TILE), b_weights)
        if META.scaled != "":
            b_out, b_weights, b_unit = in_own_unit(b_out, b_weights, b_unit, scales[2], place, i_tile, META)
        if META.turned:
            b_weights, b_v = in_places(b_weights), tl.trans(b_v)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision=META.precision)
    if META.scaled != "":
        b_out = out_of_unit(b_out, b_unit, META)
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
def normalized(b_out, b_max, b_sum, unit):
    """(out, lse) of rows that have seen all their keys."""
    # The sum is 0 where a row saw no key: out 0, lse -inf. NaN is not 0 and stays.
    m_empty = b_sum == 0.0
    b_base = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_lse = tl.where(m_empty, -float("inf"), b_base * unit + tl.log(b_sum))
    b_out = b_out / tl.where(m_empty, 1.0, b_sum)[:, None]
    return b_out, b_lse


@triton.jit
def walk_keys(
    b_q, o_query, keys, values, place, rules, visits, sinks, unit, scales,
    META: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """(output, maximum, sum) of all key tiles that a query tile meets."""
    TILE: tl.constexpr = META.tile_q
    LISTS: tl.constexpr = META.masked == "lists"
    BLOCK_DV: tl.constexpr = META.block_dv
    b_out = tl.zeros([TILE, BLOCK_DV], tl.float32)
    b_max, b_sum = before_any_key(sinks, place.head, unit, TILE)
    begin, full_begin, full_end, end = keys_of_tile(place, rules.window, META)
    for PHASE in tl.static_range(phases_of(LISTS, GUARDED)):
        steps = steps_of(visits, place, begin, full_begin, full_end, end, LISTS, PHASE, GUARDED)
        b_out, b_max, b_sum = forward_sweep(
            b_out, b_max, b_sum, b_q, o_query, keys, values, place, rules, steps,
            META, SCORE, MASK, masked_in(META.masked, PHASE, GUARDED), GUARDED, scales=scales,
        )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit
def forward_kernel(
    q, k, v, out, lse, packing, size, rules, visits, sinks, scales,
    META: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program a query tile and head."""
    TILE: tl.constexpr = META.tile_q
    place = locate(packing, size, visits, TILE, False, META.reversed, META.masked == "lists")
    o_query = place.tile * TILE + tl.arange(0, TILE)
    b_q = load_kept_queries(q, place, META.headdim, META.block_d, META)
    if META.eight == "halves":
        b_q = b_q.to(tl.float16)
    keys, values = open_keys(k, v, place, rules.window, META)
    # The maximum is kept as scores, or as dot products if nothing modifies.
    unit = 1.0 if META.modified else rules.scale
    b_out, b_max, b_sum = walk_keys(
        b_q, o_query, keys, values, place, rules, visits, sinks, unit, scales, META, SCORE, MASK, False
    )
    if META.repeats:
        if has_nan(b_out):  # it may come from a key that nobody sees
            b_out, b_max, b_sum = walk_keys(
                b_q, o_query, keys, values, place, rules, visits, sinks, unit, scales, META, SCORE, MASK, True
            )

    b_out, b_lse = normalized(b_out, b_max, b_sum, unit)
    if rules.dropout is not None:
        b_out *= rules.dropout.factor
    store_rows(
        out, place.batch, place.head, place.first_q, o_query, place.seqlen_q, b_out, META.headdim_v, META.block_dv
    )
    tl.store(stats_pointers(lse, place, o_query), b_lse, mask=o_query < place.seqlen_q)
