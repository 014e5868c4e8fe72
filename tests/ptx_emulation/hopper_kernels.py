"""Kernels in Gluon for Hopper; MISTAKE names what one of them leaves out, so that tests see whether it is found."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tests.ptx_emulation.compiling import block_barrier, tma_add, tma_load, tma_store


@gluon.jit
def layout_product(
    a,
    b,
    out,
    A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    K_STEP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A B of one block: operands in any layout of shared memory, written by threads and read by wgmma."""
    loads: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, M, gl.SliceLayout(1, loads))
    k_of_a = gl.arange(0, K, gl.SliceLayout(0, loads))
    k_of_b = gl.arange(0, K, gl.SliceLayout(1, loads))
    column = gl.arange(0, N, gl.SliceLayout(0, loads))
    b_a = gl.load(a + row[:, None] * K + k_of_a[None, :])
    b_b = gl.load(b + k_of_b[:, None] * N + column[None, :])
    a_shared = gl.allocate_shared_memory(b_a.dtype, [M, K], A_LAYOUT)
    b_shared = gl.allocate_shared_memory(b_b.dtype, [K, N], B_LAYOUT)
    a_shared.store(b_a)
    b_shared.store(b_b)
    fence_async_shared()
    block_barrier()
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, K_STEP])
    acc = gl.zeros([M, N], gl.float32, products)
    acc = warpgroup_mma_wait(0, [warpgroup_mma(a_shared, b_shared, acc, is_async=True)])
    o_row = gl.arange(0, M, gl.SliceLayout(1, products))
    o_column = gl.arange(0, N, gl.SliceLayout(0, products))
    gl.store(out + o_row[:, None] * N + o_column[None, :], acc)


@gluon.jit
def _load_tiles(a_desc, b_desc, a_shared, b_shared, full, empty, tiles, steps, MISTAKE: gl.constexpr):
    """The loading warp: tiles of A and B into the ring."""
    STAGES: gl.constexpr = a_shared.shape[0]
    TILE: gl.constexpr = a_shared.shape[1]
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for step in range(steps):
            slot = count % STAGES
            if MISTAKE != "loads do not wait":
                mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma_load(a_desc, [tile * TILE, step * TILE], full.index(slot), a_shared.index(slot))
            tma_load(b_desc, [step * TILE, 0], full.index(slot), b_shared.index(slot))
            count += 1


@gluon.jit
def _multiply_tiles(
    out_desc, a_shared, b_shared, out_shared, full, empty, tiles, steps, ADDS: gl.constexpr, MISTAKE: gl.constexpr
):
    """The multiplying warpgroup."""
    STAGES: gl.constexpr = a_shared.shape[0]
    TILE: gl.constexpr = a_shared.shape[1]
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([TILE, TILE], gl.float32, products)
        for _ in range(steps):
            slot = count % STAGES
            if MISTAKE != "products do not wait for loads":
                mbarrier.wait(full.index(slot), (count // STAGES) & 1)
            token = warpgroup_mma(a_shared.index(slot), b_shared.index(slot), acc, is_async=True)
            if MISTAKE == "slots are given back early":
                mbarrier.arrive(empty.index(slot), count=1)
            if MISTAKE == "products are not waited for":
                acc = warpgroup_mma_wait(1, [token])
            else:
                acc = warpgroup_mma_wait(0, [token])
            if MISTAKE != "slots are given back early" and MISTAKE != "slots are not given back":
                mbarrier.arrive(empty.index(slot), count=1)
            count += 1
        if MISTAKE != "stores are not waited for":
            tma.store_wait(0)
        out_shared.store(acc)
        fence_async_shared()
        if ADDS:
            tma_add(out_desc, [0, 0], out_shared)
        else:
            tma_store(out_desc, [tile * TILE, 0], out_shared)
    if MISTAKE != "the last store is not waited for":
        tma.store_wait(0)


@gluon.jit
def ring_product(
    a_desc,
    b_desc,
    out_desc,
    tiles,
    steps,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    ADDS: gl.constexpr,
    MISTAKE: gl.constexpr,
):
    """A B for tiles of rows: a warp loads through a ring of buffers, a warpgroup multiplies and stores.

    ADDS: all tiles are added up instead, in any order.
    """
    a_shared = gl.allocate_shared_memory(a_desc.dtype, [STAGES, TILE, TILE], a_desc.layout)
    b_shared = gl.allocate_shared_memory(b_desc.dtype, [STAGES, TILE, TILE], b_desc.layout)
    out_shared = gl.allocate_shared_memory(gl.float32, [TILE, TILE], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    gl.warp_specialize(
        [
            (_multiply_tiles, (out_desc, a_shared, b_shared, out_shared, full, empty, tiles, steps, ADDS, MISTAKE)),
            (_load_tiles, (a_desc, b_desc, a_shared, b_shared, full, empty, tiles, steps, MISTAKE)),
        ],
        [1],
        [24],
    )


@gluon.jit
def _load_heads(q_desc, k_desc, v_desc, q_shared, k_shared, v_shared, q_full, full, empty, blocks):
    """The loading warp: both query tiles, then key and value tiles into the ring."""
    STAGES: gl.constexpr = k_shared.shape[0]
    TILE: gl.constexpr = k_shared.shape[2]
    head = gl.program_id(1)
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
        row = (gl.program_id(0) * 2 + group) * TILE
        tma_load(q_desc, [head, row, 0], q_full.index(group), q_shared.index(group))
    for j in range(blocks):
        slot = j % STAGES
        mbarrier.wait(empty.index(slot), ((j // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [head, j * TILE, 0], full.index(slot), k_shared.index(slot))
        tma_load(v_desc, [head, j * TILE, 0], full.index(slot), v_shared.index(slot))


@gluon.jit
def _attend(
    out_desc,
    lse,
    q_shared,
    k_shared,
    v_shared,
    q_full,
    full,
    empty,
    group,
    scale,
    length,
    blocks,
    MISTAKE: gl.constexpr,
):
    """A warpgroup with its own query tile; the output takes the tile's place in shared memory."""
    STAGES: gl.constexpr = k_shared.shape[0]
    TILE: gl.constexpr = k_shared.shape[2]
    D: gl.constexpr = k_shared.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    query = q_shared.reshape([TILE, D])
    row = (gl.program_id(0) * 2 + group) * TILE
    highest = gl.full([TILE], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([TILE, D], gl.float32, o_layout)
    zeros = gl.zeros([TILE, TILE], gl.float32, s_layout)
    if MISTAKE != "the query is not waited for":
        mbarrier.wait(q_full, 0)
    for j in range(blocks):
        slot = j % STAGES
        mbarrier.wait(full.index(slot), (j // STAGES) & 1)
        key = k_shared.index(slot).reshape([TILE, D]).permute((1, 0))
        token = warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [token]) * scale
        o_key = j * TILE + gl.arange(0, TILE, gl.SliceLayout(0, s_layout))
        scores = gl.where((o_key < length)[None, :], scores, -float("inf"))
        higher = gl.maximum(highest, gl.max(scores, 1))
        weights = gl.exp2(scores - higher[:, None])
        fade = gl.exp2(highest - higher)
        total = total * fade + gl.sum(weights, 1)
        highest = higher
        acc = acc * gl.convert_layout(fade, row_layout)[:, None]
        left = gl.convert_layout(weights.to(gl.bfloat16), p_layout)
        token = warpgroup_mma(left, v_shared.index(slot).reshape([TILE, D]), acc, is_async=True)
        if MISTAKE == "values are given back early":
            mbarrier.arrive(empty.index(slot), count=1)
        acc = warpgroup_mma_wait(0, [token])
        if MISTAKE != "values are given back early":
            mbarrier.arrive(empty.index(slot), count=1)
    o_row = row + gl.arange(0, TILE, gl.SliceLayout(1, s_layout))
    gl.store(lse + gl.program_id(1) * length + o_row, highest + gl.log2(total), mask=o_row < length)
    query.store((acc / gl.convert_layout(total, row_layout)[:, None]).to(gl.bfloat16))
    fence_async_shared()
    tma_store(out_desc, [gl.program_id(1), row, 0], q_shared)
    tma.store_wait(0)


@gluon.jit
def attention(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse,
    scale,
    length,
    TILE: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    MISTAKE: gl.constexpr,
):
    """softmax(Q K^T) V of a head: two warpgroups share the keys and values that a warp loads; lse in powers of two."""
    q_shared = gl.allocate_shared_memory(q_desc.dtype, [2, 1, TILE, D], q_desc.layout)
    k_shared = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, TILE, D], k_desc.layout)
    v_shared = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, TILE, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    blocks = gl.cdiv(length, TILE)
    first = q_shared.index(0)
    other = q_shared.index(1)
    first_full = q_full.index(0)
    other_full = q_full.index(1)
    gl.warp_specialize(
        [
            (
                _attend,
                (out_desc, lse, first, k_shared, v_shared, first_full, full, empty, 0, scale, length, blocks, MISTAKE),
            ),
            (
                _attend,
                (out_desc, lse, other, k_shared, v_shared, other_full, full, empty, 1, scale, length, blocks, MISTAKE),
            ),
            (_load_heads, (q_desc, k_desc, v_desc, q_shared, k_shared, v_shared, q_full, full, empty, blocks)),
        ],
        [4, 1],
        [160, 24],
    )
