"""The mask's bits of a tile, as they lie in the registers of a warpgroup (see `flashtile.kernels.bits`)."""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels.places import number_of, row_of


@triton.constexpr_function
def parted(columns):
    """The layout of an accumulator (64, columns) that is seen as (64, columns / 8, 4, 2)."""
    eights = [[0, 1 << i, 0, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 0, 1], [8, 0, 0, 0], *eights], lanes, warps, [], [64, columns // 8, 4, 2])


@gluon.jit
def load_bits(visits, place, n, m_edge, TILE: gl.constexpr, COLUMNS: gl.constexpr, I_GROUP: gl.constexpr):
    """(64, 4): two words a thread, of 64 of TILE rows, for the n-th place in the tile's list; only at an edge."""
    whole: gl.constexpr = parted(COLUMNS)
    words: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, whole))
    o_rows = I_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, words))
    o_words = o_rows[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, words))[None, :]
    slot = (row_of(visits, place.batch, place.head) + place.tile) * number_of(visits.length) + n
    return gl.load(visits.bits + slot * (TILE * 4) + o_words, mask=(o_words >= 0) & m_edge, other=0)


@gluon.jit
def words_at(visits, place, n, m_edge, META: gl.constexpr, KEYS: gl.constexpr, I_GROUP: gl.constexpr):
    """Those of a step, asked for before they are needed; None where the mask is to be asked. KEYS: rows are keys."""
    b_words = None
    if META.masked == "lists":
        if visits.bits is not None:
            TILE: gl.constexpr = META.tile_kv if KEYS else META.tile_q
            COLUMNS: gl.constexpr = META.tile_q if KEYS else META.tile_kv
            b_words = load_bits(visits, place, n, m_edge, TILE, COLUMNS, I_GROUP)
    return b_words


@gluon.jit
def chosen(b_words, b_values):
    """Which numbers of an accumulator have their bit set, in its layout."""
    COLUMNS: gl.constexpr = b_values.shape[1]
    LAYOUT: gl.constexpr = b_values.type.layout
    whole: gl.constexpr = parted(COLUMNS)
    eights: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, whole)))
    pair: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, whole)))
    o_eights = gl.arange(0, COLUMNS // 8, eights).expand_dims(0).expand_dims(2).expand_dims(3)
    o_pair = gl.arange(0, 2, pair).expand_dims(0).expand_dims(1).expand_dims(2)
    m_chosen = ((b_words.expand_dims(1).expand_dims(3) >> (2 * o_eights + o_pair)) & 1) != 0
    return gl.convert_layout(m_chosen.reshape([ROWS, COLUMNS]), LAYOUT, assert_trivial=True)


@gluon.jit
def cut(b_scores, b_words, m_edge):
    """Scores, at an edge -inf where bits hide them."""
    if m_edge:
        b_scores = gl.where(chosen(b_words, b_scores), b_scores, float("-inf"))
    return b_scores
