"""The online softmax of 64 rows; maxima in base 2."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashtile.backends.hopper.compat import gl

ROWS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(-3.4028234663852886e38)
SPARE = gl.constexpr(8.0)
"""How far, in base 2, a maximum may be behind: weights are 256 at most, which no dtype of 16 bits minds."""

LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [ROWS.value, 4]
    )
)
"""Of a number for each row and each of the four threads that share it, where the scores lie as products leave them."""


@gluon.jit
def before_any_key(sinks, i_head, layout: gl.constexpr, LIFT: gl.constexpr):
    """(maximum, sum) of the softmax: nothing seen, or with sinks one key of that score and value 0."""
    b_max = gl.full([ROWS], float("-inf"), gl.float32, layout)
    b_sum = gl.zeros([ROWS], gl.float32, layout)
    if sinks is not None:
        sink = gl.load(sinks + i_head).to(gl.float32) * LOG2E
        b_max = gl.zeros([ROWS], gl.float32, layout) + sink
        ONE: gl.constexpr = 2.0**LIFT
        b_sum += gl.where(sink == float("-inf"), 0.0, ONE)
    return b_max, b_sum


@gluon.jit
def for_rows(factor):
    """What a tile is multiplied by, where that is a number or one for each row."""
    if len(factor.shape) == 1:
        factor = factor[:, None]
    return factor


@gluon.jit
def online_softmax(b_scores, b_max, b_sum, factor, MASKED: gl.constexpr, LIFT: gl.constexpr):
    """(weights, raised maximum, new sum, what older sums are multiplied with); maxima in base 2, -inf: nothing seen.

    LIFT: weights and sums are 2^LIFT times what they stand for, where 8 bits
    hold few small numbers.
    """
    b_raised = gl.maximum(b_max, gl.max(b_scores, 1) * factor)
    b_base = b_raised
    if MASKED:
        # A row that has seen nothing: -inf less -inf would be NaN.
        b_base = gl.maximum(b_raised, LEAST)
    b_lifted = b_base - LIFT if LIFT != 0 else b_base
    b_weights = gl.exp2(b_scores * for_rows(factor) - b_lifted[:, None])
    b_rescale = gl.exp2(b_max - b_base)
    return b_weights, b_raised, b_sum * b_rescale + gl.sum(b_weights, 1), b_rescale


@gluon.jit
def row_halves(b_rows):
    """A thread has elements of two rows, eight apart: the first ones of all threads, (4, 8, ...), and the others."""
    if len(b_rows.shape) == 2:
        b_first, b_second = b_rows.reshape([4, 2, 8, b_rows.shape[1]]).permute((0, 2, 3, 1)).split()
    else:
        b_first, b_second = b_rows.reshape([4, 2, 8]).permute((0, 2, 1)).split()
    return b_first, b_second


@gluon.jit
def whole_rows(b_first, b_second, layout: gl.constexpr):
    """What `row_halves` took apart."""
    b_both = gl.join(b_first, b_second)
    if len(b_first.shape) == 3:
        b_rows = b_both.permute((0, 3, 1, 2)).reshape([ROWS, b_first.shape[2]])
    else:
        b_rows = b_both.permute((0, 2, 1)).reshape([ROWS])
    return gl.convert_layout(b_rows, layout, assert_trivial=True)


@gluon.jit
def sums_of_lanes(b_sum):
    """Sums of rows in four parts, one for each thread of a row."""
    b_quarter = gl.convert_layout(b_sum, gl.SliceLayout(1, LANES), assert_trivial=True) * 0.25
    return b_quarter[:, None] + gl.zeros([ROWS, 4], gl.float32, LANES)


@gluon.jit
def sums_of_rows(b_sums, b_max):
    """What `sums_of_lanes` took apart, laid out as maxima are."""
    ROW: gl.constexpr = b_max.type.layout
    return gl.convert_layout(gl.sum(b_sums, 1), ROW, assert_trivial=True)


@gluon.jit
def softmax_of_half(b_scores, b_max, b_sums, factor, MASKED: gl.constexpr):
    """`softmax_of_rows` of one of `row_halves`."""
    ROW: gl.constexpr = gl.SliceLayout(2, b_scores.type.layout)
    b_max = gl.convert_layout(b_max, ROW, assert_trivial=True)
    b_top = gl.max(b_scores, 2) * factor
    b_raised = gl.where(b_top > b_max + SPARE, b_top, b_max)
    b_base = b_raised
    if MASKED:
        # A row that has seen nothing: -inf less -inf would be NaN.
        b_base = gl.maximum(b_raised, LEAST)
    b_rescale = gl.exp2(b_max - b_base)
    b_weights = gl.exp2(b_scores * factor - gl.expand_dims(b_base, 2))
    b_new = gl.sum(gl.sum(b_weights.reshape([4, 8, b_scores.shape[2] // 8, 4, 2]), 4), 2)
    LANE: gl.constexpr = b_new.type.layout
    b_old = gl.convert_layout(b_sums, LANE, assert_trivial=True)
    b_kept = gl.convert_layout(gl.expand_dims(b_rescale, 2), LANE)
    return b_weights, b_raised, b_old * b_kept + b_new, b_rescale


@gluon.jit
def softmax_of_rows(b_scores, b_out, b_max, b_sums, factor, MASKED: gl.constexpr, WAITS: gl.constexpr):
    """(weights, maximum, sums of lanes, what older weights are multiplied with), as of `online_softmax`, for less work;
    and the output.

    The maxima of a thread's second row run under the exponentials of its first, and nothing is summed across threads.
    A maximum is raised where it has grown by more than `SPARE` alone: the softmax is the same with any number in its
    place, and factors of 1 need no product (FlashAttention-4). If WAITS, the output is under way: it is waited for
    between the rows, after which registers that its product read are free.
    """
    TILE: gl.constexpr = b_scores.type.layout
    ROW: gl.constexpr = b_max.type.layout
    b_scores1, b_scores2 = row_halves(b_scores)
    b_max1, b_max2 = row_halves(b_max)
    b_sums1, b_sums2 = row_halves(b_sums)
    b_weights1, b_max1, b_sums1, b_rescale1 = softmax_of_half(b_scores1, b_max1, b_sums1, factor, MASKED)
    if WAITS:
        b_out = warpgroup_mma_wait(0, [b_out])
    b_weights2, b_max2, b_sums2, b_rescale2 = softmax_of_half(b_scores2, b_max2, b_sums2, factor, MASKED)
    return (
        whole_rows(b_weights1, b_weights2, TILE), whole_rows(b_max1, b_max2, ROW),
        whole_rows(b_sums1, b_sums2, LANES), whole_rows(b_rescale1, b_rescale2, ROW), b_out,
    )  # fmt: skip


@triton.constexpr_function
def _multiplying(count):
    """(instructions, constraints): `count` numbers of two rows times factors of their rows, unless all those of a warp
    are 1. Neighbours are of one row, the next two of the other."""
    products = " ".join(f"mul.f32 ${n}, ${n}, ${2 * count + n};" for n in range(count))
    text = f"""{{ .reg .pred changes;
        setp.neu.f32 changes, ${2 * count}, 0f3F800000;
        setp.neu.or.f32 changes, ${2 * count + 2}, 0f3F800000, changes;
        vote.sync.any.pred changes, changes, -1;
        @!changes bra.uni KEPT${{:uid}};
        {products}
        KEPT${{:uid}}: }}"""
    constraints = ["=f"] * count + [str(n) for n in range(count)] + ["f"] * count
    return text, ",".join(constraints)


@gluon.jit
def rescaled(b_out, b_rescale):
    """Sums of values times factors of their rows."""
    COUNT: gl.constexpr = min(64, b_out.shape[1] // 2)
    TEXT: gl.constexpr = _multiplying(COUNT)[0]
    CONSTRAINTS: gl.constexpr = _multiplying(COUNT)[1]
    b_factors = gl.convert_layout(b_rescale, gl.SliceLayout(1, b_out.type.layout), assert_trivial=True)
    b_out, b_factors = gl.broadcast(b_out, b_factors[:, None])
    return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, [b_out, b_factors], dtype=gl.float32, is_pure=True, pack=COUNT)
