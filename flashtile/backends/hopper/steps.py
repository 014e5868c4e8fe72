"""A query tile in the backward kernel: a step of a warpgroup that has 64 keys of its own, or of two that share 64."""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashtile.backends.hopper.adding import await_other, half_of_grad_q, hand_over_grad_q, own_grad, tell_other
from flashtile.backends.hopper.compat import gl, mbarrier
from flashtile.backends.hopper.dropped import dropped_grad, kept_at, only_kept
from flashtile.backends.hopper.memory import FREED, clear_half, free_slot, slot_of, turn_of
from flashtile.backends.hopper.ruling import ruled_tile
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.strips import await_columns, multiply_columns, multiply_rows, strip_of, strips_of
from flashtile.backends.hopper.sums import PIECE, flat_piece, whole_piece
from flashtile.kernels.rules import grad_dots


@gluon.jit
def scores_of(
    b_scores, i_row, m_edge, b_words, place, o_key, first_key, rules,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """What `ruled_tile` says, and the queries' numbers."""
    TILE_Q: gl.constexpr = META.tile_q
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    o_query = (i_row * TILE_Q + gl.arange(0, TILE_Q, gl.SliceLayout(0, scores)))[None, :]
    MASKED: gl.constexpr = "always" if META.masked == "always" else "edges"
    b_scores, m_valid, b_tanh, b_plain = ruled_tile(
        b_scores, m_edge, b_words, first_key, i_row * TILE_Q, o_query, o_key[:, None], place, rules,
        META, SCORE, MASK, MASKED, True,
    )  # fmt: skip
    return b_scores, m_valid, b_tanh, b_plain, o_query


@gluon.jit
def rows_of_step(count, memory, META: gl.constexpr):
    """(strips of queries, gradients of their outputs) of a step's slot."""
    slot = slot_of(count, META.stages)
    return strips_of(memory[2], slot, META.strips), strip_of(memory[3], slot)


@gluon.jit
def wait_for_rows(i_row, count, place, memory, barriers, I_GROUP: gl.constexpr, META: gl.constexpr):
    """(strips of queries, gradients of their outputs) of a step's slot, once they are there."""
    _kv_full, full, _handing = barriers
    queries, b_grad_out = rows_of_step(count, memory, META)
    mbarrier.wait(full.index(slot_of(count, META.stages)), turn_of(count, META.stages))
    if META.packed:
        left = place.seqlen_q - i_row * META.tile_q
        if left < META.tile_q:
            clear_half(queries, b_grad_out, left, I_GROUP, META.strips)
    return queries, b_grad_out


@gluon.jit
def start_scores(queries, memory, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Starts K Q^T of a warpgroup's own keys."""
    TILE_Q: gl.constexpr = META.tile_q
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    b_k = strip_of(memory[0], 0).slice(I_GROUP * ROWS, ROWS, dim=0)
    return multiply_rows((b_k,), queries, scores, 1)


@gluon.jit
def first_scores(some, i_row, count, place, memory, barriers, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Those of the first step of a walk, which no step before it has multiplied; zeros for a walk without `some`."""
    TILE_Q: gl.constexpr = META.tile_q
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    b_scores = gl.zeros([ROWS, TILE_Q], gl.float32, scores)
    if some:
        queries, _b_grad_out = wait_for_rows(i_row, count, place, memory, barriers, I_GROUP, META)
        b_scores = warpgroup_mma_wait(0, [start_scores(queries, memory, I_GROUP, META)])
    return b_scores


@gluon.jit
def step(
    b_carried, i_row, i_next, more, m_edge, b_words, count, place, o_key, memory, barriers, rules,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One query tile of one head: (dK, dV) and, where products go `ahead`, the scores of the next step."""
    TILE_Q: gl.constexpr = META.tile_q
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.strip, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    k_smem, v_smem, _q_smem, _do_smem, lse_smem, delta_smem, ds_smem, sums_smem = memory
    b_grad_k, b_grad_v = b_carried[0], b_carried[1]
    slot = slot_of(count, META.stages)
    if META.ahead:
        queries, b_grad_out = rows_of_step(count, memory, META)
    else:
        queries, b_grad_out = wait_for_rows(i_row, count, place, memory, barriers, I_GROUP, META)
        score_token = start_scores(queries, memory, I_GROUP, META)
    b_v = strip_of(v_smem, 0).slice(I_GROUP * ROWS, ROWS, dim=0)
    b_zeros = gl.zeros([ROWS, TILE_Q], gl.float32, scores)
    weight_token = warpgroup_mma(b_v, b_grad_out.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
    first_key = place.tile * TILE_KV + I_GROUP * ROWS
    b_kept = kept_at(rules, place, i_row * TILE_Q, first_key, TILE_Q, True)
    if META.ahead:
        b_scores = b_carried[2]
    else:
        b_scores = warpgroup_mma_wait(1, [score_token])
    b_scores, m_valid, b_tanh, b_plain, o_query = scores_of(
        b_scores, i_row, m_edge, b_words, place, o_key, first_key, rules, META, SCORE, MASK
    )
    b_lse = lse_smem.index(slot).load(gl.SliceLayout(0, scores))
    b_weights = gl.exp2(b_scores * rules.factor - b_lse[None, :])
    b_left = gl.convert_layout(only_kept(b_weights, b_kept).to(k_smem.dtype), gl.DotOperandLayout(0, values, 2))
    # Before the wait for dP, or ptxas moves that wait up, in front of the exponentials.
    value_token = warpgroup_mma(b_left, b_grad_out, b_grad_v, is_async=True)
    b_grad_weights = dropped_grad(warpgroup_mma_wait(1, [weight_token]), b_kept, rules)
    b_delta = delta_smem.index(slot).load(gl.SliceLayout(0, scores))
    # Elsewhere a weight of 0 is enough: keys and values hold numbers alone by now.
    GUARDED: gl.constexpr = META.guarded and DERIVATIVE is not None
    b_grad, _outer = grad_dots(
        b_weights, b_grad_weights, b_delta[None, :], m_valid, b_tanh, b_plain, o_query, o_key[:, None], place, rules,
        META, SCORE, DERIVATIVE, GUARDED, META.collects,
    )  # fmt: skip
    b_half = b_grad.to(k_smem.dtype)
    b_left = gl.convert_layout(b_half, gl.DotOperandLayout(0, keys, 2))
    if META.adds:
        await_other(count, I_GROUP)
        own_grad(ds_smem, count, I_GROUP).store(b_half)
        query_token = half_of_grad_q(ds_smem, k_smem, count, I_GROUP, META)
    key_token = warpgroup_mma(b_left, queries[0], b_grad_k, is_async=True)
    if META.adds:
        b_grad_v = warpgroup_mma_wait(2, [value_token])
        # dQ leaves while dK is multiplied.
        hand_over_grad_q(warpgroup_mma_wait(1, [query_token]), sums_smem, I_GROUP)
        tell_other(count, I_GROUP)
    else:
        b_grad_v = warpgroup_mma_wait(1, [value_token])
    return end_step(key_token, b_grad_v, i_next, more, count, place, memory, barriers, I_GROUP, META)


@gluon.jit
def end_step(
    key_token, b_grad_v, i_next, more, count, place, memory, barriers, I_GROUP: gl.constexpr, META: gl.constexpr
):  # fmt: skip
    """What `step` gives, once dK is multiplied; `more`: this is not the last step of its walk."""
    if META.ahead:
        if more:
            wait_for_rows(i_next, count + 1, place, memory, barriers, I_GROUP, META)
        # Behind the last step, its own again, for nobody. The registers of dQ and of the weights are free by now: with
        # them, ptxas would let every product wait.
        queries, _b_grad_out = rows_of_step(gl.where(more, count + 1, count), memory, META)
        score_token = start_scores(queries, memory, I_GROUP, META)
        b_grad_k = warpgroup_mma_wait(1, [key_token])
        free_slot(FREED, slot_of(count, META.stages), META.stages, META)
        return (b_grad_k, b_grad_v, warpgroup_mma_wait(0, [score_token]))
    else:
        b_grad_k = warpgroup_mma_wait(0, [key_token])
        free_slot(FREED, slot_of(count, META.stages), META.stages, META)
        return (b_grad_k, b_grad_v)


@gluon.jit
def value_step(
    b_grads, i_row, m_edge, b_words, count, place, o_key, memory, barriers, rules,
    META: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Of two warpgroups that share 64 keys, the one that holds dV: (dV,).

    It hands the other the weights, multiplied with the derivative of the scores, which is all that dS needs of them.
    """
    TILE_Q: gl.constexpr = META.tile_q
    BLOCK_DV: gl.constexpr = META.block_dv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    k_smem, _v_smem, _q_smem, _do_smem, lse_smem, _delta_smem, handed, _sums_smem = memory
    _kv_full, _full, handing = barriers
    queries, b_grad_out = wait_for_rows(i_row, count, place, memory, barriers, 0, META)
    token = multiply_rows(strips_of(k_smem, 0, META.strips), queries, scores, META.strips)
    b_kept = kept_at(rules, place, i_row * TILE_Q, place.tile * ROWS, TILE_Q, True)
    b_lse = lse_smem.index(slot_of(count, META.stages)).load(gl.SliceLayout(0, scores))
    b_scores = warpgroup_mma_wait(0, [token])
    b_scores, m_valid, b_tanh, b_plain, o_query = scores_of(
        b_scores, i_row, m_edge, b_words, place, o_key, place.tile * ROWS, rules, META, SCORE, MASK
    )
    b_weights = gl.exp2(b_scores * rules.factor - b_lse[None, :])
    b_left = gl.convert_layout(only_kept(b_weights, b_kept).to(k_smem.dtype), gl.DotOperandLayout(0, values, 2))
    token = warpgroup_mma(b_left, b_grad_out, b_grads[0], is_async=True)
    if META.modified:
        # The derivative is linear in what it is given, here the weights themselves.
        GUARDED: gl.constexpr = META.guarded and DERIVATIVE is not None
        b_weights, _outer = grad_dots(
            b_weights, 1.0, 0.0, m_valid, b_tanh, b_plain, o_query, o_key[:, None], place, rules,
            META, SCORE, DERIVATIVE, GUARDED, False,
        )  # fmt: skip
    half = slot_of(count, 2)
    mbarrier.wait(handing.index(half), turn_of(count, 2) ^ 1)
    handed.index(half).store(flat_piece(b_weights))
    mbarrier.arrive(handing.index(2 + half), count=1)
    b_grad_v = warpgroup_mma_wait(0, [token])
    free_slot(FREED, slot_of(count, META.stages), META.stages, META)
    return (b_grad_v,)


@gluon.jit
def key_step(
    b_grads, i_row, count, place, memory, barriers, rules, META: gl.constexpr, DERIVATIVE: gl.constexpr
):  # fmt: skip
    """Of two warpgroups that share 64 keys, the one that holds dK: its strips."""
    TILE_Q: gl.constexpr = META.tile_q
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.strip, 16])
    k_smem, v_smem, _q_smem, _do_smem, _lse_smem, delta_smem, handed, _sums_smem = memory
    _kv_full, _full, handing = barriers
    b_zeros = gl.zeros([ROWS, TILE_Q], gl.float32, scores)
    queries, b_grad_out = wait_for_rows(i_row, count, place, memory, barriers, 1, META)
    b_v = strip_of(v_smem, 0)
    token = warpgroup_mma(b_v, b_grad_out.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
    b_kept = kept_at(rules, place, i_row * TILE_Q, place.tile * ROWS, TILE_Q, True)
    b_delta = delta_smem.index(slot_of(count, META.stages)).load(gl.SliceLayout(0, scores))
    half = slot_of(count, 2)
    mbarrier.wait(handing.index(2 + half), turn_of(count, 2))
    b_weights = whole_piece(handed.index(half).load(PIECE), scores)
    mbarrier.arrive(handing.index(half), count=1)
    b_grad_weights = dropped_grad(warpgroup_mma_wait(0, [token]), b_kept, rules)
    b_grad = b_weights * (b_grad_weights - b_delta[None, :])
    if META.guarded and DERIVATIVE is not None:
        # See `rules.grad_dots`.
        b_grad = gl.where(b_weights == 0.0, 0.0, b_grad)
    b_left = gl.convert_layout(b_grad.to(k_smem.dtype), gl.DotOperandLayout(0, keys, 2))
    b_grads = await_columns(multiply_columns(b_left, queries, b_grads, META.strips), META.strips)
    free_slot(FREED, slot_of(count, META.stages), META.stages, META)
    return b_grads
