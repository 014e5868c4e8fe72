"""The forward kernel: one warp loads, two or three warpgroups multiply (FlashAttention-3, Shah et al. 2024).

Each math warpgroup owns 64 rows of the query tile. The scores of one key tile are computed while the weights of the
tile before are multiplied with their values, so that the tensor cores work under the exponentials. Programs are
persistent; the loader runs ahead into the next query tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashtile.backends.hopper.bits import words_at
from flashtile.backends.hopper.care import any_nan, careful_output
from flashtile.backends.hopper.compat import gl, mbarrier, tma_store_wait
from flashtile.backends.hopper.dropped import kept_at, only_kept
from flashtile.backends.hopper.eight import factor_of, query_unit, units_of
from flashtile.backends.hopper.loading import loader, query_slot
from flashtile.backends.hopper.memory import (
    KEYS_FREED,
    VALUES_FREED,
    free_slot,
    hand_over,
    new_barriers,
    pass_turn,
    take_turn,
)
from flashtile.backends.hopper.products import multiply_scores, multiply_values, narrowed
from flashtile.backends.hopper.ruling import ruled_tile
from flashtile.backends.hopper.schedule import hear, tile_of, walk_of
from flashtile.backends.hopper.softmax import (
    ROWS,
    before_any_key,
    online_softmax,
    rescaled,
    softmax_of_rows,
    sums_of_lanes,
    sums_of_rows,
)
from flashtile.kernels.places import number_pointers

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def rule(
    b_scores, i_tile, m_edge, b_words, place, o_query, first, rules, unit,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What `ruled_tile` says. first: of `o_query`; unit: of 8-bit products, what nothing modifies keeps it."""
    TILE_KV: gl.constexpr = META.tile_kv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, META.depth])
    o_columns = (i_tile * TILE_KV + gl.arange(0, TILE_KV, gl.SliceLayout(0, scores)))[None, :]
    if META.eight and META.modified:
        b_scores = b_scores * unit
    return ruled_tile(
        b_scores, m_edge, b_words, first, i_tile * TILE_KV, o_query[:, None], o_columns, place, rules,
        META, SCORE, MASK, MASKED, False,
    )  # fmt: skip


@gluon.jit
def step(
    b_weights, b_out, softmax, i_tile, m_edge, b_words, unit, change, count, place, o_query, first, memory, barriers,
    rules, META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr, EDGES: gl.constexpr,
):  # fmt: skip
    """A key tile: its scores and weights, while the weights of the tile before meet their values.

    softmax: (maxima, sums, what the output is still to be multiplied with); unit: of 8-bit products; change: the unit
    of the values before over that of this tile's.
    """
    q_smem, k_smem, v_smem, _ = memory
    _, _, k_full, v_full = barriers
    if META.turns:
        take_turn(I_GROUP, META.consumers)
    score_token = multiply_scores(q_smem, k_smem, k_full, count, META)
    out_token = multiply_values(b_weights, outstanding(b_out, softmax, META), v_smem, v_full, count - 1, META)
    if META.turns:
        pass_turn(I_GROUP, META.consumers)
    b_kept = kept_at(rules, place, first, i_tile * META.tile_kv, META.tile_kv, False)
    b_scores = warpgroup_mma_wait(1, [score_token])
    if META.early:
        free_slot(KEYS_FREED, count, META.stages, META)
    MASKED: gl.constexpr = META.asked if EDGES is None else "always" if EDGES else "never"
    b_scores, _valid, _capped, _plain = rule(
        b_scores, i_tile, m_edge, b_words, place, o_query, first, rules, unit, META, SCORE, MASK, MASKED
    )
    GUARDED: gl.constexpr = META.asked != "never" or META.modified
    factor = factor_of(rules, unit, META)
    b_max, b_sum, _ = softmax
    if META.rows:
        b_new, b_max, b_sum, b_rescale, b_out = softmax_of_rows(
            b_scores, out_token, b_max, b_sum, factor, GUARDED, True
        )
    else:
        b_new, b_max, b_sum, b_rescale = online_softmax(b_scores, b_max, b_sum, factor, GUARDED, META.lift)
    b_new = only_kept(b_new, b_kept)
    LATE: gl.constexpr = META.eight or META.rows
    if not LATE:
        b_low = narrowed(b_new, k_smem.dtype, META)
    if not META.rows:
        b_out = warpgroup_mma_wait(0, [out_token])
    if LATE:
        # These go into the registers that the product has read; sooner, ptxas would make products wait for each other.
        b_low = narrowed(b_new, k_smem.dtype, META)
    # Of the step before, or by one word for these and the keys of this step.
    free_slot(VALUES_FREED, count - 1 + META.values_late, META.stages, META)
    if META.scaled == "block":
        b_rescale = b_rescale * change
    if not META.rows:
        b_out = b_out * gl.convert_layout(b_rescale, gl.SliceLayout(1, b_out.type.layout))[:, None]
    return b_low, b_out, (b_max, b_sum, b_rescale)


@gluon.jit
def outstanding(b_out, softmax, META: gl.constexpr):
    """An output, multiplied with what it is still to be multiplied with."""
    return rescaled(b_out, softmax[2]) if META.rows else b_out


@gluon.jit
def first_step(
    i_tile, m_edge, b_words, unit, count, place, o_query, first, memory, barriers, rules, sinks,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """(weights, output, softmax) after the first tile, whose scores have no other product to hide under."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, META.depth])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, META.depth])
    q_smem, k_smem, _, _ = memory
    _, _, k_full, _ = barriers
    token = multiply_scores(q_smem, k_smem, k_full, count, META)
    b_kept = kept_at(rules, place, first, i_tile * TILE_KV, TILE_KV, False)
    b_scores = warpgroup_mma_wait(0, [token])
    free_slot(KEYS_FREED if META.early else VALUES_FREED, count, META.stages, META)
    b_scores, _valid, _capped, _plain = rule(
        b_scores, i_tile, m_edge, b_words, place, o_query, first, rules, unit, META, SCORE, MASK, "always"
    )
    ROW: gl.constexpr = gl.SliceLayout(1, scores)
    b_max, b_sum = before_any_key(sinks, place.head, ROW, META.lift)
    b_out = gl.zeros([ROWS, BLOCK_DV], gl.float32, output)
    b_ones = gl.full([ROWS], 1.0, gl.float32, ROW)
    factor = factor_of(rules, unit, META)
    if META.rows:
        b_sum = sums_of_lanes(b_sum)
        b_new, b_max, b_sum, _rescale, b_out = softmax_of_rows(b_scores, b_out, b_max, b_sum, factor, True, False)
    else:
        b_new, b_max, b_sum, _rescale = online_softmax(b_scores, b_max, b_sum, factor, True, META.lift)
    b_weights = narrowed(only_kept(b_new, b_kept), k_smem.dtype, META)
    return b_weights, b_out, (b_max, b_sum, b_ones)


@gluon.jit
def walk_some(
    state, begin, stop, given, META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
    EDGES: gl.constexpr,
):  # fmt: skip
    """The state after steps [begin, stop), of which all or none need the mask, or some (EDGES None)."""
    b_weights, b_out, softmax, i_next, scaling, count = state
    walk, queries, place, o_query, first, memory, barriers, rules, visits, scales = given
    unit, change, values, next_unit, next_values = scaling
    _tiles, _first, full_begin, full_end, _steps = walk
    for n in range(begin, stop):
        i_tile = i_next
        i_next = tile_of(walk, n + 1, META)
        if META.scaled == "block":
            unit = next_unit
            change = values / next_values
            values = next_values
            next_unit, next_values = units_of(scales, queries, place, i_next, META)
        if EDGES is None:
            m_edge = (n < full_begin) | (n >= full_end)
        else:
            m_edge = EDGES
        b_words = words_at(visits, place, n, m_edge, META, False, I_GROUP)
        b_weights, b_out, softmax = step(
            b_weights, b_out, softmax, i_tile, m_edge, b_words, unit, change, count, place, o_query, first, memory,
            barriers, rules, META, SCORE, MASK, I_GROUP, EDGES,
        )  # fmt: skip
        count += 1
    return (b_weights, b_out, softmax, i_next, (unit, change, values, next_unit, next_values), count)


@gluon.jit
def walk_keys(
    place, counts, o_query, first, count, memory, barriers, rules, visits, sinks, scales,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """(weights of the last tile, output without it, maximum, sum, unit of its values, steps so far) of a query tile."""
    walk = walk_of(place, counts, rules.window, visits, META)
    _tiles, _first, full_begin, full_end, steps = walk
    # An empty list has bits that hide the tile of its one step.
    m_first = (full_begin > 0) | (full_end == 0)
    b_first = words_at(visits, place, 0, m_first, META, False, I_GROUP)
    queries = query_unit(scales, place, first, META)
    unit, values = units_of(scales, queries, place, tile_of(walk, 0, META), META)
    change = 1.0
    b_weights, b_out, softmax = first_step(
        tile_of(walk, 0, META), m_first, b_first, unit, count, place, o_query, first, memory, barriers, rules, sinks,
        META, SCORE, MASK,
    )  # fmt: skip
    count += 1
    # Read one step ahead; lists have room for that.
    i_next = tile_of(walk, 1, META)
    next_unit, next_values = units_of(scales, queries, place, i_next, META)
    scaling = (unit, change, values, next_unit, next_values)
    state = (b_weights, b_out, softmax, i_next, scaling, count)
    given = (walk, queries, place, o_query, first, memory, barriers, rules, visits, scales)
    if META.rows and META.right and not META.left:
        edges = gl.minimum(gl.maximum(full_begin, 1), steps)
        state = walk_some(state, 1, edges, given, META, SCORE, MASK, I_GROUP, True)
        state = walk_some(state, edges, steps, given, META, SCORE, MASK, I_GROUP, False)
    else:
        state = walk_some(state, 1, steps, given, META, SCORE, MASK, I_GROUP, None)
    b_weights, b_out, softmax, _i_next, scaling, count = state
    values = scaling[2]
    b_max, b_sum, _ = softmax
    if META.rows:
        b_sum = sums_of_rows(b_sum, b_max)
    return b_weights, outstanding(b_out, softmax, META), b_max, b_sum, values, count


@gluon.jit
def consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One math warpgroup: 64 rows of each query tile."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_DV: gl.constexpr = META.block_dv
    q_smem, k_smem, v_smem, o_smem = memory
    q_full, q_empty, _, v_full = barriers
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, META.depth])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, META.depth])
    out, lse, sources, scales = results
    _packing, size, rules, visits, sinks = call
    count = 0
    turn = 0
    if META.turns:
        if I_GROUP == META.consumers - 1:
            pass_turn(I_GROUP, META.consumers)
    place, counts = hear(mailbox, size, turn, META)
    while place.batch >= 0:
        first = place.tile * META.tile_q + I_GROUP * ROWS
        o_query = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
        slot = query_slot(turn, I_GROUP, META)
        mbarrier.wait(q_full.index(slot), (turn // META.query_stages) & 1)
        b_weights, b_out, b_max, b_sum, value_unit, count = walk_keys(
            place, counts, o_query, first, count, (q_smem.index(slot), k_smem, v_smem, o_smem), barriers, rules,
            visits, sinks, scales, META, SCORE, MASK, I_GROUP,
        )  # fmt: skip
        token = multiply_values(b_weights, b_out, v_smem, v_full, count - 1, META)
        mbarrier.arrive(q_empty.index(slot), count=1)
        m_empty = b_sum == 0.0
        b_lse = gl.where(m_empty, float("-inf"), (b_max + (gl.log2(b_sum) - META.lift)) * LN2)
        b_inverse = value_unit / gl.where(m_empty, 1.0, b_sum)
        if rules.dropout is not None:
            b_inverse = b_inverse * rules.dropout.factor
        gl.store(number_pointers(lse, place, o_query), b_lse, mask=o_query < place.seqlen_q)
        b_out = warpgroup_mma_wait(0, [token])
        if META.early:
            free_slot(VALUES_FREED, count - 1, META.stages, META)
        b_out = b_out * gl.convert_layout(b_inverse, gl.SliceLayout(1, output))[:, None]
        if META.careful:
            if any_nan(b_out):
                b_new = careful_output(sources, scales, place, first, rules, visits, sinks, META, SCORE, MASK)
                b_out = gl.convert_layout(b_new, output)
        store_tile(descriptors[3], out, o_smem.index(I_GROUP), b_out, place, first, META.headdim_v, META)
        turn += 1
        place, counts = hear(mailbox, size, turn, META)
    if META.turns:
        if I_GROUP == 0:
            take_turn(I_GROUP, META.consumers)
    tma_store_wait(0)


@gluon.jit
def store_tile(o_desc, out, o_smem, b_out, place, first, DIM: gl.constexpr, META: gl.constexpr):
    """64 rows leave, and the next tile begins meanwhile. Where there is memory for half of the columns only, the second
    half waits until the first has been read."""
    COLUMNS: gl.constexpr = o_smem.shape[3]
    tma_store_wait(0)
    if META.halves:
        b_out, b_second = b_out.reshape([ROWS, 2, COLUMNS]).permute((0, 2, 1)).split()
    hand_over(o_desc, out, o_smem, b_out, place, first, place.first_q, place.seqlen_q, 0, DIM, META.packed)
    if META.halves:
        tma_store_wait(0)
        hand_over(o_desc, out, o_smem, b_second, place, first, place.first_q, place.seqlen_q, COLUMNS, DIM, META.packed)


@gluon.jit
def first_consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK, 0)


@gluon.jit
def second_consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK, 1)


@gluon.jit
def third_consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK, 2)


@gluon.jit
def specialize(
    descriptors, memory, barriers, mailbox, results, counter, order, call,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """The roles of the warps, and their registers."""
    if META.consumers == 2:
        gl.warp_specialize([
            (first_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK)),
            (second_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK)),
            (loader, (descriptors, memory, barriers, mailbox, counter, order, call, META)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK)),
            (second_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK)),
            (third_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, MASK)),
            (loader, (descriptors, memory, barriers, mailbox, counter, order, call, META)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["section", "total"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, sources, scales, out, lse, counter, section, total, packing, size, rules, visits,
    sinks, META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Persistent programs. Descriptors cover (batch, seqlen, heads, headdim), of packed tensors (1, total, ...).

    Values of 8 bits lie on their side: (batch, heads, headdim, seqlen).
    sources: queries, keys and values once more, as `Rows`, where `careful`; scales: theirs, of 8-bit ones.
    """
    CONSUMERS: gl.constexpr = META.consumers
    STAGES: gl.constexpr = META.stages
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    dtype: gl.constexpr = q_desc.dtype
    QUERIES: gl.constexpr = CONSUMERS * META.query_stages
    q_smem = gl.allocate_shared_memory(dtype, [QUERIES, 1, ROWS, 1, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_KV, 1, BLOCK_D], k_desc.layout)
    if META.eight:
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_DV, TILE_KV], v_desc.layout)
    else:
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_KV, 1, BLOCK_DV], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS, 1, ROWS, 1, o_desc.block_type.shape[3]], o_desc.layout)
    q_full = new_barriers(QUERIES, 1)
    q_empty = new_barriers(QUERIES, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    told = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told_full = new_barriers(1, 1).index(0)
    told_empty = new_barriers(1, CONSUMERS).index(0)
    specialize(
        (q_desc, k_desc, v_desc, o_desc),
        (q_smem, k_smem, v_smem, o_smem),
        (q_full, q_empty, k_full, v_full),
        (told, told_full, told_empty),
        (out, lse, sources, scales),
        counter,
        (section, total),
        (packing, size, rules, visits, sinks),
        META,
        SCORE,
        MASK,
    )
