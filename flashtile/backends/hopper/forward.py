"""The forward kernel: one warp loads, two or three warpgroups multiply (FlashAttention-3, Shah et al. 2024).

Each math warpgroup owns 64 rows of the query tile, and walks over its keys (`forward_steps`). Programs are persistent;
the loader runs ahead into the next query tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashtile.backends.hopper.bits import words_at
from flashtile.backends.hopper.care import any_nan, careful_output
from flashtile.backends.hopper.compat import gl, mbarrier, tma_store_wait
from flashtile.backends.hopper.eight import query_unit, units_of
from flashtile.backends.hopper.forward_steps import first_step, outstanding, step
from flashtile.backends.hopper.loading import loader, query_slot
from flashtile.backends.hopper.memory import (
    VALUES_FREED,
    free_slot,
    hand_over,
    new_barriers,
    pass_turn,
    store_wide,
    take_turn,
)
from flashtile.backends.hopper.products import multiply_values
from flashtile.backends.hopper.registers import here, numbers_here
from flashtile.backends.hopper.schedule import edges_in, hear, tile_of, walk_of
from flashtile.backends.hopper.softmax import ROWS, sums_of_rows
from flashtile.backends.hopper.strips import strips_of
from flashtile.kernels.places import number_pointers
from flashtile.kernels.words import Rules, Window

LN2 = gl.constexpr(0.6931471805599453)


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
    queries = query_unit(scales, place, first, o_query, META)
    unit, values = units_of(scales, queries, place, tile_of(walk, 0, META), META)
    b_weights, b_out, softmax = first_step(
        tile_of(walk, 0, META), m_first, b_first, unit, count, place, o_query, first, memory, barriers, rules, sinks,
        META, SCORE, MASK,
    )  # fmt: skip
    count += 1
    whole = gl.minimum(gl.maximum(full_begin, 1), steps)
    for PHASE in gl.static_range(2 if META.apart else 1):
        begin = 1 if PHASE == 0 else whole
        end = whole if META.apart and PHASE == 0 else steps
        b_weights, b_out, softmax, values, count = walk_some(
            b_weights, b_out, softmax, begin, end, count, walk, queries, unit, values, place, o_query, first, memory,
            barriers, rules, visits, scales, META, SCORE, MASK, I_GROUP, edges_in(META.apart, PHASE),
        )  # fmt: skip
    b_max, b_sum, _ = softmax
    if META.rows:
        b_sum = sums_of_rows(b_sum, b_max)
    return b_weights, outstanding(b_out, softmax, META), b_max, b_sum, values, count


@gluon.jit
def walk_some(
    b_weights, b_out, softmax, begin, end, count, walk, queries, unit, values, place, o_query, first, memory, barriers,
    rules, visits, scales,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr, EDGES: gl.constexpr,
):  # fmt: skip
    """(weights, output, softmax, unit of the last values, steps so far) after the steps [begin, end); EDGES: see
    `edges_in`."""
    _tiles, _first, full_begin, full_end, _steps = walk
    change = 1.0
    # Read one step ahead; lists have room for that.
    i_next = tile_of(walk, begin, META)
    next_unit, next_values = units_of(scales, queries, place, i_next, META)
    for n in range(begin, end):
        i_tile = i_next
        i_next = tile_of(walk, n + 1, META)
        if META.scaled == "block":
            unit = next_unit
            change = values / next_values
            values = next_values
            next_unit, next_values = units_of(scales, queries, place, i_next, META)
        m_edge: gl.constexpr = EDGES == "all"
        if EDGES == "some":
            m_edge = (n < full_begin) | (n >= full_end)
        b_words = words_at(visits, place, n, m_edge, META, False, I_GROUP)
        b_weights, b_out, softmax = step(
            b_weights, b_out, softmax, i_tile, m_edge, b_words, unit, change, count, place, o_query, first, memory,
            barriers, rules, META, SCORE, MASK, I_GROUP,
        )  # fmt: skip
        count += 1
    return b_weights, b_out, softmax, values, count


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
    left, right = rules.window
    if left is not None:
        left = here(left)
    if right is not None:
        right = here(right)
    rules = Rules(Window(left, right), rules.modifiers, rules.dropout, rules.factor, rules.scale, rules.origin)
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
        own = (strips_of(q_smem, slot, META.strips), k_smem, v_smem, o_smem)
        b_weights, b_out, b_max, b_sum, value_unit, count = walk_keys(
            place, counts, o_query, first, count, own, barriers, rules, visits, sinks, scales,
            META, SCORE, MASK, I_GROUP,
        )  # fmt: skip
        token = multiply_values(b_weights, b_out, v_smem, v_full, count - 1, META)
        mbarrier.arrive(q_empty.index(slot), count=1)
        m_empty = b_sum == 0.0
        b_lse = gl.where(m_empty, float("-inf"), (b_max + (gl.log2(b_sum) - META.lift)) * LN2)
        b_inverse = value_unit / gl.where(m_empty, 1.0, b_sum)
        if rules.dropout is not None:
            b_inverse = b_inverse * rules.dropout.factor
        gl.store(number_pointers(numbers_here(lse), place, o_query), b_lse, mask=o_query < place.seqlen_q)
        b_out = warpgroup_mma_wait(0, [token])
        if META.early:
            free_slot(VALUES_FREED, count - 1, META.stages, META)
        b_out = b_out * gl.convert_layout(b_inverse, gl.SliceLayout(1, output))[:, None]
        if META.careful:
            if any_nan(b_out):
                b_new = careful_output(sources, scales, place, first, rules, visits, sinks, META, SCORE, MASK)
                b_out = gl.convert_layout(b_new, output)
        if META.wide:
            store_wide(out, b_out, place, first, META.headdim_v)
        else:
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

    Values of 8 bits lie on their side: (batch, heads, headdim, seqlen), packed (1, heads, headdim, total).
    sources: queries, keys and values once more, as `Rows`, where `careful`; scales: theirs, of 8-bit ones.
    """
    CONSUMERS: gl.constexpr = META.consumers
    STAGES: gl.constexpr = META.stages
    TILE_KV: gl.constexpr = META.tile_kv
    STRIP: gl.constexpr = META.strip
    BLOCK_DV: gl.constexpr = META.block_dv
    dtype: gl.constexpr = q_desc.dtype
    QUERIES: gl.constexpr = CONSUMERS * META.query_stages
    q_smem = gl.allocate_shared_memory(dtype, [QUERIES * META.strips, 1, ROWS, 1, STRIP], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * META.strips, 1, TILE_KV, 1, STRIP], k_desc.layout)
    if META.eight:
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_DV, TILE_KV], v_desc.layout)
    else:
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_KV, 1, BLOCK_DV], v_desc.layout)
    if META.wide:
        # None: rows leave from registers.
        memory = (q_smem, k_smem, v_smem, o_desc)
    else:
        O_SHAPE: gl.constexpr = [CONSUMERS, 1, ROWS, 1, o_desc.block_type.shape[3]]
        memory = (q_smem, k_smem, v_smem, gl.allocate_shared_memory(o_desc.dtype, O_SHAPE, o_desc.layout))
    q_full = new_barriers(QUERIES, 1)
    q_empty = new_barriers(QUERIES, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    told = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told_full = new_barriers(1, 1).index(0)
    told_empty = new_barriers(1, CONSUMERS).index(0)
    specialize(
        (q_desc, k_desc, v_desc, o_desc),
        memory,
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
