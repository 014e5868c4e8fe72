"""Dropout of accumulators: which entries survive (see `flashtile.dropout`), as words that lie as `bits` has them.

Four keys share one counter, but their entries lie with two or four threads. So each thread draws what it will hold for
some of its rows, and packs a bit an entry; the threads then exchange words, two shuffles for a whole tile.
"""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.bits import chosen, parted
from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels.rules import drawn
from flashtile.lower.rules import whole


@triton.constexpr_function
def _by_queries(columns):
    """(64 queries, halves of eight keys, eights of keys): a thread draws for one of its two rows, 8 apart."""
    eights = [[0, 0, 1 << i] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[8, 0, 0], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(eights, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, 2, columns // 8])


@triton.constexpr_function
def _by_keys(columns):
    """(fours of 64 keys, pairs of eight queries, query of a pair, eights of queries): of the four threads that hold the
    four keys of a counter, each draws for one of two rows, 8 apart, and one query of each pair."""
    eights = [[0, 0, 0, 1 << i] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    return gl.DistributedLinearLayout(eights, lanes, [[4, 0, 0, 0], [8, 0, 0, 0]], [], [16, 4, 2, columns // 8])


@triton.constexpr_function
def _parts(*lanes):
    """(64 rows, words, parts of a word): a thread holds two rows, 8 or 1 apart, or two parts of a word."""
    registers = [base for base in ([8, 0, 0], [0, 0, 1], [2, 0, 0]) if base not in lanes][:2]
    lanes = [[0, 1, 0], [0, 2, 0], *lanes, [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, 4, 2])


_HALFWAY = gl.constexpr(_parts([1, 0, 0], [0, 0, 1]))
_PARTS = gl.constexpr(_parts([1, 0, 0], [2, 0, 0]))
"""Where parts of words lie after one exchange between threads, and after two."""


@gluon.jit
def _bit(b_number, threshold, o_bit):
    """Bit `o_bit`, where the number is one that survives. threshold: from 0 to 2^32, in 64 bits."""
    # Two comparisons in one: the largest number that is dropped fits 32 bits, and where there is none, see `_words`.
    m_kept = b_number > gl.maximum(threshold - 1, 0).to(gl.uint32)
    return gl.where(m_kept, 1 << o_bit, 0)


@gluon.jit
def _words(b_words, threshold):
    """The words, all bits set where nothing is dropped."""
    return b_words | gl.where(threshold == 0, -1, 0)


@gluon.jit
def kept_by_queries(rules, place, first_query, first_key, COLUMNS: gl.constexpr):
    """The words of 64 queries and some keys."""
    drawing: gl.constexpr = _by_queries(COLUMNS)
    words: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, parted(COLUMNS)))
    o_rows = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, drawing))).expand_dims(1).expand_dims(2)
    o_half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, drawing))).expand_dims(0).expand_dims(2)
    o_eight = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(1, drawing))).expand_dims(0).expand_dims(1)
    r_0, r_1, r_2, r_3 = drawn(rules, place, first_query + o_rows, first_key // 4 + 2 * o_eight + o_half)
    threshold = whole(rules.dropout.threshold).to(gl.int64)
    b_low = gl.sum(_bit(r_0, threshold, 2 * o_eight) | _bit(r_1, threshold, 2 * o_eight + 1), 2)
    b_high = gl.sum(_bit(r_2, threshold, 2 * o_eight) | _bit(r_3, threshold, 2 * o_eight + 1), 2)
    b_words = gl.join(b_low, b_high).reshape([ROWS, 4])
    return _words(gl.convert_layout(b_words, words), threshold)


@gluon.jit
def kept_by_keys(rules, place, first_query, first_key, COLUMNS: gl.constexpr):
    """The words of 64 keys and some queries."""
    drawing: gl.constexpr = _by_keys(COLUMNS)
    words: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, parted(COLUMNS)))
    o_fours = gl.arange(0, ROWS // 4, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, drawing))))
    o_pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, drawing))))
    o_of_pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, drawing))))
    o_eight = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, drawing))))
    o_fours = o_fours.expand_dims(1).expand_dims(2).expand_dims(3)
    o_pair = o_pair.expand_dims(0).expand_dims(2).expand_dims(3)
    o_of_pair = o_of_pair.expand_dims(0).expand_dims(1).expand_dims(3)
    o_eight = o_eight.expand_dims(0).expand_dims(1).expand_dims(2)
    o_query = first_query + 8 * o_eight + 2 * o_pair + o_of_pair
    r_0, r_1, r_2, r_3 = drawn(rules, place, o_query, first_key // 4 + o_fours)
    threshold = whole(rules.dropout.threshold).to(gl.int64)
    o_bit = 2 * o_eight + o_of_pair
    b_even = gl.join(gl.sum(_bit(r_0, threshold, o_bit), 3), gl.sum(_bit(r_2, threshold, o_bit), 3))
    b_odd = gl.join(gl.sum(_bit(r_1, threshold, o_bit), 3), gl.sum(_bit(r_3, threshold, o_bit), 3))
    b_parts = gl.join(b_even, b_odd).permute((0, 3, 4, 1, 2)).reshape([ROWS, 4, 2])
    # One after the other, these are shuffles; at once, Triton would go through shared memory.
    b_parts = gl.convert_layout(gl.convert_layout(b_parts, _HALFWAY), _PARTS)
    b_words = gl.sum(b_parts, 2)
    return _words(gl.convert_layout(b_words, words, assert_trivial=True), threshold)


@gluon.jit
def kept_at(rules, place, first_query, first_key, COLUMNS: gl.constexpr, KEYS: gl.constexpr):
    """The words of a tile, 64 rows from the first; None: nothing is dropped. KEYS: rows are keys, columns queries."""
    b_kept = None
    if rules.dropout is not None:
        if KEYS:
            b_kept = kept_by_keys(rules, place, first_query, first_key, COLUMNS)
        else:
            b_kept = kept_by_queries(rules, place, first_query, first_key, COLUMNS)
    return b_kept


@gluon.jit
def only_kept(b_values, b_kept):
    """The values of an accumulator, 0 where they are dropped."""
    if b_kept is not None:
        b_values = gl.where(chosen(b_kept, b_values), b_values, 0.0)
    return b_values


@gluon.jit
def dropped_grad(b_grad_weights, b_kept, rules):
    """The gradient at the weights, from that at what is left of them."""
    if b_kept is not None:
        b_grad_weights = only_kept(b_grad_weights * rules.dropout.factor, b_kept)
    return b_grad_weights
