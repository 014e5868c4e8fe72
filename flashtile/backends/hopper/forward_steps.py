"""A key tile in the forward kernel: a step of a warpgroup that has 64 rows of queries.

The scores of one key tile are computed while the weights of the tile before are multiplied with their values, so that
the tensor cores work under the exponentials.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.dropped import kept_at, only_kept
from flashtile.backends.hopper.eight import factor_of, first_key_of, numbered
from flashtile.backends.hopper.memory import KEYS_FREED, VALUES_FREED, free_slot, pass_turn, take_turn
from flashtile.backends.hopper.products import multiply_scores, multiply_values, narrowed
from flashtile.backends.hopper.ruling import ruled_tile
from flashtile.backends.hopper.softmax import (
    ROWS,
    before_any_key,
    for_rows,
    online_softmax,
    rescaled,
    softmax_of_rows,
    sums_of_lanes,
)


@gluon.jit
def rule(
    b_scores, i_tile, m_edge, b_words, place, o_query, first, rules, unit,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What `ruled_tile` says. first: of `o_query`; unit: of 8-bit products, what nothing modifies keeps it."""
    TILE_KV: gl.constexpr = META.tile_kv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, META.depth])
    first_key = first_key_of(i_tile, place, META)
    o_columns = numbered(first_key + gl.arange(0, TILE_KV, gl.SliceLayout(0, scores)), place, META)[None, :]
    if META.eight and META.modified:
        b_scores = b_scores * for_rows(unit)
    return ruled_tile(
        b_scores, m_edge, b_words, first, first_key, o_query[:, None], o_columns, place, rules,
        META, SCORE, MASK, MASKED, False,
    )  # fmt: skip


@gluon.jit
def step(
    b_weights, b_out, softmax, i_tile, m_edge, b_words, unit, change, count, place, o_query, first, memory, barriers,
    rules, META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """A key tile: its scores and weights, while the weights of the tile before meet their values.

    softmax: (maxima, sums, what the output is still to be multiplied with); unit: of 8-bit products; change: the unit
    of the values before over that of this tile's.
    """
    queries, k_smem, v_smem, _ = memory
    _, _, k_full, v_full = barriers
    if META.turns:
        take_turn(I_GROUP, META.consumers)
    score_token = multiply_scores(queries, k_smem, k_full, count, META.strips, META)
    out_token = multiply_values(b_weights, outstanding(b_out, softmax, META), v_smem, v_full, count - 1, META)
    if META.turns:
        pass_turn(I_GROUP, META.consumers)
    b_kept = kept_at(rules, place, first, i_tile * META.tile_kv, META.tile_kv, False)
    b_scores = warpgroup_mma_wait(1, [score_token])
    if META.early:
        free_slot(KEYS_FREED, count, META.stages, META)
    MASKED: gl.constexpr = META.asked
    b_scores, _valid, _tanh, _plain = rule(
        b_scores, i_tile, m_edge, b_words, place, o_query, first, rules, unit, META, SCORE, MASK, MASKED
    )
    GUARDED: gl.constexpr = MASKED != "never" or META.modified
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
    queries, k_smem, _, _ = memory
    _, _, k_full, _ = barriers
    token = multiply_scores(queries, k_smem, k_full, count, META.strips, META)
    b_kept = kept_at(rules, place, first, i_tile * TILE_KV, TILE_KV, False)
    b_scores = warpgroup_mma_wait(0, [token])
    free_slot(KEYS_FREED if META.early else VALUES_FREED, count, META.stages, META)
    b_scores, _valid, _tanh, _plain = rule(
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
