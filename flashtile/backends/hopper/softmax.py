"""The online softmax of 64 rows; maxima in base 2."""

from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl

ROWS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(-3.4028234663852886e38)


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
def online_softmax(b_scores, b_top, b_max, b_sum, factor, MASKED: gl.constexpr, LIFT: gl.constexpr):
    """(weights, raised maximum, new sum, what older sums are multiplied with); maxima in base 2, -inf: nothing seen.

    b_top: the rows' maxima of `b_scores`. LIFT: weights and sums are 2^LIFT times what they stand for, where 8 bits
    hold few small numbers.
    """
    b_raised = gl.maximum(b_max, b_top * factor)
    b_base = b_raised
    if MASKED:
        # A row that has seen nothing: -inf less -inf would be NaN.
        b_base = gl.maximum(b_raised, LEAST)
    b_lifted = b_base - LIFT if LIFT != 0 else b_base
    b_weights = gl.exp2(b_scores * factor - b_lifted[:, None])
    b_rescale = gl.exp2(b_max - b_base)
    return b_weights, b_raised, b_sum * b_rescale + gl.sum(b_weights, 1), b_rescale
