"""What becomes of a tile's scores in the registers of a warpgroup: modifiers, the mask, whichever way round it lies."""

from triton.experimental import gluon

from flashtile.backends.hopper.bits import cut, cut_window
from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.distances import distances_of
from flashtile.kernels.rules import ruled


@gluon.jit
def ruled_tile(
    b_scores, m_edge, b_words, first_row, first_column, o_query, o_key, place, rules,
    META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """What `ruled` says of a tile whose rows are queries or KEYS; windows and lists with bits cut it by those."""
    WINDOW: gl.constexpr = META.masked == "edges"
    MASKED_AT: gl.constexpr = MASKED if b_words is None and not WINDOW else "never"
    LAYOUT: gl.constexpr = b_scores.type.layout
    distances = None
    if META.modified:
        distances = distances_of(first_row, first_column, place, LAYOUT, META, KEYS)
    b_scores, m_valid, b_tanh, b_plain = ruled(
        b_scores, m_edge, o_query, o_key, place, rules, META, SCORE, MASK, MASKED_AT, distances
    )
    if b_words is not None:
        b_scores = cut(b_scores, b_words, m_edge)
    if WINDOW and MASKED != "never":
        b_scores = cut_window(b_scores, m_edge, first_row, first_column, place, rules.window, META, KEYS)
    return b_scores, m_valid, b_tanh, b_plain
