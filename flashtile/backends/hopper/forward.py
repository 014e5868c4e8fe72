"""The forward kernel: one warp loads, two or three warpgroups multiply (FlashAttention-3, Shah et al. 2024).

Each math warpgroup owns 64 rows of the query tile. The scores of one key tile are computed while the weights of the
tile before are multiplied with their values, so that the tensor cores work under the exponentials. Programs are
persistent; the loader runs ahead into the next query tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.compat import gl, mbarrier, tma_load, tma_store, tma_store_wait
from flashtile.backends.hopper.schedule import announce, hand_out, has_part, hear, key_tiles, part, place_of

ROWS = gl.constexpr(64)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def loader(
    descriptors, memory, barriers, mailbox, counter,
    sizes, window, META: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries once a tile, keys and values into a ring of slots."""
    CONSUMERS: gl.constexpr = META.consumers
    q_desc, k_desc, v_desc, _o_desc = descriptors
    q_smem, k_smem, v_smem, _o_smem = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    seqlen_q, seqlen_k, heads, section, total = sizes
    left, right = window
    tiles_q = gl.cdiv(seqlen_q, META.tile_q)
    count = 0
    turn = 0
    i_tile = gl.program_id(0)
    while i_tile < total:
        i_next = hand_out(counter, i_tile, META)
        i_batch, i_head, i_row = place_of(i_tile, tiles_q, heads, section, total, META)
        begin, _full_begin, _full_end, end = key_tiles(i_row, seqlen_q, seqlen_k, left, right, META)
        for i in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(i), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
            tma_load(q_desc, [i_batch, i_row * META.tile_q + i * ROWS, i_head, 0], q_full.index(i), q_smem.index(i))
        for j in range(end - 1, begin - 1, -1):
            slot = count % META.stages
            phase = (count // META.stages) & 1
            place = [i_batch, j * META.tile_kv, i_head // META.group, 0]
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, place, k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma_load(v_desc, place, v_full.index(slot), v_smem.index(slot))
            count += 1
        if META.dynamic:
            announce(mailbox, i_next, turn)
        i_tile = i_next
        turn += 1


@gluon.jit
def visible(o_query, o_key, seqlen_q, seqlen_k, left, right, META: gl.constexpr):
    """What the window and the sequence's end allow."""
    diagonal = 0 if META.top_left else seqlen_k - seqlen_q
    m_tile = o_key < seqlen_k
    if META.right:
        m_tile &= o_key <= o_query + diagonal + right
    if META.left:
        m_tile &= o_key >= o_query + diagonal - left
    return m_tile


@gluon.jit
def online_softmax(b_scores, b_max, b_sum, scale, MASKED: gl.constexpr):
    """(weights, raised maximum, new sum, what older sums are multiplied with); maxima in base 2, -inf: nothing seen."""
    b_raised = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
    b_base = b_raised
    if MASKED:
        # A row that has seen nothing: -inf less -inf would be NaN.
        b_base = gl.where(b_raised == float("-inf"), 0.0, b_raised)
    b_weights = gl.exp2(b_scores * scale - b_base[:, None])
    b_rescale = gl.exp2(b_max - b_base)
    return b_weights, b_raised, b_sum * b_rescale + gl.sum(b_weights, 1), b_rescale


@gluon.jit
def multiply_scores(b_q, k_smem, k_full, count, ZEROS, META: gl.constexpr):
    """Starts q k^T with the keys of slot `count`; nothing waits for the result yet."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    slot = count % META.stages
    mbarrier.wait(k_full.index(slot), (count // META.stages) & 1)
    b_k = k_smem.index(slot).reshape([TILE_KV, BLOCK_D])
    return warpgroup_mma(b_q, b_k.permute((1, 0)), ZEROS, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(b_weights, b_out, v_smem, v_full, count, META: gl.constexpr):
    """Starts out += p v with the values of slot `count`."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_DV: gl.constexpr = META.block_dv
    slot = count % META.stages
    mbarrier.wait(v_full.index(slot), (count // META.stages) & 1)
    b_v = v_smem.index(slot).reshape([TILE_KV, BLOCK_DV])
    return warpgroup_mma(b_weights, b_v, b_out, is_async=True)


@gluon.jit
def step(
    b_q, b_weights, b_out, b_max, b_sum, j, count, o_query, memory, barriers,
    seqlen_q, seqlen_k, left, right, scale, META: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Key tile j: its scores and weights, while the weights of the tile before meet their values."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_DV: gl.constexpr = META.block_dv
    _, k_smem, v_smem, _ = memory
    _, _, k_full, k_empty, v_full, v_empty = barriers
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    b_zeros = gl.zeros([ROWS, TILE_KV], gl.float32, scores)
    score_token = multiply_scores(b_q, k_smem, k_full, count, b_zeros, META)
    out_token = multiply_values(b_weights, b_out, v_smem, v_full, count - 1, META)
    b_scores = warpgroup_mma_wait(1, [score_token])
    mbarrier.arrive(k_empty.index(count % META.stages), count=1)
    if MASKED:
        o_key = j * META.tile_kv + gl.arange(0, TILE_KV, gl.SliceLayout(0, scores))
        m_tile = visible(o_query[:, None], o_key[None, :], seqlen_q, seqlen_k, left, right, META)
        b_scores = gl.where(m_tile, b_scores, float("-inf"))
    b_new, b_max, b_sum, b_rescale = online_softmax(b_scores, b_max, b_sum, scale, MASKED)
    b_half = b_new.to(k_smem.dtype)
    b_out = warpgroup_mma_wait(0, [out_token])
    mbarrier.arrive(v_empty.index((count - 1) % META.stages), count=1)
    b_weights = gl.convert_layout(b_half, gl.DotOperandLayout(0, output, 2))
    b_out = b_out * gl.convert_layout(b_rescale, gl.SliceLayout(1, output))[:, None]
    return b_weights, b_out, b_max, b_sum


@gluon.jit
def consumer(
    descriptors, memory, barriers, mailbox, lse,
    sizes, window, scale, META: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One math warpgroup: 64 rows of each query tile."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    q_smem, k_smem, v_smem, o_smem = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    seqlen_q, seqlen_k, heads, section, total = sizes
    left, right = window
    tiles_q = gl.cdiv(seqlen_q, META.tile_q)
    count = 0
    turn = 0
    i_tile = gl.program_id(0)
    while i_tile < total:
        i_batch, i_head, i_row = place_of(i_tile, tiles_q, heads, section, total, META)
        begin, full_begin, full_end, end = key_tiles(i_row, seqlen_q, seqlen_k, left, right, META)
        first = i_row * META.tile_q + I_GROUP * ROWS
        o_query = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
        mbarrier.wait(q_full.index(I_GROUP), turn & 1)
        b_q = q_smem.index(I_GROUP).reshape([ROWS, BLOCK_D])
        if META.q_in_registers:
            b_q = b_q.load(gl.DotOperandLayout(0, scores, 2))
            mbarrier.arrive(q_empty.index(I_GROUP), count=1)

        # The first tile, whose scores have no other product to hide under.
        b_zeros = gl.zeros([ROWS, TILE_KV], gl.float32, scores)
        token = multiply_scores(b_q, k_smem, k_full, count, b_zeros, META)
        b_scores = warpgroup_mma_wait(0, [token])
        mbarrier.arrive(k_empty.index(count % META.stages), count=1)
        o_key = (end - 1) * META.tile_kv + gl.arange(0, TILE_KV, gl.SliceLayout(0, scores))
        m_tile = visible(o_query[:, None], o_key[None, :], seqlen_q, seqlen_k, left, right, META)
        b_scores = gl.where(m_tile, b_scores, float("-inf"))
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
        b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
        b_new, b_max, b_sum, _rescale = online_softmax(b_scores, b_max, b_sum, scale, True)
        b_weights = gl.convert_layout(b_new.to(k_smem.dtype), gl.DotOperandLayout(0, output, 2))
        b_out = gl.zeros([ROWS, BLOCK_DV], gl.float32, output)
        count += 1

        # Backwards: behind the full tiles, those, before them; the last tile of all is done.
        for BACK in gl.static_range(3):
            if has_part(2 - BACK, META.left, META.right):
                low, high = part(begin, full_begin, full_end, end, 2 - BACK)
                for j in range(gl.minimum(high, end - 1) - 1, low - 1, -1):
                    b_weights, b_out, b_max, b_sum = step(
                        b_q, b_weights, b_out, b_max, b_sum, j, count, o_query, memory, barriers,
                        seqlen_q, seqlen_k, left, right, scale, META, BACK != 1,
                    )  # fmt: skip
                    count += 1

        if not META.q_in_registers:
            mbarrier.arrive(q_empty.index(I_GROUP), count=1)
        token = multiply_values(b_weights, b_out, v_smem, v_full, count - 1, META)
        m_empty = b_sum == 0.0
        b_lse = gl.where(m_empty, float("-inf"), (b_max + gl.log2(b_sum)) * LN2)
        b_inverse = 1.0 / gl.where(m_empty, 1.0, b_sum)
        p_lse = lse + (i_batch * heads + i_head).to(gl.int64) * seqlen_q + o_query
        gl.store(p_lse, b_lse, mask=o_query < seqlen_q)
        b_out = warpgroup_mma_wait(0, [token])
        mbarrier.arrive(v_empty.index((count - 1) % META.stages), count=1)
        b_out = b_out * gl.convert_layout(b_inverse, gl.SliceLayout(1, output))[:, None]
        store_tile(descriptors, o_smem.index(I_GROUP), b_out, i_batch, first, i_head, META)
        if META.dynamic:
            i_tile = hear(mailbox, turn)
        else:
            i_tile += gl.num_programs(0)
        turn += 1
    tma_store_wait(0)


@gluon.jit
def store_tile(descriptors, o_smem, b_out, i_batch, first, i_head, META: gl.constexpr):
    """Hands 64 rows to the copy engine, which leaves out those beyond the sequence; the next tile begins meanwhile."""
    BLOCK_DV: gl.constexpr = META.block_dv
    _, _, _, o_desc = descriptors
    tma_store_wait(0)
    o_smem.reshape([ROWS, BLOCK_DV]).store(b_out.to(o_smem.dtype))
    fence_async_shared()
    tma_store(o_desc, [i_batch, first, i_head, 0], o_smem)


@gluon.jit
def first_consumer(descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META: gl.constexpr):
    consumer(descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META, 0)


@gluon.jit
def second_consumer(descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META: gl.constexpr):
    consumer(descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META, 1)


@gluon.jit
def third_consumer(descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META: gl.constexpr):
    consumer(descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META, 2)


@gluon.jit
def new_barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """One mbarrier a slot."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def specialize(
    descriptors, memory, barriers, mailbox, lse, counter, sizes, window, scale, META: gl.constexpr
):  # fmt: skip
    """The roles of the warps, and their registers."""
    if META.consumers == 2:
        gl.warp_specialize([
            (first_consumer, (descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META)),
            (second_consumer, (descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META)),
            (loader, (descriptors, memory, barriers, mailbox, counter, sizes, window, META)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_consumer, (descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META)),
            (second_consumer, (descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META)),
            (third_consumer, (descriptors, memory, barriers, mailbox, lse, sizes, window, scale, META)),
            (loader, (descriptors, memory, barriers, mailbox, counter, sizes, window, META)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads", "section", "total", "left", "right"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, counter,
    seqlen_q, seqlen_k, heads, section, total, left, right, scale, META: gl.constexpr,
):  # fmt: skip
    """Persistent programs. Descriptors cover (batch, seqlen, heads, headdim); lse is (batch, heads, seqlen_q)."""
    CONSUMERS: gl.constexpr = META.consumers
    STAGES: gl.constexpr = META.stages
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_D: gl.constexpr = META.block_d
    BLOCK_DV: gl.constexpr = META.block_dv
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_KV, 1, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE_KV, 1, BLOCK_DV], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_DV], o_desc.layout)
    q_full = new_barriers(CONSUMERS, 1)
    q_empty = new_barriers(CONSUMERS, 1)
    k_full = new_barriers(STAGES, 1)
    k_empty = new_barriers(STAGES, CONSUMERS)
    v_full = new_barriers(STAGES, 1)
    v_empty = new_barriers(STAGES, CONSUMERS)
    value = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = new_barriers(1, 1).index(0)
    heard = new_barriers(1, CONSUMERS).index(0)
    specialize(
        (q_desc, k_desc, v_desc, o_desc),
        (q_smem, k_smem, v_smem, o_smem),
        (q_full, q_empty, k_full, k_empty, v_full, v_empty),
        (value, told, heard),
        lse,
        counter,
        (seqlen_q, seqlen_k, heads, section, total),
        (left, right),
        scale,
        META,
    )
