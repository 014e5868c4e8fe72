"""The kernel of latent attention over a KV cache: 64 packed rows of queries over a part of a sequence's keys.

Values are the first 512 columns of the one key head (DeepSeek-V2, section 2.1, absorbed), so a tile of 32 keys that the
copy engine has put into shared memory serves both products. An output of 64 x 512 fills two warpgroups' registers;
each has 256 columns of it (`values`). A third one (`scores`) holds the queries in its registers, computes scores and
weights, and asks for the keys. It puts the weights where the last 64 columns of their keys were, which nobody needs any
more, and their rescaling beside.

The tensor cores always have something to do: scores of tile n + 1, then values of tile n while the weights of tile
n + 1 are computed. Were both started at once, scores would be ready when all values are multiplied, and their weights
would be computed under nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.compat import gl, mbarrier, tma_load, view_as
from flashtile.backends.hopper.memory import new_barriers
from flashtile.backends.hopper.softmax import ROWS, before_any_key, online_softmax
from flashtile.kernels.caches import (
    cached_place,
    let_next_begin,
    part_of,
    program_of_part,
    table_of,
    wait_for_kernel,
)
from flashtile.kernels.places import diagonal_of, key_span, number_of
from flashtile.kernels.rules import ruled

LN2 = gl.constexpr(0.6931471805599453)
HALF = gl.constexpr(256)
QUERIES = gl.constexpr(2)
"""Slots that the queries have at first."""


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
def load_tile(descs, i_entry, i_row, full, smem, rest_smem):
    """Both pieces of a tile's rows."""
    desc, rest_desc = descs
    mbarrier.expect(full, desc.block_type.nbytes + rest_desc.block_type.nbytes)
    tma_load(rest_desc, [i_entry, i_row, 0, desc.block_type.shape[3]], full, rest_smem)
    tma_load(desc, [i_entry, i_row, 0, 0], full, smem)


@gluon.jit
def load_keys(descs, n, slot, cache, place, i_row, memory, barriers, META: gl.constexpr):
    """Tile n of a sequence into a slot; no tile lies in two pages."""
    full, smem, rest_smem = barriers[0].index(slot), memory[0].index(slot), memory[1].index(slot)
    first = n * META.tile_kv
    if META.page:
        found = gl.load(table_of(cache, i_row, 0).pointer + first // META.page)
        load_tile(descs, found.to(gl.int32), first % META.page, full, smem, rest_smem)
    else:
        load_tile(descs, i_row, place.first_k + first, full, smem, rest_smem)


@gluon.jit
def load_first(descriptors, begin, end, cache, place, i_row, memory, barriers, META: gl.constexpr):
    """The queries, where later on two tiles of keys lie, and as many of those as there is room for beside."""
    STAGES: gl.constexpr = META.stages
    q_desc, q_rest_desc = descriptors[0], descriptors[1]
    full = barriers[0]
    first = place.tile * ROWS
    mbarrier.expect(full.index(0), q_desc.block_type.nbytes)
    tma_load(q_desc, [place.batch, first, 0, 0], full.index(0), query_memory(memory[0]))
    mbarrier.expect(full.index(1), q_rest_desc.block_type.nbytes)
    tma_load(q_rest_desc, [place.batch, first, 0, q_desc.block_type.shape[3]], full.index(1), memory[3])
    for slot in gl.static_range(QUERIES, STAGES):
        if begin + slot - QUERIES < end:
            load_keys(descriptors[2:], begin + slot - QUERIES, slot, cache, place, i_row, memory, barriers, META)


@gluon.jit
def query_memory(smem):
    """Of the first two slots, as one tile of 64 rows."""
    TILES: gl.constexpr = smem.shape[0] // QUERIES
    COLUMNS: gl.constexpr = smem.shape[4]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, ROWS, 1, COLUMNS], smem.dtype)
    return view_as(smem, smem.dtype, [TILES, 1, ROWS, 1, COLUMNS], layout).index(0)


@gluon.jit
def take_queries(memory, barriers, META: gl.constexpr):
    """The first columns of the queries as the left side of products, in registers; their slots are free then."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.tile_kv, 16])
    COLUMNS: gl.constexpr = memory[0].shape[4]
    mbarrier.wait(barriers[0].index(0), 0)
    b_q = query_memory(memory[0]).reshape([ROWS, COLUMNS]).load(gl.DotOperandLayout(0, layout, 2))
    fence_async_shared()
    mbarrier.arrive(barriers[1].index(0), count=2)
    mbarrier.arrive(barriers[1].index(1), count=2)
    mbarrier.wait(barriers[0].index(1), 0)
    return b_q


@gluon.jit
def weights_in(rest_smem, slot, META: gl.constexpr):
    """Where the weights of a slot's keys lie: (rows, keys), in the memory of the keys' last columns."""
    TILE_KV: gl.constexpr = META.tile_kv
    STAGES: gl.constexpr = META.stages
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TILE_KV], rest_smem.dtype)
    return view_as(rest_smem, rest_smem.dtype, [STAGES, ROWS, TILE_KV], layout).index(slot)


@gluon.jit
def multiply_scores(b_q, slot, memory, META: gl.constexpr):
    """Starts the scores of the keys in a slot."""
    TILE_KV: gl.constexpr = META.tile_kv
    REST: gl.constexpr = memory[1].shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    b_zeros = gl.zeros([ROWS, TILE_KV], gl.float32, layout)
    b_k = memory[1].index(slot).reshape([TILE_KV, REST]).permute((1, 0))
    token = warpgroup_mma(memory[3].reshape([ROWS, REST]), b_k, b_zeros, use_acc=False, is_async=True)
    b_k = memory[0].index(slot).reshape([TILE_KV, memory[0].shape[4]]).permute((1, 0))
    return warpgroup_mma(b_q, b_k, token, is_async=True)


@gluon.jit
def hand_over(b_scale, i_step, memory, barriers, META: gl.constexpr):
    """Tells the warpgroups of values that the weights of a step are there, and what their output is multiplied with."""
    memory[2].index(i_step % META.stages).store(b_scale)
    fence_async_shared()
    mbarrier.arrive(barriers[2].index(i_step % META.stages), count=1)


@gluon.jit
def scores(descriptors, memory, barriers, lse, call, META: gl.constexpr, EARLY: gl.constexpr):
    """The warpgroup that computes weights and asks for keys."""
    TILE_KV: gl.constexpr = META.tile_kv
    STAGES: gl.constexpr = META.stages
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    full, empty, _ready, go = barriers
    cache, size, rules, parts = call
    _batch, _head, i_tile, _part = program_of_part(size, parts)
    o_query, o_head = packed_rows(i_tile, gl.SliceLayout(1, layout), META)
    i_part, place, i_row, span = part_at(call, o_head[:, None], META)
    begin, full_begin, full_end, end = span
    load_first(descriptors, begin, end, cache, place, i_row, memory, barriers, META)
    b_q = take_queries(memory, barriers, META)
    b_max, b_sum = before_any_key(None, 0, gl.SliceLayout(1, layout), 0)
    for n in range(begin, end):
        i_step = n - begin
        slot = (i_step + QUERIES) % STAGES
        mbarrier.wait(full.index(slot), ((i_step + QUERIES) // STAGES) & 1)
        token = multiply_scores(b_q, slot, memory, META)
        # The values of two tiles ago are multiplied by now, or the queries are taken; another tile gets that slot.
        before = i_step % STAGES
        mbarrier.wait(empty.index(before), (i_step // STAGES) & 1)
        after = n + STAGES - QUERIES
        if after < end:
            load_keys(descriptors[2:], after, before, cache, place, i_row, memory, barriers, META)
        b_scores = warpgroup_mma_wait(0, [token])
        mbarrier.arrive(go, count=1, pred=i_step > 0)
        o_key = n * TILE_KV + gl.arange(0, TILE_KV, gl.SliceLayout(0, layout))
        m_edge = (n < full_begin) | (n >= full_end)
        b_scores, _valid, _capped, _plain = ruled(
            b_scores, m_edge, o_query[:, None], o_key[None, :], place, rules, META, None, None, "edges"
        )
        b_top = gl.max(b_scores, 1)
        b_weights, b_max, b_sum, b_rescale = online_softmax(b_scores, b_top, b_max, b_sum, rules.factor, True, 0)
        weights_in(memory[1], slot, META).store(b_weights.to(memory[1].dtype))
        hand_over(b_rescale, i_step, memory, barriers, META)
    # Nobody may be two turns of `go` behind.
    mbarrier.wait(empty.index((end - begin) % STAGES), ((end - begin) // STAGES) & 1)
    mbarrier.arrive(go, count=1, pred=end > begin)
    let_next_begin(EARLY)
    m_empty = b_sum == 0.0
    hand_over(1.0 / gl.where(m_empty, 1.0, b_sum), end - begin, memory, barriers, META)
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
def rescaled(b_out, i_step, scales, ready):
    """The output, multiplied with what a step hands over."""
    STAGES: gl.constexpr = scales.shape[0]
    mbarrier.wait(ready.index(i_step % STAGES), (i_step // STAGES) & 1)
    return b_out * scales.index(i_step % STAGES).load(gl.SliceLayout(1, b_out.type.layout))[:, None]


@gluon.jit
def values(memory, barriers, out, call, META: gl.constexpr, I_HALF: gl.constexpr):
    """A warpgroup that has 256 columns of the output."""
    TILE_KV: gl.constexpr = META.tile_kv
    STAGES: gl.constexpr = META.stages
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    keys, weights, scales = memory
    full, empty, ready, go = barriers
    _cache, _size, _rules, parts = call
    i_part, place, _row, span = part_at(call, 0, META)
    begin, _full_begin, _full_end, end = span
    b_out = gl.zeros([ROWS, HALF], gl.float32, layout)
    for n in range(begin, end):
        i_step = n - begin
        slot = (i_step + QUERIES) % STAGES
        b_v = keys.index(slot).reshape([TILE_KV, keys.shape[4]]).slice(I_HALF * HALF, HALF, dim=1)
        mbarrier.wait(full.index(slot), ((i_step + QUERIES) // STAGES) & 1)
        b_out = rescaled(b_out, i_step, scales, ready)
        left = place.seqlen_k - n * TILE_KV
        if left < TILE_KV:
            hide_rows(b_v, left)
        mbarrier.wait(go, i_step & 1)
        b_weights = weights_in(weights, slot, META)
        b_out = warpgroup_mma_wait(0, [warpgroup_mma(b_weights, b_v, b_out, is_async=True)])
        mbarrier.arrive(empty.index(slot), count=1)
    b_out = rescaled(b_out, end - begin, scales, ready)
    o_query, o_head = packed_rows(place.tile, rows, META)
    i_slot = (i_part * number_of(parts.batches) + place.batch).to(gl.int64)
    p_rows = out.pointer + i_slot * out.batch + o_query.to(gl.int64) * out.row + o_head.to(gl.int64) * out.head
    o_columns = I_HALF * HALF + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    b_out = b_out.to(out.pointer.dtype.element_ty)
    gl.store(p_rows[:, None] + o_columns[None, :], b_out, mask=(o_query < place.seqlen_q)[:, None])


@gluon.jit
def first_values(memory, barriers, out, call, META: gl.constexpr):
    values(memory, barriers, out, call, META, 0)


@gluon.jit
def second_values(memory, barriers, out, call, META: gl.constexpr):
    values(memory, barriers, out, call, META, 1)


@gluon.jit
def latent_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, out, lse, cache, size, rules, parts,
    META: gl.constexpr, AFTER: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """A program for 64 packed rows and a part of the keys. Descriptors cover queries (batch, rows, 1, columns) and the
    cache (row or page, rows, 1, columns), in pieces of 512 and of 64 columns. AFTER, EARLY: see `caches`."""
    wait_for_kernel(AFTER)
    STAGES: gl.constexpr = META.stages
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    rest_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_rest_desc.block_type.shape, k_rest_desc.layout)
    q_rest_smem = gl.allocate_shared_memory(k_desc.dtype, q_rest_desc.block_type.shape, q_rest_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    ready = new_barriers(STAGES, 1)
    go = new_barriers(1, 1).index(0)
    gl.warp_specialize([
        (scores, ((q_desc, q_rest_desc, k_desc, k_rest_desc), (k_smem, rest_smem, scales, q_rest_smem),
                  (full, empty, ready, go), lse, (cache, size, rules, parts), META, EARLY)),
        (first_values, ((k_smem, rest_smem, scales), (full, empty, ready, go), out,
                        (cache, size, rules, parts), META)),
        (second_values, ((k_smem, rest_smem, scales), (full, empty, ready, go), out,
                         (cache, size, rules, parts), META)),
    ], [4, 4], [160, 160])  # fmt: skip
