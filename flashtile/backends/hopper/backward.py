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

from flashtile.backends.hopper.compat import gl, mbarrier, tma_add, tma_load, tma_store, tma_store_wait, view_as
from flashtile.backends.hopper.forward import new_barriers, visible
from flashtile.backends.hopper.schedule import has_part, part, query_tiles

ROWS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def place_of_program(seqlen_k, heads_kv, META: gl.constexpr):
    """(batch entry, key/value head, key tile): the first tiles, which a diagonal lets most queries see, come first."""
    tiles = gl.cdiv(seqlen_k, META.tile_kv)
    i_pair = gl.program_id(0) // tiles
    return i_pair // heads_kv, i_pair % heads_kv, gl.program_id(0) % tiles


@gluon.jit
def loader(descriptors, memory, barriers, statistics, sizes, window, META: gl.constexpr):
    """The loading warp: keys and values once, then queries and gradients, each with its statistic, into rings."""
    TILE_Q: gl.constexpr = META.tile_q
    line: gl.constexpr = gl.BlockedLayout([TILE_Q // 32], [32], [1], [0])
    q_desc, k_desc, v_desc, do_desc, _dq_desc, _dk_desc, _dv_desc = descriptors
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, _ds_smem, _dq_smem = memory
    lse, delta = statistics
    kv_full, q_full, q_empty, do_full, do_empty, _ready = barriers
    seqlen_q, seqlen_k, heads_kv = sizes
    left, right = window
    i_batch, i_head, i_column = place_of_program(seqlen_k, heads_kv, META)
    begin, _full_begin, _full_end, end = query_tiles(i_column, seqlen_q, seqlen_k, left, right, META)
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [i_batch, i_column * META.tile_kv, i_head, 0], kv_full, k_smem)
    tma_load(v_desc, [i_batch, i_column * META.tile_kv, i_head, 0], kv_full, v_smem)
    count = 0
    for i_member in range(META.group):
        i_query_head = i_head * META.group + i_member
        base = (i_batch * heads_kv * META.group + i_query_head).to(gl.int64) * seqlen_q
        for i_row in range(begin, end):
            slot = count % META.stages
            phase = (count // META.stages) & 1
            place = [i_batch, i_row * TILE_Q, i_query_head, 0]
            o_query = i_row * TILE_Q + gl.arange(0, TILE_Q, line)
            # Rows that saw no key or do not exist have no weights.
            b_lse = gl.load(lse + base + o_query, mask=o_query < seqlen_q, other=float("inf"))
            b_lse = gl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
            b_delta = gl.load(delta + base + o_query, mask=o_query < seqlen_q, other=0.0)
            mbarrier.wait(q_empty.index(slot), phase ^ 1)
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
            tma_load(q_desc, place, q_full.index(slot), q_smem.index(slot))
            lse_smem.index(slot).store(b_lse)
            mbarrier.arrive(q_full.index(slot), count=1)
            mbarrier.wait(do_empty.index(slot), phase ^ 1)
            mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes)
            tma_load(do_desc, place, do_full.index(slot), do_smem.index(slot))
            delta_smem.index(slot).store(b_delta)
            mbarrier.arrive(do_full.index(slot), count=1)
            count += 1


@gluon.jit
def half_of_grad_q(ds_smem, k_smem, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Starts this warpgroup's half of dS^T K: 64 of 128 queries, or of 64 queries 64 of 128 columns."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_k = k_smem.reshape([TILE_KV, BLOCK_D])
    if META.tile_q == 128:
        b_grad = ds_smem.slice(I_GROUP * 64, 64, dim=1)
    else:
        b_grad = ds_smem
        b_k = b_k.slice(I_GROUP * 64, 64, dim=1)
    b_zeros = gl.zeros([64, 64], gl.float32, layout)
    return warpgroup_mma(b_grad.permute((1, 0)), b_k, b_zeros, use_acc=False, is_async=True)


@gluon.jit
def add_grad_q(dq_desc, dq_smem, b_grad_q, i_batch, i_row, i_head, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Hands the half to the copy engine, which adds it; the engine has read the one before by then."""
    tma_store_wait(0)
    dq_smem.index(I_GROUP).reshape([64, 64]).store(b_grad_q)
    fence_async_shared()
    row = i_row * META.tile_q
    if META.tile_q == 128:
        tma_add(dq_desc, [i_batch, row + I_GROUP * 64, i_head, 0], dq_smem.index(I_GROUP))
    else:
        tma_add(dq_desc, [i_batch, row, i_head, I_GROUP * 64], dq_smem.index(I_GROUP))


@gluon.jit
def step(
    b_grad_k, b_grad_v, i_row, count, place, o_key, descriptors, memory, barriers, sizes, window, factor,
    META: gl.constexpr, I_GROUP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One query tile of one head."""
    TILE_Q: gl.constexpr = META.tile_q
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem = memory
    _kv_full, q_full, q_empty, do_full, do_empty, ready = barriers
    seqlen_q, seqlen_k, _heads_kv = sizes
    left, right = window
    i_batch, i_head = place
    slot = count % META.stages
    phase = (count // META.stages) & 1
    half = count % 2
    b_zeros = gl.zeros([ROWS, TILE_Q], gl.float32, scores)
    b_q = q_smem.index(slot).reshape([TILE_Q, BLOCK_D])
    b_grad_out = do_smem.index(slot).reshape([TILE_Q, BLOCK_DV])

    mbarrier.wait(q_full.index(slot), phase)
    b_k = k_smem.reshape([TILE_KV, BLOCK_D]).slice(I_GROUP * ROWS, ROWS, dim=0)
    score_token = warpgroup_mma(b_k, b_q.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(slot), phase)
    b_v = v_smem.reshape([TILE_KV, BLOCK_DV]).slice(I_GROUP * ROWS, ROWS, dim=0)
    weight_token = warpgroup_mma(b_v, b_grad_out.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
    b_scores = warpgroup_mma_wait(1, [score_token])
    b_lse = lse_smem.index(slot).load(gl.SliceLayout(0, scores))
    b_weights = gl.exp2(b_scores * factor - b_lse[None, :])
    if MASKED:
        o_query = i_row * TILE_Q + gl.arange(0, TILE_Q, gl.SliceLayout(0, scores))
        m_tile = visible(o_query[None, :], o_key[:, None], seqlen_q, seqlen_k, left, right, META)
        b_weights = gl.where(m_tile, b_weights, 0.0)
    b_left = gl.convert_layout(b_weights.to(k_smem.dtype), gl.DotOperandLayout(0, values, 2))
    b_grad_weights = warpgroup_mma_wait(0, [weight_token])
    value_token = warpgroup_mma(b_left, b_grad_out, b_grad_v, is_async=True)
    b_delta = delta_smem.index(slot).load(gl.SliceLayout(0, scores))
    b_grad = (b_weights * (b_grad_weights - b_delta[None, :])).to(k_smem.dtype)
    ds_smem.index(half).slice(I_GROUP * ROWS, ROWS, dim=0).store(b_grad)
    fence_async_shared()
    mbarrier.arrive(ready.index(half), count=1)
    key_token = warpgroup_mma(gl.convert_layout(b_grad, gl.DotOperandLayout(0, keys, 2)), b_q, b_grad_k, is_async=True)
    b_grad_v = warpgroup_mma_wait(1, [value_token])
    mbarrier.arrive(do_empty.index(slot), count=1)
    mbarrier.wait(ready.index(half), (count // 2) & 1)
    query_token = half_of_grad_q(ds_smem.index(half), k_smem, I_GROUP, META)
    b_grad_k = warpgroup_mma_wait(1, [key_token])
    mbarrier.arrive(q_empty.index(slot), count=1)
    b_grad_q = warpgroup_mma_wait(0, [query_token])
    _q, _k, _v, _do, dq_desc, _dk, _dv = descriptors
    add_grad_q(dq_desc, dq_smem, b_grad_q, i_batch, i_row, i_head, I_GROUP, META)
    return b_grad_k, b_grad_v


@gluon.jit
def consumer(
    descriptors, memory, barriers, sizes, window, scale, META: gl.constexpr, I_GROUP: gl.constexpr
):  # fmt: skip
    """One math warpgroup: 64 keys, and half of every dQ."""
    TILE_Q: gl.constexpr = META.tile_q
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    kv_full, _q_full, _q_empty, _do_full, _do_empty, ready = barriers
    seqlen_q, seqlen_k, heads_kv = sizes
    left, right = window
    i_batch, i_shared, i_column = place_of_program(seqlen_k, heads_kv, META)
    begin, full_begin, full_end, end = query_tiles(i_column, seqlen_q, seqlen_k, left, right, META)
    b_grad_k = gl.zeros([ROWS, BLOCK_D], gl.float32, keys)
    b_grad_v = gl.zeros([ROWS, BLOCK_DV], gl.float32, values)
    first = i_column * META.tile_kv + I_GROUP * ROWS
    o_key = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    factor = scale * LOG2E
    count = 0
    mbarrier.wait(kv_full, 0)
    for i_member in range(META.group):
        i_head = i_shared * META.group + i_member
        for PART in gl.static_range(3):
            if has_part(PART, META.right, META.left):
                low, high = part(begin, full_begin, full_end, end, PART)
                for i_row in range(low, high):
                    b_grad_k, b_grad_v = step(
                        b_grad_k, b_grad_v, i_row, count, (i_batch, i_head), o_key, descriptors, memory, barriers,
                        sizes, window, factor, META, I_GROUP, PART != 1,
                    )  # fmt: skip
                    count += 1
    tma_store_wait(0)
    # Both are done reading queries and gradients once both are here: that memory takes the results.
    mbarrier.arrive(ready.index(2), count=1)
    mbarrier.wait(ready.index(2), 0)
    store_grads(descriptors, memory, b_grad_k * scale, b_grad_v, i_batch, first, i_shared, I_GROUP, META)


@gluon.jit
def store_grads(
    descriptors, memory, b_grad_k, b_grad_v, i_batch, first, i_head, I_GROUP: gl.constexpr, META: gl.constexpr
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
    fence_async_shared()
    tma_store(dk_desc, [i_batch, first, i_head, 0], k_out)
    tma_store(dv_desc, [i_batch, first, i_head, 0], v_out)
    tma_store_wait(0)


@gluon.jit
def first_consumer(descriptors, memory, barriers, sizes, window, scale, META: gl.constexpr):
    consumer(descriptors, memory, barriers, sizes, window, scale, META, 0)


@gluon.jit
def second_consumer(descriptors, memory, barriers, sizes, window, scale, META: gl.constexpr):
    consumer(descriptors, memory, barriers, sizes, window, scale, META, 1)


@gluon.jit
def specialize(descriptors, memory, barriers, statistics, sizes, window, scale, META: gl.constexpr):
    """The roles of the warps, and their registers."""
    gl.warp_specialize([
        (first_consumer, (descriptors, memory, barriers, sizes, window, scale, META)),
        (second_consumer, (descriptors, memory, barriers, sizes, window, scale, META)),
        (loader, (descriptors, memory, barriers, statistics, sizes, window, META)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads_kv", "left", "right"])
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc, lse, delta,
    seqlen_q, seqlen_k, heads_kv, left, right, scale, META: gl.constexpr,
):  # fmt: skip
    """One program a key tile and key/value head. lse, delta: (batch, heads, seqlen_q); dQ unscaled, float32."""
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
    q_full = new_barriers(STAGES, 2)
    q_empty = new_barriers(STAGES, 2)
    do_full = new_barriers(STAGES, 2)
    do_empty = new_barriers(STAGES, 2)
    ready = new_barriers(3, 2)
    specialize(
        (q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc),
        (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem),
        (kv_full, q_full, q_empty, do_full, do_empty, ready),
        (lse, delta),
        (seqlen_q, seqlen_k, heads_kv),
        (left, right),
        scale,
        META,
    )
