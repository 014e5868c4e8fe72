"""The kernel of latent attention over a KV cache: 64 packed rows of queries over a part of a sequence's keys.

Values are the first 512 columns of the one key head (DeepSeek-V2, section 2.1, absorbed), so a tile of 64 keys in
shared memory serves both products. An output of 64 x 512 fills two warpgroups' registers; each has 256 columns of it
(`values`). A third one (`scores`) holds most of the queries in its registers, computes scores and weights, and asks the
copy engine for keys.

The tensor cores have something to do nearly always: scores of tile n + 1, then values of tile n while the weights of
tile n + 1 are computed. Were both started at once, scores would be ready when all values are multiplied, and their
weights would be computed under nothing. Nor can the warpgroup of scores compute weights under its own next products: it
is held up until most of those have begun. Tiles of 32 keys would leave the tensor cores half idle, for a product with
32 columns takes as long as one with 64.

There is room for three tiles' first 512 columns, and for one tile's last 64 and its weights: tile n + 1 has scores
before the last columns of tile n + 2 come, and weights once the values of tile n are multiplied.

Keys of 8 bits are widened on the way (see `widening`), by the warpgroups of values: there is room for two tiles then,
and one that is not widened yet, which is done as soon as the values of the tile in its place are multiplied. To widen
half of it under the products of the other half was tried, and tiles of 32 keys, of which there is room for four: both
were slower.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.compat import gl, mbarrier
from flashtile.backends.hopper.latent_loading import load_columns, load_first, load_narrow, take_queries
from flashtile.backends.hopper.latent_memory import COLUMNS, HELD, Arriving, Barriers, Memory, slot_of
from flashtile.backends.hopper.memory import new_barriers
from flashtile.backends.hopper.softmax import ROWS, before_any_key, online_softmax
from flashtile.backends.hopper.widening import HALF, unit_of_rows, widen_rest, widen_values
from flashtile.kernels.caches import (
    cached_place,
    let_next_begin,
    part_of,
    program_of_part,
    wait_for_kernel,
)
from flashtile.kernels.places import diagonal_of, key_span, number_of
from flashtile.kernels.rules import ruled

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def part_at(call, i_head, META: gl.constexpr):
    """(part, `Place` of the tile of rows, row of the cache or block table, tiles of its keys as `key_span`)."""
    cache, size, rules, parts = call
    i_batch, _head, i_tile, i_part = program_of_part(size, parts)
    place, i_row = cached_place(cache, size, i_batch, i_tile, i_head)
    first_row = i_tile * ROWS // META.group
    last_row = gl.minimum((i_tile * ROWS + ROWS - 1) // META.group, place.seqlen_q - 1)
    diagonal = diagonal_of(place, META.window_top_left)
    begin, full_begin, full_end, end = key_span(
        rules.window, diagonal, first_row, last_row, place.seqlen_k, META.tile_kv
    )
    begin, end = part_of(parts, i_part, begin, end)
    return i_part, place, i_row, (begin, full_begin, full_end, gl.maximum(begin, end))


@gluon.jit
def packed_rows(i_tile, layout: gl.constexpr, META: gl.constexpr):
    """(query, head) of each row of the tile."""
    o_rows = i_tile * ROWS + gl.arange(0, ROWS, layout)
    return o_rows // META.group, o_rows % META.group


@gluon.jit
def multiply_scores(b_q, i_step, memory, barriers, META: gl.constexpr):
    """Starts the scores of a step's keys, once they are there. The last columns come last, and are multiplied last."""
    TILE_KV: gl.constexpr = META.tile_kv
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    LEFT: gl.constexpr = COLUMNS - HELD
    REST: gl.constexpr = memory.rest.shape[3]
    b_zeros = gl.zeros([ROWS, TILE_KV], gl.float32, layout)
    slot, filled = slot_of(i_step, META)
    mbarrier.wait(barriers.full.index(slot), filled & 1)
    q_smem = memory.queries.reshape([ROWS, LEFT + REST])
    k_smem = memory.keys.index(slot).reshape([TILE_KV, COLUMNS])
    b_k = k_smem.slice(HELD, LEFT, dim=1).permute((1, 0))
    token = warpgroup_mma(q_smem.slice(0, LEFT, dim=1), b_k, b_zeros, use_acc=False, is_async=True)
    token = warpgroup_mma(b_q[0], k_smem.slice(0, 256, dim=1).permute((1, 0)), token, is_async=True)
    token = warpgroup_mma(b_q[1], k_smem.slice(256, 128, dim=1).permute((1, 0)), token, is_async=True)
    token = warpgroup_mma(b_q[2], k_smem.slice(384, 64, dim=1).permute((1, 0)), token, is_async=True)
    mbarrier.wait(barriers.rest_full, i_step & 1)
    b_k = memory.rest.reshape([TILE_KV, REST]).permute((1, 0))
    return warpgroup_mma(q_smem.slice(LEFT, REST, dim=1), b_k, token, is_async=True)


@gluon.jit
def hand_over(b_scale, i_step, memory, barriers):
    """Tells the warpgroups of values that the weights of a step are there, and what their output is multiplied with."""
    memory.scales.index(i_step % 2).store(b_scale)
    fence_async_shared()
    mbarrier.arrive(barriers.ready.index(i_step % 2), count=1)


@gluon.jit
def scores(descs, memory, barriers, arriving, lse, call, k_scale, META: gl.constexpr, EARLY: gl.constexpr):
    """The warpgroup that computes weights and asks for keys."""
    TILE_KV: gl.constexpr = META.tile_kv
    STAGES: gl.constexpr = META.stages
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    cache, size, rules, parts = call
    q_desc, _q_rest_desc, k_desc, k_rest_desc = descs
    _batch, _head, i_tile, _part = program_of_part(size, parts)
    o_query, o_head = packed_rows(i_tile, gl.SliceLayout(1, layout), META)
    i_part, place, i_row, span = part_at(call, o_head[:, None], META)
    begin, full_begin, full_end, end = span
    load_first(descs, begin, end, cache, place, i_row, memory, barriers, arriving, META)
    b_q, b_unit = take_queries(memory, barriers, q_desc.dtype, k_scale, META)
    b_max, b_sum = before_any_key(None, 0, gl.SliceLayout(1, layout), 0)
    for n in range(begin, end):
        i_step = n - begin
        token = multiply_scores(b_q, i_step, memory, barriers, META)
        if META.narrow:
            # All of this step's keys have been widened.
            if n + META.narrow < end:
                source = i_step % META.narrow
                load_narrow(k_desc, k_rest_desc, n + META.narrow, source, arriving, cache, place, i_row, META)
        b_scores = warpgroup_mma_wait(0, [token])
        mbarrier.arrive(barriers.go, count=1, pred=i_step > 0)
        if not META.narrow:
            if n + 1 < end:
                full, smem = barriers.rest_full, memory.rest
                load_columns(k_rest_desc, n + 1, COLUMNS, full, smem, cache, place, i_row, META)
        o_key = n * TILE_KV + gl.arange(0, TILE_KV, gl.SliceLayout(0, layout))
        m_edge = (n < full_begin) | (n >= full_end)
        if META.narrow:
            b_scores *= unit_of_rows(b_unit)
        b_scores, _valid, _tanh, _plain = ruled(
            b_scores, m_edge, o_query[:, None], o_key[None, :], place, rules, META, None, None, "edges"
        )
        b_weights, b_max, b_sum, b_rescale = online_softmax(b_scores, b_max, b_sum, rules.factor, True, 0)
        b_weights = b_weights.to(memory.weights.dtype)
        # Once the values of the tile before are multiplied, there is room for weights, and for another tile.
        slot, filled = slot_of(i_step - 1, META)
        mbarrier.wait(barriers.empty.index(slot), filled & 1)
        memory.weights.store(b_weights)
        hand_over(b_rescale, i_step, memory, barriers)
        if not META.narrow:
            if n + STAGES - 1 < end:
                full, smem = barriers.full.index(slot), memory.keys.index(slot)
                load_columns(k_desc, n + STAGES - 1, 0, full, smem, cache, place, i_row, META)
    mbarrier.arrive(barriers.go, count=1, pred=end > begin)
    let_next_begin(EARLY)
    m_empty = b_sum == 0.0
    hand_over(1.0 / gl.where(m_empty, 1.0, b_sum), end - begin, memory, barriers)
    b_lse = gl.where(m_empty, float("-inf"), (b_max + gl.log2(b_sum)) * LN2)
    i_slot = (i_part * number_of(parts.batches) + place.batch).to(gl.int64)
    p_lse = lse.pointer + i_slot * number_of(lse.batch) + o_head.to(gl.int64) * number_of(lse.head) + o_query
    gl.store(p_lse, b_lse, mask=o_query < place.seqlen_q)


@gluon.jit
def hide_rows(b_v, left):
    """Puts zeros behind the first `left` values: a weight of 0 does not stop NaN. A few rows at a time, for there are
    few registers beside the output."""
    TILE_KV: gl.constexpr = b_v.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    o_rows = gl.arange(0, 8, gl.SliceLayout(1, layout))
    for row in gl.static_range(0, TILE_KV, 8):
        if left < row + 8:
            for column in gl.static_range(0, HALF, 32):
                piece = b_v.slice(row, 8, dim=0).slice(column, 32, dim=1)
                b_rows = piece.load(layout)
                piece.store(gl.where((row + o_rows < left)[:, None], b_rows, gl.zeros_like(b_rows)))
    fence_async_shared()


@gluon.jit
def rescaled(b_out, i_step, memory, barriers):
    """The output, multiplied with what a step hands over."""
    mbarrier.wait(barriers.ready.index(i_step % 2), (i_step // 2) & 1)
    return b_out * memory.scales.index(i_step % 2).load(gl.SliceLayout(1, b_out.type.layout))[:, None]


@gluon.jit
def values(memory, barriers, arriving, out, call, v_scale, META: gl.constexpr, I_HALF: gl.constexpr):
    """A warpgroup that has 256 columns of the output."""
    TILE_KV: gl.constexpr = META.tile_kv
    STAGES: gl.constexpr = META.stages
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    _cache, _size, _rules, parts = call
    i_part, place, _row, span = part_at(call, 0, META)
    begin, _full_begin, _full_end, end = span
    b_out = gl.zeros([ROWS, HALF], gl.float32, layout)
    if META.narrow:
        for i_first in range(0, gl.minimum(STAGES, end - begin)):
            slot, filled = slot_of(i_first, META)
            # The queries may be there, which have been taken once.
            mbarrier.wait(barriers.empty.index(slot), (filled + 1) & 1)
            widen_values(i_first, memory, barriers, arriving, META, I_HALF)
            if i_first == 0:
                widen_rest(0, memory, barriers, arriving, META, I_HALF)
    for n in range(begin, end):
        i_step = n - begin
        slot, filled = slot_of(i_step, META)
        b_v = memory.keys.index(slot).reshape([TILE_KV, COLUMNS]).slice(I_HALF * HALF, HALF, dim=1)
        if not META.narrow:
            mbarrier.wait(barriers.full.index(slot), filled & 1)
        b_out = rescaled(b_out, i_step, memory, barriers)
        if META.narrow:
            # The scores of this step have been multiplied, those of the next one wait for this.
            if n + 1 < end:
                widen_rest(i_step + 1, memory, barriers, arriving, META, I_HALF)
        left = place.seqlen_k - n * TILE_KV
        if left < TILE_KV:
            hide_rows(b_v, left)
        mbarrier.wait(barriers.go, i_step & 1)
        b_out = warpgroup_mma_wait(0, [warpgroup_mma(memory.weights, b_v, b_out, is_async=True)])
        mbarrier.arrive(barriers.empty.index(slot), count=1)
        if META.narrow:
            if n + STAGES < end:
                widen_values(i_step + STAGES, memory, barriers, arriving, META, I_HALF)
    b_out = rescaled(b_out, end - begin, memory, barriers)
    if META.narrow:
        b_out *= gl.load(v_scale.pointer)
    o_query, o_head = packed_rows(place.tile, rows, META)
    i_slot = (i_part * number_of(parts.batches) + place.batch).to(gl.int64)
    p_rows = out.pointer + i_slot * out.batch + o_query.to(gl.int64) * out.row + o_head.to(gl.int64) * out.head
    o_columns = I_HALF * HALF + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    b_out = b_out.to(out.pointer.dtype.element_ty)
    gl.store(p_rows[:, None] + o_columns[None, :], b_out, mask=(o_query < place.seqlen_q)[:, None])


@gluon.jit
def first_values(memory, barriers, arriving, out, call, v_scale, META: gl.constexpr):
    values(memory, barriers, arriving, out, call, v_scale, META, 0)


@gluon.jit
def second_values(memory, barriers, arriving, out, call, v_scale, META: gl.constexpr):
    values(memory, barriers, arriving, out, call, v_scale, META, 1)


@triton.constexpr_function
def tiles_like(desc, dtype):
    """The layout of tiles like a descriptor's, of another type."""
    return gl.NVMMASharedLayout.get_default_for(desc.block_type.shape, dtype)


@gluon.jit
def latent_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, out, lse, cache, size, rules, parts, k_scale, v_scale,
    META: gl.constexpr, AFTER: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """A program for 64 packed rows and a part of the keys. Descriptors cover queries (batch, rows, 1, columns) and the
    cache (row or page, rows, 1, columns), in pieces of 512 columns and of 128 of queries, 64 of keys. k_scale, v_scale:
    one number each where the cache has 8 bits. AFTER, EARLY: see `caches`."""
    wait_for_kernel(AFTER)
    STAGES: gl.constexpr = META.stages
    TILE_KV: gl.constexpr = META.tile_kv
    dtype: gl.constexpr = gl.float16 if META.narrow else k_desc.dtype
    keys: gl.constexpr = k_desc.block_type.shape
    rest: gl.constexpr = k_rest_desc.block_type.shape
    last: gl.constexpr = q_rest_desc.block_type.shape
    weights: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TILE_KV], dtype)
    memory = Memory(
        gl.allocate_shared_memory(dtype, [STAGES] + keys, tiles_like(k_desc, dtype)),
        gl.allocate_shared_memory(dtype, rest, tiles_like(k_rest_desc, dtype)),
        gl.allocate_shared_memory(dtype, last, tiles_like(q_rest_desc, dtype)),
        gl.allocate_shared_memory(dtype, [ROWS, TILE_KV], weights),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    FILLS: gl.constexpr = 2 if META.narrow else 1
    barriers = Barriers(
        new_barriers(STAGES, FILLS), new_barriers(1, FILLS).index(0), new_barriers(STAGES, 2), new_barriers(2, 1),
        new_barriers(1, 1).index(0), new_barriers(1, 1).index(0),
    )  # fmt: skip
    # Of 16 bits nothing has to be widened, and nobody looks for it.
    arriving = Arriving(barriers.full, memory.keys, memory.rest)
    if META.narrow:
        arriving = Arriving(
            new_barriers(META.narrow, 1),
            gl.allocate_shared_memory(k_desc.dtype, [META.narrow] + keys, k_desc.layout),
            gl.allocate_shared_memory(k_desc.dtype, [META.narrow] + rest, k_rest_desc.layout),
        )
    gl.warp_specialize([
        (scores, ((q_desc, q_rest_desc, k_desc, k_rest_desc), memory, barriers, arriving, lse,
                  (cache, size, rules, parts), k_scale, META, EARLY)),
        (first_values, (memory, barriers, arriving, out, (cache, size, rules, parts), v_scale, META)),
        (second_values, (memory, barriers, arriving, out, (cache, size, rules, parts), v_scale, META)),
    ], [4, 4], [160, 160])  # fmt: skip
