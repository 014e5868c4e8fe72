"""The backward kernel: dK, dV and dQ in one walk over the query tiles of a key tile (FlashAttention-3, section 3.3).

Scores lie (keys, queries). With P = exp(S - lse), recomputed, and delta = rowsum(dO * O) - dlse,

    dP = V dO^T,  dS = P * (dP - delta),  dV += P dO,  dK += dS Q,  dQ = dS^T K.

Each of two math warpgroups owns 64 keys, and the weights go from its accumulators into the products that need them. dQ
needs all keys: both put their part of dS into shared memory, each multiplies half of dQ a step late, and two more warps
have the copy engine add that to float32 memory, in no fixed order (`adding`). Unless `adds`: then dQ is another
kernel's (`queries`).

Where `split`, heads are so wide that a warpgroup has registers for dK or for dV: both share 64 keys, the first computes
P and dV and hands P to the second, which computes dS and dK.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashtile.backends.hopper.adding import adder, before_first, hand_over_grad_q, start_last
from flashtile.backends.hopper.bits import words_at
from flashtile.backends.hopper.compat import gl, mbarrier, thread_barrier, tma_store_wait
from flashtile.backends.hopper.memory import (
    FREED,
    await_slot,
    first_rows,
    hand_over,
    meet,
    new_barriers,
    slot_of,
    without_nan,
    without_rows,
)
from flashtile.backends.hopper.schedule import ONE_GROUP, ONE_WARP, edges_in, key_tile, row_tile, rows_walk
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.statistics import load_statistics, subtracted
from flashtile.backends.hopper.steps import first_scores, key_step, step, value_step
from flashtile.backends.hopper.strips import load_strips, store_strips, strip_of, zero_strips
from flashtile.backends.hopper.sums import PIECE_COLUMNS, PIECE_MEMORY, PIECE_ROWS
from flashtile.kernels.places import with_head


@gluon.jit
def loader(
    descriptors, memory, barriers, statistics, call, META: gl.constexpr
):  # fmt: skip
    """The loading warp: keys and values once, then queries and gradients, each with its statistic, into rings."""
    TILE_Q: gl.constexpr = META.tile_q
    line: gl.constexpr = gl.BlockedLayout([TILE_Q // 32], [32], [1], [0])
    q_desc, k_desc, v_desc, do_desc, _sums_desc, _dk_desc, _dv_desc = descriptors
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, _ds_smem, _sums_smem = memory
    kv_full, full, _handing = barriers
    lse, delta = statistics
    packing, size, rules, visits = call
    shared = key_tile(packing, size, visits, ONE_WARP, META)
    i_entry = shared.batch * META.dense
    first = shared.first_k + shared.tile * META.tile_kv
    mbarrier.expect(kv_full, k_desc.block_type.nbytes * META.strips + v_desc.block_type.nbytes)
    load_strips(k_desc, (i_entry, first, shared.head), kv_full, k_smem, 0, META.strips)
    load_strips(v_desc, (i_entry, first, shared.head), kv_full, v_smem, 0, 1)
    count = 0
    for i_member in range(META.group):
        place = with_head(shared, shared.head * META.group + i_member)
        walk = rows_walk(place, rules.window, visits, META)
        # Read one step ahead; lists have room for that.
        i_next = row_tile(walk, walk[1], META)
        for n in range(walk[1], walk[4]):
            slot = slot_of(count, META.stages)
            i_row = i_next
            i_next = row_tile(walk, n + 1, META)
            where = (i_entry, place.first_q + i_row * TILE_Q, place.head)
            b_lse, b_delta = load_statistics(lse, delta, place, i_row * TILE_Q + gl.arange(0, TILE_Q, line))
            await_slot(FREED, count, META.stages, META)
            mbarrier.expect(full.index(slot), q_desc.block_type.nbytes * META.strips + do_desc.block_type.nbytes)
            load_strips(q_desc, where, full.index(slot), q_smem, slot, META.strips)
            load_strips(do_desc, where, full.index(slot), do_smem, slot, 1)
            # Only now does the warp wait for the numbers that it asked for above.
            lse_smem.index(slot).store(subtracted(b_lse))
            delta_smem.index(slot).store(b_delta)
            mbarrier.arrive(full.index(slot), count=1)
            count += 1
    # No barrier is left half full.
    for i in range(count, count + META.stages):
        await_slot(FREED, i, META.stages, META)


@gluon.jit
def walk_rows(
    b_grads, count, place, o_key, memory, barriers, rules, visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """(gradients, steps so far) after the queries of one head. Walked apart, those that need the mask come first;
    where a window ends on the left, some come last too, and none are walked apart."""
    walk = rows_walk(place, rules.window, visits, META)
    _tiles, begin, full_begin, _full_end, end = walk
    for PHASE in gl.static_range(2 if META.apart else 1):
        first = begin if PHASE == 0 else full_begin
        last = full_begin if META.apart and PHASE == 0 else end
        b_grads, count = walk_some(
            b_grads, first, last, count, walk, place, o_key, memory, barriers, rules, visits,
            META, SCORE, DERIVATIVE, MASK, I_GROUP, edges_in(META.apart, PHASE),
        )  # fmt: skip
    return b_grads, count


@gluon.jit
def walk_some(
    b_grads, first, last, count, walk, place, o_key, memory, barriers, rules, visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
    EDGES: gl.constexpr,
):  # fmt: skip
    """(gradients, steps so far) after the steps [first, last); EDGES: see `edges_in`.

    `lean` loops compute again what never changes in them: LLVM would take it out of them into registers that are not
    there, and ptxas spill it. Where a bias is read, more spills that way.
    """
    _tiles, _begin, full_begin, full_end, _end = walk
    # Read one step ahead; lists have room for that.
    i_next = row_tile(walk, first, META)
    b_carried = b_grads
    if META.ahead:
        b_scores = first_scores(first < last, i_next, count, place, memory, barriers, I_GROUP, META)
        b_carried = (b_grads[0], b_grads[1], b_scores)
    for n in tl.range(first, last, disable_licm=META.lean):
        i_row = i_next
        i_next = row_tile(walk, n + 1, META)
        m_edge: gl.constexpr = EDGES == "all"
        if EDGES == "some":
            m_edge = (n < full_begin) | (n >= full_end)
        if META.split and I_GROUP == 1:
            b_carried = key_step(b_carried, i_row, count, place, memory, barriers, rules, META, DERIVATIVE)
        elif META.split:
            b_words = words_at(visits, place, n, m_edge, META, True, 0)
            b_carried = value_step(
                b_carried, i_row, m_edge, b_words, count, place, o_key, memory, barriers, rules,
                META, SCORE, DERIVATIVE, MASK,
            )  # fmt: skip
        else:
            b_words = words_at(visits, place, n, m_edge, META, True, I_GROUP)
            b_carried = step(
                b_carried, i_row, i_next, n + 1 < last, m_edge, b_words, count, place, o_key, memory, barriers, rules,
                META, SCORE, DERIVATIVE, MASK, I_GROUP,
            )  # fmt: skip
        count += 1
    if META.ahead:
        b_carried = (b_carried[0], b_carried[1])
    return b_carried, count


@gluon.jit
def no_grads(I_GROUP: gl.constexpr, META: gl.constexpr):
    """What a warpgroup sums up: (dK, dV) of its 64 keys; where two share 64 keys, the first (dV,), the second the
    strips of dK."""
    STRIP: gl.constexpr = META.strip
    BLOCK_DV: gl.constexpr = META.block_dv
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    if META.split and I_GROUP == 1:
        return zero_strips(keys, ROWS, STRIP, META.strips)
    elif META.split:
        return (gl.zeros([ROWS, BLOCK_DV], gl.float32, values),)
    else:
        return (gl.zeros([ROWS, STRIP], gl.float32, keys), gl.zeros([ROWS, BLOCK_DV], gl.float32, values))


@gluon.jit
def clean(smem, place, first, row, META: gl.constexpr):
    """Puts zeros where 64 keys or values, from `row` of the tile on, hold what no product may see, in all strips."""
    STRIPS: gl.constexpr = smem.shape[0]
    for i in gl.static_range(STRIPS):
        if META.packed:
            if place.seqlen_k - first < ROWS:
                without_rows(strip_of(smem, i).slice(row, ROWS, dim=0), place.seqlen_k - first)
        if META.guarded:
            without_nan(smem.index(i), row, ROWS)
    if META.packed or META.guarded:
        # Triton would put one into every step of the loop that reads this memory.
        thread_barrier()


@gluon.jit
def consumer(
    descriptors, memory, barriers, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One math warpgroup: 64 keys, its own or, where `split`, those of the other too."""
    TILE_Q: gl.constexpr = META.tile_q
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    row: gl.constexpr = 0 if META.split else I_GROUP * ROWS
    kv_full, _full, _handing = barriers
    packing, size, rules, visits = call
    shared = key_tile(packing, size, visits, ONE_GROUP, META)
    first = shared.tile * META.tile_kv + row
    o_key = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    b_grads = no_grads(I_GROUP, META)
    count = 0
    if META.adds:
        before_first(memory[6], I_GROUP, META)
    mbarrier.wait(kv_full, 0)
    if not META.split or I_GROUP == 0:
        clean(memory[0], shared, first, row, META)
    if not META.split or I_GROUP == 1:
        clean(memory[1], shared, first, row, META)
    for i_member in range(META.group):
        place = with_head(shared, shared.head * META.group + i_member)
        b_grads, count = walk_rows(
            b_grads, count, place, o_key, memory, barriers, rules, visits, META, SCORE, DERIVATIVE, MASK, I_GROUP
        )  # fmt: skip
    slots = (memory[2], memory[3])
    if META.adds:
        query_token = start_last(memory, count, I_GROUP, META)
        # The other is done reading gradients by then: dV leaves while dQ is multiplied.
        store_values(descriptors, slots, results, b_grads[1], I_GROUP, rules, shared, first, META)
        hand_over_grad_q(warpgroup_mma_wait(0, [query_token]), memory[7], I_GROUP)
    # Both are done reading queries and gradients once both are here: that memory takes the results.
    meet()
    if META.split and I_GROUP == 1:
        store_keys(descriptors, slots, results, b_grads, 1, rules, shared, first, META)
    elif META.split:
        store_values(descriptors, slots, results, b_grads[0], 0, rules, shared, first, META)
    else:
        store_keys(descriptors, slots, results, b_grads, I_GROUP, rules, shared, first, META)
        if not META.adds:
            store_values(descriptors, slots, results, b_grads[1], I_GROUP, rules, shared, first, META)
    tma_store_wait(0)


@gluon.jit
def store_keys(descriptors, slots, results, b_grads, SLOT: gl.constexpr, rules, place, first, META: gl.constexpr):
    """dK of 64 keys, through the memory of a slot of queries."""
    store_strips(
        descriptors[5], results[0], slots[0], SLOT, b_grads, rules.scale, place, first, place.first_k, place.seqlen_k,
        META.headdim, META,
    )  # fmt: skip


@gluon.jit
def store_values(descriptors, slots, results, b_grad, SLOT: gl.constexpr, rules, place, first, META: gl.constexpr):
    """dV, through that of a slot of gradients. The weights that dropout left were added up unscaled."""
    if rules.dropout is not None:
        b_grad = b_grad * rules.dropout.factor
    smem = first_rows(slots[1].index(SLOT), descriptors[6])
    hand_over(
        descriptors[6], results[1], smem, b_grad, place, first, place.first_k, place.seqlen_k, 0, META.headdim_v,
        META.packed,
    )  # fmt: skip


@gluon.jit
def first_consumer(
    descriptors, memory, barriers, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK, 0)


@gluon.jit
def second_consumer(
    descriptors, memory, barriers, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    consumer(descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK, 1)


@gluon.jit
def first_adder(descriptors, memory, call, META: gl.constexpr):
    adder(descriptors, memory, call, META, 0)


@gluon.jit
def second_adder(descriptors, memory, call, META: gl.constexpr):
    adder(descriptors, memory, call, META, 1)


@gluon.jit
def specialize(
    descriptors, memory, barriers, statistics, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """The roles of the warps, and their registers."""
    if META.adds:
        gl.warp_specialize([
            (first_consumer, (descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK)),
            (second_consumer, (descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK)),
            (loader, (descriptors, memory, barriers, statistics, call, META)),
            (first_adder, (descriptors, memory, call, META)),
            (second_adder, (descriptors, memory, call, META)),
        ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_consumer, (descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK)),
            (second_consumer, (descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK)),
            (loader, (descriptors, memory, barriers, statistics, call, META)),
        ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, sums_desc, dk_desc, dv_desc, lse, delta, dk, dv, packing, size, rules,
    visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One program a key tile and key/value head; dQ unscaled, float32. Gradients of captured tensors are added."""
    STAGES: gl.constexpr = META.stages
    TILE_Q: gl.constexpr = META.tile_q
    TILE_KV: gl.constexpr = META.tile_kv
    STRIP: gl.constexpr = META.strip
    STRIPS: gl.constexpr = META.strips
    BLOCK_DV: gl.constexpr = META.block_dv
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [STRIPS, 1, TILE_KV, 1, STRIP], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, TILE_KV, 1, BLOCK_DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * STRIPS, 1, TILE_Q, 1, STRIP], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_Q, 1, BLOCK_DV], do_desc.layout)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_Q], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_Q], line)
    # dS, or what one warpgroup hands the other.
    ds_smem = q_smem
    sums_smem = q_smem
    if META.split:
        ds_smem = gl.allocate_shared_memory(gl.float32, [2, PIECE_ROWS, PIECE_COLUMNS], PIECE_MEMORY)
    if META.adds:
        grads: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_KV, TILE_Q], dtype)
        ds_smem = gl.allocate_shared_memory(dtype, [2, TILE_KV, TILE_Q], grads)
        sums_smem = gl.allocate_shared_memory(gl.float32, [2, 1, 1, PIECE_ROWS, PIECE_COLUMNS], sums_desc.layout)
    kv_full = new_barriers(1, 1).index(0)
    full = new_barriers(STAGES, 2)
    handing = full
    if META.split:
        handing = new_barriers(4, 1)
    specialize(
        (q_desc, k_desc, v_desc, do_desc, sums_desc, dk_desc, dv_desc),
        (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, sums_smem),
        (kv_full, full, handing),
        (lse, delta),
        (dk, dv),
        (packing, size, rules, visits),
        META,
        SCORE,
        DERIVATIVE,
        MASK,
    )
