"""The backward kernel of queries: dQ of a query tile in one walk over its keys, with nothing to add up afterwards.

For calls that want the same bits every time, and for heads so wide that dK, dV and a part of dQ do not fit into the
registers together. It walks as the forward kernel does, from the same loader, and computes

    S = Q K^T,  dP = dO V^T,  dS = exp(S - lse) * (dP - delta),  dQ += dS K,

the last of them one key tile late, so that the tensor cores have work under the exponentials.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashtile.backends.hopper.bits import words_at
from flashtile.backends.hopper.compat import gl, mbarrier, tma_store_wait
from flashtile.backends.hopper.dropped import dropped_grad, kept_at
from flashtile.backends.hopper.forward_steps import rule
from flashtile.backends.hopper.loading import loader, query_slot
from flashtile.backends.hopper.memory import (
    KEYS_FREED,
    VALUES_FREED,
    clear_half,
    free_slot,
    meet,
    new_barriers,
    without_nan,
)
from flashtile.backends.hopper.products import multiply_scores
from flashtile.backends.hopper.registers import numbers_here, rows_here
from flashtile.backends.hopper.schedule import hear, tile_of, walk_of
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.statistics import load_statistics, subtracted
from flashtile.backends.hopper.strips import (
    await_columns,
    multiply_columns,
    store_strips,
    strip_of,
    strips_of,
    zero_strips,
)
from flashtile.kernels.places import number_pointers
from flashtile.kernels.rules import alibi_distance, grad_dots


@gluon.jit
def clear_hidden(k_smem, slot, v_smem, slot_v, i_tile, place, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Puts zeros where keys and values hold what nobody sees but a product would: behind a packed sequence, and NaN.
    Each warpgroup does its half."""
    TILE_KV: gl.constexpr = META.tile_kv
    HALF: gl.constexpr = TILE_KV // 2
    STRIPS: gl.constexpr = META.strips
    if META.packed:
        left = place.seqlen_k - i_tile * TILE_KV
        if left < TILE_KV:
            clear_half(strips_of(k_smem, slot, STRIPS), strip_of(v_smem, slot_v), left, I_GROUP, STRIPS)
    if META.guarded:
        for i in gl.static_range(STRIPS):
            without_nan(k_smem.index(slot * STRIPS + i), I_GROUP * HALF, HALF)
        without_nan(v_smem.index(slot_v), I_GROUP * HALF, HALF)
        meet()


@gluon.jit
def start_products(i_tile, count, place, memory, barriers, I_GROUP: gl.constexpr, META: gl.constexpr):
    """(token of the scores, token of the weights' gradients) of a key tile."""
    queries, k_smem, v_smem, _dq_smem, grads_out = memory
    _q_full, _q_empty, k_full, v_full = barriers
    if META.packed or META.guarded:
        slot, slot_v = count % META.stages, count % META.stages_v
        mbarrier.wait(k_full.index(slot), (count // META.stages) & 1)
        mbarrier.wait(v_full.index(slot_v), (count // META.stages_v) & 1)
        clear_hidden(k_smem, slot, v_smem, slot_v, i_tile, place, I_GROUP, META)
    score_token = multiply_scores(queries, k_smem, k_full, count, META.strips, META)
    weight_token = multiply_scores(grads_out, v_smem, v_full, count, 1, META)
    return score_token, weight_token


@gluon.jit
def multiply_keys(b_grad, b_dq, k_smem, count, META: gl.constexpr):
    """Starts dQ += dS K with the keys of slot `count`, which are there."""
    return multiply_columns(b_grad, strips_of(k_smem, count % META.stages, META.strips), b_dq, META.strips)


@gluon.jit
def grad_scores(
    score_token, weight_token, i_tile, m_edge, b_words, count, place, rows, memory, barriers, rules,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr,
    LATER: gl.constexpr,
):  # fmt: skip
    """(dS as the operand of the product with the keys, what it adds to the gradient of each query's slope or 0).

    LATER: how many products were started after the two.
    """
    _q_smem, k_smem, _v_smem, _dq_smem, _do_smem = memory
    TILE_KV: gl.constexpr = META.tile_kv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.strip, 16])
    o_query, first, b_lse, b_delta = rows
    b_kept = kept_at(rules, place, first, i_tile * TILE_KV, TILE_KV, False)
    b_scores = warpgroup_mma_wait(1 + LATER, [score_token])
    b_scores, m_valid, b_tanh, b_plain = rule(
        b_scores, i_tile, m_edge, b_words, place, o_query, first, rules, None, META, SCORE, MASK, MASKED
    )
    b_weights = gl.exp2(b_scores * rules.factor - b_lse[:, None])
    b_grad_weights = dropped_grad(warpgroup_mma_wait(LATER, [weight_token]), b_kept, rules)
    free_slot(VALUES_FREED, count, META.stages_v, META)
    o_columns = i_tile * TILE_KV + gl.arange(0, TILE_KV, gl.SliceLayout(0, scores))
    GUARDED: gl.constexpr = META.guarded and DERIVATIVE is not None
    b_grad, b_outer = grad_dots(
        b_weights, b_grad_weights, b_delta[:, None], m_valid, b_tanh, b_plain, o_query[:, None], o_columns[None, :],
        place, rules, META, SCORE, DERIVATIVE, GUARDED, META.collects,
    )  # fmt: skip
    b_slope = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
    if META.slope_gradient:
        b_slope = gl.sum(b_outer * alibi_distance(place, o_query[:, None], o_columns[None, :], META), 1)
    return gl.convert_layout(b_grad.to(k_smem.dtype), gl.DotOperandLayout(0, output, 2)), b_slope


@gluon.jit
def walk_keys(
    place, counts, rows, count, memory, barriers, rules, visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """(dQ, less the gradient of each query's slope, steps so far) of a query tile."""
    _q_smem, k_smem, _v_smem, _dq_smem, _do_smem = memory
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.strip, 16])
    walk = walk_of(place, counts, rules.window, visits, META)
    MASKED: gl.constexpr = META.asked
    _tiles, _first, full_begin, full_end, steps = walk
    # An empty list has bits that hide the tile of its one step.
    m_first = (full_begin > 0) | (full_end == 0)
    b_first = words_at(visits, place, 0, m_first, META, False, I_GROUP)
    i_first = tile_of(walk, 0, META)
    first_token, other_token = start_products(i_first, count, place, memory, barriers, I_GROUP, META)
    b_grad, b_slope = grad_scores(
        first_token, other_token, i_first, m_first, b_first, count, place, rows, memory, barriers, rules,
        META, SCORE, DERIVATIVE, MASK, "always", 0,
    )  # fmt: skip
    b_dq = zero_strips(output, ROWS, META.strip, META.strips)
    free_slot(KEYS_FREED, count, META.stages, META)
    count += 1
    # Read one step ahead; lists have room for that.
    i_next = tile_of(walk, 1, META)
    for n in range(1, steps):
        i_tile = i_next
        i_next = tile_of(walk, n + 1, META)
        m_edge = (n < full_begin) | (n >= full_end)
        b_words = words_at(visits, place, n, m_edge, META, False, I_GROUP)
        score_token, weight_token = start_products(i_tile, count, place, memory, barriers, I_GROUP, META)
        tokens = multiply_keys(b_grad, b_dq, k_smem, count - 1, META)
        b_grad, b_more = grad_scores(
            score_token, weight_token, i_tile, m_edge, b_words, count, place, rows, memory, barriers, rules,
            META, SCORE, DERIVATIVE, MASK, MASKED, META.strips,
        )  # fmt: skip
        b_slope += b_more
        b_dq = await_columns(tokens, META.strips)
        free_slot(KEYS_FREED, count, META.stages, META)
        count += 1
    b_dq = await_columns(multiply_keys(b_grad, b_dq, k_smem, count - 1, META), META.strips)
    return b_dq, b_slope, count


@gluon.jit
def consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One math warpgroup: 64 rows of each query tile."""
    _q_desc, _k_desc, _v_desc, dq_desc, _do_desc = descriptors
    q_smem, k_smem, v_smem, dq_smem, do_smem = memory
    q_full, q_empty, _k_full, _v_full = barriers
    TILE_KV: gl.constexpr = META.tile_kv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    lse, delta, dq, slope = results
    _packing, size, rules, visits, _sinks = call
    count = 0
    turn = 0
    place, counts = hear(mailbox, size, turn, META)
    while place.batch >= 0:
        first = place.tile * META.tile_q + I_GROUP * ROWS
        o_query = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
        b_lse, b_delta = load_statistics(numbers_here(lse), numbers_here(delta), place, o_query)
        rows = (o_query, first, subtracted(b_lse), b_delta)
        slot = query_slot(turn, I_GROUP, META)
        mbarrier.wait(q_full.index(slot), (turn // META.query_stages) & 1)
        queries, grads_out = strips_of(q_smem, slot, META.strips), strips_of(do_smem, slot, 1)
        own = (queries, k_smem, v_smem, dq_smem, grads_out)
        b_dq, b_slope, count = walk_keys(
            place, counts, rows, count, own, barriers, rules, visits, META, SCORE, DERIVATIVE, MASK, I_GROUP
        )  # fmt: skip
        if META.slope_gradient:
            gl.store(number_pointers(slope, place, o_query), -b_slope, mask=o_query < place.seqlen_q)
        # The queries have been read: dQ leaves through their memory.
        leaving = rows_here(dq) if META.packed else dq
        store_queries(dq_desc, leaving, dq_smem, slot, b_dq, rules, place, first, META)
        mbarrier.arrive(q_empty.index(slot), count=1)
        turn += 1
        place, counts = hear(mailbox, size, turn, META)


@gluon.jit
def store_queries(desc, rows, smem, slot, b_dq, rules, place, first, META: gl.constexpr):
    """dQ of 64 queries, through the memory of a slot of them, which is free afterwards."""
    tma_store_wait(0)
    store_strips(
        desc, rows, smem, slot, b_dq, rules.scale, place, first, place.first_q, place.seqlen_q, META.headdim, META
    )
    tma_store_wait(0)


@gluon.jit
def first_consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, mailbox, results, call, META, SCORE, DERIVATIVE, MASK, 0)


@gluon.jit
def second_consumer(
    descriptors, memory, barriers, mailbox, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, mailbox, results, call, META, SCORE, DERIVATIVE, MASK, 1)


@gluon.jit
def specialize(
    descriptors, memory, barriers, mailbox, results, counter, order, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """The roles of the warps, and their registers."""
    gl.warp_specialize([
        (first_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, DERIVATIVE, MASK)),
        (second_consumer, (descriptors, memory, barriers, mailbox, results, call, META, SCORE, DERIVATIVE, MASK)),
        (loader, (descriptors, memory, barriers, mailbox, counter, order, call, META)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["section", "total"])
def query_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, lse, delta, dq, slope, counter, section, total, packing, size, rules,
    visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Persistent programs, each two times 64 queries at a time. dq: once more, as `Rows`, where `packed`; slope: each
    query's part of the gradient of its slope, where `slope_gradient`."""
    dtype: gl.constexpr = q_desc.dtype
    STAGES: gl.constexpr = META.stages
    STAGES_V: gl.constexpr = META.stages_v
    TILE_KV: gl.constexpr = META.tile_kv
    STRIP: gl.constexpr = META.strip
    BLOCK_DV: gl.constexpr = META.block_dv
    QUERIES: gl.constexpr = 2 * META.query_stages
    q_smem = gl.allocate_shared_memory(dtype, [QUERIES * META.strips, 1, ROWS, 1, STRIP], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [QUERIES, 1, ROWS, 1, BLOCK_DV], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * META.strips, 1, TILE_KV, 1, STRIP], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES_V, 1, TILE_KV, 1, BLOCK_DV], v_desc.layout)
    told = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = new_barriers(QUERIES, 1)
    q_empty = new_barriers(QUERIES, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES_V, 1)
    told_full = new_barriers(1, 1).index(0)
    told_empty = new_barriers(1, 2).index(0)
    specialize(
        (q_desc, k_desc, v_desc, dq_desc, do_desc),
        (q_smem, k_smem, v_smem, q_smem, do_smem),
        (q_full, q_empty, k_full, v_full),
        (told, told_full, told_empty),
        (lse, delta, dq, slope),
        counter,
        (section, total),
        (packing, size, rules, visits, None),
        META,
        SCORE,
        DERIVATIVE,
        MASK,
    )
