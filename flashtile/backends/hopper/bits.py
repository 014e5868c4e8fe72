"""The mask's bits of a tile, as they lie in the registers of a warpgroup: those of lists are loaded (see
`flashtile.kernels.bits`), those of lengths and of a window worked out."""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels.places import diagonal_of, key_range, number_of, query_range, row_of


@triton.constexpr_function
def parted(columns):
    """The layout of an accumulator (64, columns) that is seen as (64, columns / 8, 4, 2)."""
    eights = [[0, 1 << i, 0, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 0, 1], [8, 0, 0, 0], *eights], lanes, warps, [], [64, columns // 8, 4, 2])


@triton.constexpr_function
def words_of(columns):
    """The layout of a tile's words, (64, 4)."""
    return gl.SliceLayout(1, gl.SliceLayout(3, parted(columns)))


@gluon.jit
def load_bits(visits, place, n, m_edge, TILE: gl.constexpr, COLUMNS: gl.constexpr, I_GROUP: gl.constexpr):
    """(64, 4): two words a thread, of 64 of TILE rows, for the n-th place in the tile's list; only at an edge."""
    words: gl.constexpr = words_of(COLUMNS)
    o_rows = I_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, words))
    o_words = o_rows[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, words))[None, :]
    slot = (row_of(visits, place.batch, place.head) + place.tile) * number_of(visits.places) + n
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
def only_chosen(b_words, b_scores):
    """Scores, -inf where their bit is not set."""
    return gl.where(chosen(b_words, b_scores), b_scores, float("-inf"))


@gluon.jit
def cut(b_scores, b_words, m_edge):
    """Scores, at an edge -inf where bits hide them."""
    if m_edge:
        b_scores = only_chosen(b_words, b_scores)
    return b_scores


@gluon.jit
def below(o_limit, o_lane, COLUMNS: gl.constexpr):
    """Words whose bits are set for columns before a row's limit; `o_lane`: the first of the columns of each."""
    # Of 8 columns a thread holds 2. Two shifts, for one by 32 has no result.
    o_place = gl.maximum(gl.minimum(o_limit - o_lane, COLUMNS - 6), 0)
    return ((1 << (2 * (o_place // 8))) << gl.minimum(o_place % 8, 2)) - 1


@gluon.jit
def window_words(first_row, first_column, place, window, COLUMNS: gl.constexpr, META: gl.constexpr, KEYS: gl.constexpr):
    """(64, 4): what lengths and the window leave of a tile, whose rows are queries or KEYS."""
    words: gl.constexpr = words_of(COLUMNS)
    o_row = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, words)))[:, None]
    o_lane = (2 * gl.arange(0, 4, gl.SliceLayout(0, words)))[None, :]
    diagonal = diagonal_of(place, META.window_top_left)
    if KEYS:
        begin, end = query_range(window, diagonal, o_row, o_row, place.seqlen_q)
        end = gl.where(o_row < place.seqlen_k, end, 0)
    else:
        begin, end = key_range(window, diagonal, o_row, o_row, place.seqlen_k)
        end = gl.where(o_row < place.seqlen_q, end, 0)
    b_words = below(end - first_column, o_lane, COLUMNS)
    BEGINS: gl.constexpr = META.right if KEYS else META.left or META.aligned > 1
    if BEGINS:
        b_words = b_words & ~below(begin - first_column, o_lane, COLUMNS)
    return b_words


@gluon.jit
def cut_window(
    b_scores, m_edge, first_row, first_column, place, window, META: gl.constexpr, KEYS: gl.constexpr
):  # fmt: skip
    """Scores, at an edge -inf where lengths and the window hide them. The bits of a row are a run, found for the row:
    to compare element by element takes up to five times the instructions."""
    if m_edge:
        b_words = window_words(first_row, first_column, place, window, b_scores.shape[1], META, KEYS)
        b_scores = only_chosen(b_words, b_scores)
    return b_scores
