"""The backward kernel: dK, dV and dQ in one walk over the query tiles of a key tile (FlashAttention-3, section 3.3).

Scores lie (keys, queries). With P = exp(S - lse), recomputed, and delta = rowsum(dO * O) - dlse,

    dP = V dO^T,  dS = P * (dP - delta),  dV += P dO,  dK += dS Q,  dQ = dS^T K.

Each of two math warpgroups owns 64 keys, and the weights go from its accumulators into the products that need them. dQ
needs all keys: both put their part of dS into shared memory, each multiplies half of dQ, and the copy engine adds that
to a float32 tensor, in no fixed order.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.bits import cut, words_at
from flashtile.backends.hopper.compat import gl, mbarrier, tma_add, tma_load, tma_store, tma_store_wait, view_as
from flashtile.backends.hopper.memory import clear_half, new_barriers, store_rows, without_nan, without_rows
from flashtile.backends.hopper.schedule import ONE_GROUP, ONE_WARP, row_tile, rows_walk
from flashtile.backends.hopper.softmax import LOG2E, ROWS
from flashtile.kernels.places import SCANNED, number_pointers, place_at, program_of, with_head
from flashtile.kernels.rules import grad_dots, ruled


@gluon.jit
def key_tile(packing, size, visits, layout: gl.constexpr, META: gl.constexpr):
    """The `Place` of this program, a key tile; its head is one of the keys'. `layout`: of the warps that ask."""
    i_batch, i_head, i_rank = program_of(size)
    o_lanes = gl.arange(0, SCANNED, layout)
    lists: gl.constexpr = META.masked == "lists"
    return place_at(i_batch, i_head, i_rank, o_lanes, packing, size, visits, META.tile_kv, True, False, lists)


@gluon.jit
def load_statistics(lse, delta, place, o_query):
    """(lse, delta) of some rows; lse inf where there is none."""
    m_rows = o_query < place.seqlen_q
    b_lse = gl.load(number_pointers(lse, place, o_query), mask=m_rows, other=float("inf"))
    b_delta = gl.load(number_pointers(delta, place, o_query), mask=m_rows, other=0.0)
    return b_lse, b_delta


@gluon.jit
def subtracted(b_lse):
    """What is taken from scores in base 2: inf for rows that saw no key or do not exist, so that all weights are 0."""
    return gl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@gluon.jit
def loader(
    descriptors, memory, barriers, statistics, call, META: gl.constexpr
):  # fmt: skip
    """The loading warp: keys and values once, then queries and gradients, each with its statistic, into rings."""
    TILE_Q: gl.constexpr = META.tile_q
    line: gl.constexpr = gl.BlockedLayout([TILE_Q // 32], [32], [1], [0])
    q_desc, k_desc, v_desc, do_desc, _dq_desc, _dk_desc, _dv_desc = descriptors
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, _ds_smem, _dq_smem = memory
    kv_full, full, empty, _ready = barriers
    lse, delta = statistics
    packing, size, rules, visits = call
    shared = key_tile(packing, size, visits, ONE_WARP, META)
    i_entry = shared.batch * META.dense
    first = shared.first_k + shared.tile * META.tile_kv
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [i_entry, first, shared.head, 0], kv_full, k_smem)
    tma_load(v_desc, [i_entry, first, shared.head, 0], kv_full, v_smem)
    count = 0
    for i_member in range(META.group):
        place = with_head(shared, shared.head * META.group + i_member)
        walk = rows_walk(place, rules.window, visits, META)
        # Read one step ahead; lists have room for that.
        i_next = row_tile(walk, walk[1], META)
        for n in range(walk[1], walk[4]):
            slot = count % META.stages
            phase = (count // META.stages) & 1
            i_row = i_next
            i_next = row_tile(walk, n + 1, META)
            where = [i_entry, place.first_q + i_row * TILE_Q, place.head, 0]
            b_lse, b_delta = load_statistics(lse, delta, place, i_row * TILE_Q + gl.arange(0, TILE_Q, line))
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(full.index(slot), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            tma_load(q_desc, where, full.index(slot), q_smem.index(slot))
            tma_load(do_desc, where, full.index(slot), do_smem.index(slot))
            # Only now does the warp wait for the numbers that it asked for above.
            lse_smem.index(slot).store(subtracted(b_lse))
            delta_smem.index(slot).store(b_delta)
            mbarrier.arrive(full.index(slot), count=1)
            count += 1


@gluon.jit
def half_of_grad_q(ds_smem, k_smem, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Starts this warpgroup's half of dS^T K: 64 of 128 queries; of 64 queries, 64 of 128 columns; or the part of its
    own keys, where there are no more than 64 of either."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_k = k_smem.reshape([TILE_KV, BLOCK_D])
    b_grad = ds_smem
    if META.tile_q == 128:
        b_grad = ds_smem.slice(I_GROUP * 64, 64, dim=1)
    elif META.block_d == 128:
        b_k = b_k.slice(I_GROUP * 64, 64, dim=1)
    else:
        b_grad = ds_smem.slice(I_GROUP * 64, 64, dim=0)
        b_k = b_k.slice(I_GROUP * 64, 64, dim=0)
    b_zeros = gl.zeros([64, 64], gl.float32, layout)
    return warpgroup_mma(b_grad.permute((1, 0)), b_k, b_zeros, use_acc=False, is_async=True)


@gluon.jit
def add_grad_q(descriptors, memory, b_grad_q, place, i_row, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Hands the half to the copy engine, which adds it; the engine has read the one before by then."""
    _q, _k, _v, _do, dq_desc, _dk, _dv = descriptors
    _k_smem, _v_smem, _q_smem, _do_smem, _lse, _delta, _ds, dq_smem = memory
    i_entry, row, i_head = place.batch * META.dense, place.first_q + i_row * META.tile_q, place.head
    tma_store_wait(0)
    dq_smem.index(I_GROUP).reshape([64, 64]).store(b_grad_q)
    fence_async_shared()
    if META.tile_q == 128:
        tma_add(dq_desc, [i_entry, row + I_GROUP * 64, i_head, 0], dq_smem.index(I_GROUP))
    elif META.block_d == 128:
        tma_add(dq_desc, [i_entry, row, i_head, I_GROUP * 64], dq_smem.index(I_GROUP))
    else:
        tma_add(dq_desc, [i_entry, row, i_head, 0], dq_smem.index(I_GROUP))


@gluon.jit
def step(
    b_grad_k, b_grad_v, i_row, m_edge, b_words, count, place, o_key, descriptors, memory, barriers, rules,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One query tile of one head: (dK, dV)."""
    TILE_Q: gl.constexpr = META.tile_q
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, _dq_smem = memory
    _kv_full, full, empty, ready = barriers
    slot = count % META.stages
    phase = (count // META.stages) & 1
    half = count % 2
    b_zeros = gl.zeros([ROWS, TILE_Q], gl.float32, scores)
    b_q = q_smem.index(slot).reshape([TILE_Q, BLOCK_D])
    b_grad_out = do_smem.index(slot).reshape([TILE_Q, BLOCK_DV])

    mbarrier.wait(full.index(slot), phase)
    if META.packed:
        left = place.seqlen_q - i_row * TILE_Q
        if left < TILE_Q:
            clear_half(b_q, b_grad_out, left, ready.index(3), place.head % META.group, I_GROUP, META)
    b_k = k_smem.reshape([TILE_KV, BLOCK_D]).slice(I_GROUP * ROWS, ROWS, dim=0)
    score_token = warpgroup_mma(b_k, b_q.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
    b_v = v_smem.reshape([TILE_KV, BLOCK_DV]).slice(I_GROUP * ROWS, ROWS, dim=0)
    weight_token = warpgroup_mma(b_v, b_grad_out.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
    b_scores = warpgroup_mma_wait(1, [score_token])
    o_query = (i_row * TILE_Q + gl.arange(0, TILE_Q, gl.SliceLayout(0, scores)))[None, :]
    MASKED: gl.constexpr = "never" if b_words is not None else "always" if META.masked == "always" else "edges"
    b_scores, m_valid, b_capped, b_plain = ruled(
        b_scores, m_edge, o_query, o_key[:, None], place, rules, META, SCORE, MASK, MASKED
    )
    if b_words is not None:
        b_scores = cut(b_scores, b_words, m_edge)
    b_lse = lse_smem.index(slot).load(gl.SliceLayout(0, scores))
    b_weights = gl.exp2(b_scores * rules.factor - b_lse[None, :])
    b_left = gl.convert_layout(b_weights.to(k_smem.dtype), gl.DotOperandLayout(0, values, 2))
    b_grad_weights = warpgroup_mma_wait(0, [weight_token])
    value_token = warpgroup_mma(b_left, b_grad_out, b_grad_v, is_async=True)
    b_delta = delta_smem.index(slot).load(gl.SliceLayout(0, scores))
    # Elsewhere a weight of 0 is enough: keys and values hold numbers alone by now.
    GUARDED: gl.constexpr = META.guarded and DERIVATIVE is not None
    b_grad, _outer = grad_dots(
        b_weights, b_grad_weights, b_delta[None, :], m_valid, b_capped, b_plain, o_query, o_key[:, None], place, rules,
        META, SCORE, DERIVATIVE, GUARDED, META.collects,
    )  # fmt: skip
    b_half = b_grad.to(k_smem.dtype)
    ds_smem.index(half).slice(I_GROUP * ROWS, ROWS, dim=0).store(b_half)
    fence_async_shared()
    mbarrier.arrive(ready.index(half), count=1)
    mbarrier.wait(ready.index(half), (count // 2) & 1)
    query_token = half_of_grad_q(ds_smem.index(half), k_smem, I_GROUP, META)
    key_token = warpgroup_mma(gl.convert_layout(b_half, gl.DotOperandLayout(0, keys, 2)), b_q, b_grad_k, is_async=True)
    b_grad_v = warpgroup_mma_wait(2, [value_token])
    b_grad_q = warpgroup_mma_wait(1, [query_token])
    # dQ leaves while dK is multiplied.
    add_grad_q(descriptors, memory, b_grad_q, place, i_row, I_GROUP, META)
    b_grad_k = warpgroup_mma_wait(0, [key_token])
    mbarrier.arrive(empty.index(slot), count=1)
    return b_grad_k, b_grad_v


@gluon.jit
def walk_rows(
    b_grad_k, b_grad_v, count, place, o_key, descriptors, memory, barriers, rules, visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """(dK, dV, steps so far) after the queries of one head."""
    walk = rows_walk(place, rules.window, visits, META)
    _tiles, begin, full_begin, full_end, end = walk
    # Read one step ahead; lists have room for that.
    i_next = row_tile(walk, begin, META)
    for n in range(begin, end):
        i_row = i_next
        i_next = row_tile(walk, n + 1, META)
        m_edge = (n < full_begin) | (n >= full_end)
        b_words = words_at(visits, place, n, m_edge, META, True, I_GROUP)
        b_grad_k, b_grad_v = step(
            b_grad_k, b_grad_v, i_row, m_edge, b_words, count, place, o_key, descriptors, memory, barriers, rules,
            META, SCORE, DERIVATIVE, MASK, I_GROUP,
        )  # fmt: skip
        count += 1
    return b_grad_k, b_grad_v, count


@gluon.jit
def consumer(
    descriptors, memory, barriers, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One math warpgroup: 64 keys, and half of every dQ."""
    TILE_Q: gl.constexpr = META.tile_q
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    kv_full, _full, _empty, ready = barriers
    dk, dv = results
    packing, size, rules, visits = call
    shared = key_tile(packing, size, visits, ONE_GROUP, META)
    b_grad_k = gl.zeros([ROWS, BLOCK_D], gl.float32, keys)
    b_grad_v = gl.zeros([ROWS, BLOCK_DV], gl.float32, values)
    first = shared.tile * TILE_KV + I_GROUP * ROWS
    o_key = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    count = 0
    mbarrier.wait(kv_full, 0)
    k_smem, v_smem, _q, _do, _lse, _delta, _ds, _dq = memory
    b_k = k_smem.reshape([TILE_KV, BLOCK_D]).slice(I_GROUP * ROWS, ROWS, dim=0)
    b_v = v_smem.reshape([TILE_KV, BLOCK_DV]).slice(I_GROUP * ROWS, ROWS, dim=0)
    if META.packed:
        if shared.seqlen_k - first < ROWS:
            without_rows(b_k, shared.seqlen_k - first)
            without_rows(b_v, shared.seqlen_k - first)
    if META.guarded:
        without_nan(b_k)
        without_nan(b_v)
    for i_member in range(META.group):
        place = with_head(shared, shared.head * META.group + i_member)
        b_grad_k, b_grad_v, count = walk_rows(
            b_grad_k, b_grad_v, count, place, o_key, descriptors, memory, barriers, rules, visits,
            META, SCORE, DERIVATIVE, MASK, I_GROUP,
        )  # fmt: skip
    tma_store_wait(0)
    # Both are done reading queries and gradients once both are here: that memory takes the results.
    mbarrier.arrive(ready.index(2), count=1)
    mbarrier.wait(ready.index(2), 0)
    store_grads(descriptors, memory, dk, dv, b_grad_k * rules.scale, b_grad_v, shared, first, I_GROUP, META)


@gluon.jit
def store_grads(
    descriptors, memory, dk, dv, b_grad_k, b_grad_v, place, first, I_GROUP: gl.constexpr, META: gl.constexpr
):  # fmt: skip
    """dK and dV of 64 keys, through the memory of a slot of queries and of gradients."""
    HALVES: gl.constexpr = META.tile_q // 64
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    _q_desc, k_desc, _v_desc, _do_desc, _dq_desc, dk_desc, dv_desc = descriptors
    _k_smem, _v_smem, q_smem, do_smem, _lse_smem, _delta_smem, _ds_smem, _dq_smem = memory
    k_out = view_as(q_smem.index(I_GROUP), k_desc.dtype, [HALVES, 1, ROWS, 1, BLOCK_D], dk_desc.layout).index(0)
    v_out = view_as(do_smem.index(I_GROUP), k_desc.dtype, [HALVES, 1, ROWS, 1, BLOCK_DV], dv_desc.layout).index(0)
    k_out.reshape([ROWS, BLOCK_D]).store(b_grad_k.to(k_desc.dtype))
    v_out.reshape([ROWS, BLOCK_DV]).store(b_grad_v.to(k_desc.dtype))
    if META.packed:
        row, left = place.first_k + first, place.seqlen_k - first
        store_rows(dk, k_out.reshape([ROWS, BLOCK_D]), row, left, place.head, META.headdim)
        store_rows(dv, v_out.reshape([ROWS, BLOCK_DV]), row, left, place.head, META.headdim_v)
    else:
        fence_async_shared()
        tma_store(dk_desc, [place.batch, first, place.head, 0], k_out)
        tma_store(dv_desc, [place.batch, first, place.head, 0], v_out)
        tma_store_wait(0)


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
def specialize(
    descriptors, memory, barriers, statistics, results, call,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """The roles of the warps, and their registers."""
    gl.warp_specialize([
        (first_consumer, (descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK)),
        (second_consumer, (descriptors, memory, barriers, results, call, META, SCORE, DERIVATIVE, MASK)),
        (loader, (descriptors, memory, barriers, statistics, call, META)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc, lse, delta, dk, dv, packing, size, rules, visits,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One program a key tile and key/value head; dQ unscaled, float32. Gradients of captured tensors are added."""
    STAGES: gl.constexpr = META.stages
    TILE_Q: gl.constexpr = META.tile_q
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [1, TILE_KV, 1, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, TILE_KV, 1, BLOCK_DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_Q, 1, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_Q, 1, BLOCK_DV], do_desc.layout)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_Q], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_Q], line)
    grads: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_KV, TILE_Q], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [2, TILE_KV, TILE_Q], grads)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 1, 64, 1, 64], dq_desc.layout)
    kv_full = new_barriers(1, 1).index(0)
    full = new_barriers(STAGES, 2)
    empty = new_barriers(STAGES, 2)
    ready = new_barriers(4, 2)
    specialize(
        (q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc),
        (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem),
        (kv_full, full, empty, ready),
        (lse, delta),
        (dk, dv),
        (packing, size, rules, visits),
        META,
        SCORE,
        DERIVATIVE,
        MASK,
    )
