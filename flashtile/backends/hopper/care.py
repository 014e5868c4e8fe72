"""A query tile done again, where its output holds NaN that may come from a key that nobody sees.

A weight of 0 does not stop NaN in a product. Here values are loaded only where some row of the tile sees their key, by
the math warpgroup itself and without specialised units, since this is rare: what is NaN afterwards was seen.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.dropped import kept_at, only_kept
from flashtile.backends.hopper.eight import factor_of, first_key_of, numbered, query_unit, units_of
from flashtile.backends.hopper.registers import rows_here
from flashtile.backends.hopper.schedule import counts_of, tile_of, walk_of
from flashtile.backends.hopper.softmax import ROWS, before_any_key, for_rows, online_softmax
from flashtile.kernels.rules import ruled

KEYS = gl.constexpr(16)
TILE = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, TILE.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, TILE.value, 2))


@gluon.jit
def any_nan(b_tile):
    """Whether a tile holds NaN."""
    return gl.max(gl.max((b_tile != b_tile).to(gl.int32), 1), 0) > 0


@gluon.jit
def pointers_of(rows, i_batch, i_head, o_rows, o_columns):
    """Of some columns of some rows of one head; both broadcast to the tile."""
    base = rows.pointer + i_batch.to(gl.int64) * rows.batch + i_head.to(gl.int64) * rows.head
    return base + o_rows.to(gl.int64) * rows.row + o_columns


@triton.constexpr_function
def few(META):
    """Columns of queries, keys or values that have room in registers at a time, beside the output of a tile."""
    return 16 if META.block_dv > 128 else 32


@gluon.jit
def lanes(first_key, COUNT: gl.constexpr, layout: gl.constexpr, META: gl.constexpr):
    """0 to COUNT - 1. No key's number is negative, but a compiler does not know: otherwise it would find out where all
    columns lie before it begins, even for the first tile, and have no registers to keep that in."""
    if META.aligned > 1:
        # But for those in front of a sequence.
        first_key += META.aligned
    return (first_key >> 31) + gl.arange(0, COUNT, layout)


@triton.constexpr_function
def half(dtype):
    """The 16-bit type that holds all numbers of a type."""
    return dtype if dtype.primitive_bitwidth == 16 else gl.bfloat16


@gluon.jit
def load_queries(q, place, first, first_key, first_column, META: gl.constexpr):
    """A few columns of 64 queries as the left side of a product."""
    o_rows = first + lanes(first_key, ROWS, gl.SliceLayout(1, LEFT), META)
    o_columns = first_column + lanes(first_key, few(META), gl.SliceLayout(0, LEFT), META)
    p_q = pointers_of(q, place.batch, place.head, (place.first_q + o_rows)[:, None], o_columns[None, :])
    m_q = (o_rows < place.seqlen_q)[:, None] & (o_columns < META.headdim)[None, :]
    return gl.load(p_q, mask=m_q, other=0.0).to(half(q.pointer.dtype.element_ty))


@gluon.jit
def load_keys(k, place, first, first_column, META: gl.constexpr):
    """A few columns of some keys, transposed, as the right side of a product."""
    o_columns = first_column + lanes(first, few(META), gl.SliceLayout(1, RIGHT), META)
    o_keys = first + lanes(first, KEYS, gl.SliceLayout(0, RIGHT), META)
    i_head = place.head // META.group
    p_k = pointers_of(k, place.batch, i_head, (place.first_k + o_keys)[None, :], o_columns[:, None])
    m_k = (o_keys < place.seqlen_k)[None, :] & (o_columns < META.headdim)[:, None]
    return gl.load(p_k, mask=m_k, other=0.0).to(half(k.pointer.dtype.element_ty))


@gluon.jit
def multiply(q, k, place, first, first_key, META: gl.constexpr):
    """q k^T of 64 queries and some keys."""
    b_scores = gl.zeros([ROWS, KEYS], gl.float32, TILE)
    for first_column in range(0, META.block_d, few(META)):
        b_q = load_queries(q, place, first, first_key, first_column, META)
        b_scores = mma_v2(b_q, load_keys(k, place, first_key, first_column, META), b_scores)
    return b_scores


@gluon.jit
def load_values(v, place, first, m_tile, first_column, WIDTH: gl.constexpr, META: gl.constexpr):
    """WIDTH columns of the values of keys that some row of the tile sees, 0 for the others, as the right side of a
    product."""
    o_keys = first + lanes(first, KEYS, gl.SliceLayout(1, RIGHT), META)
    o_columns = first_column + lanes(first, WIDTH, gl.SliceLayout(0, RIGHT), META)
    i_head = place.head // META.group
    if META.eight and not META.packed:
        # Key 8 j + 2 t + e of 16 lies at place 4 t + 2 j + e of a row of its column (see `flashtile.scaled`).
        o_places = first + 4 * ((o_keys - first) // 2 % 4) + 2 * ((o_keys - first) // 8) + o_keys % 2
        p_v = pointers_of(v, place.batch, i_head, o_columns[None, :], o_places[:, None])
    else:
        p_v = pointers_of(v, place.batch, i_head, (place.first_k + o_keys)[:, None], o_columns[None, :])
    m_seen = gl.convert_layout(gl.max(m_tile.to(gl.int32), 0), gl.SliceLayout(1, RIGHT)) > 0
    b_v = gl.load(p_v, mask=m_seen[:, None] & (o_columns < META.headdim_v)[None, :], other=0.0)
    return b_v.to(half(v.pointer.dtype.element_ty))


@gluon.jit
def add_values(b_weights, b_out, v, place, first, m_tile, FIRST: gl.constexpr, META: gl.constexpr):
    """out += p v for the columns of values from FIRST on, a few at a time."""
    HALF: gl.constexpr = b_out.shape[1] // 2
    if HALF < few(META):
        b_out = mma_v2(b_weights, load_values(v, place, first, m_tile, FIRST, 2 * HALF, META), b_out)
    else:
        b_low, b_high = b_out.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
        b_low = gl.convert_layout(b_low, TILE, assert_trivial=True)
        b_high = gl.convert_layout(b_high, TILE, assert_trivial=True)
        b_low = add_values(b_weights, b_low, v, place, first, m_tile, FIRST, META)
        b_high = add_values(b_weights, b_high, v, place, first, m_tile, FIRST + HALF, META)
        b_both = gl.join(b_low, b_high).permute((0, 2, 1)).reshape([ROWS, 2 * HALF])
        b_out = gl.convert_layout(b_both, TILE, assert_trivial=True)
    return b_out


@gluon.jit
def careful_output(
    sources, scales, place, first, rules, visits, sinks, META: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr
):  # fmt: skip
    """The output of 64 rows; `sources`: queries, keys and values as `Rows`, those of 8 bits with `scales`."""
    BLOCK_DV: gl.constexpr = META.block_dv
    q, k, v = sources
    if META.aligned > 1:
        # Kernels that keep a scale for each row have no registers for strides that nearly no tile asks for.
        q, k, v = rows_here(q), rows_here(k), rows_here(v)
    o_query = first + gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    b_max, b_sum = before_any_key(sinks, place.head, gl.SliceLayout(1, TILE), 0)
    queries = query_unit(scales, place, first, o_query, META)
    b_out = gl.zeros([ROWS, BLOCK_DV], gl.float32, TILE)
    walk = walk_of(place, counts_of(place, visits, META), rules.window, visits, META)
    for n in range(0, walk[4]):
        unit, values = units_of(scales, queries, place, tile_of(walk, n, META), META)
        first_key = first_key_of(tile_of(walk, n, META), place, META)
        for i_key in range(first_key, first_key + META.tile_kv, KEYS):
            o_key = numbered(i_key + gl.arange(0, KEYS, gl.SliceLayout(0, TILE)), place, META)
            b_scores = multiply(q, k, place, first, i_key, META)
            if META.eight and META.modified:
                b_scores = b_scores * for_rows(unit)
            b_scores, m_tile, _tanh, _plain = ruled(
                b_scores, True, o_query[:, None], o_key[None, :], place, rules, META, SCORE, MASK, "always"
            )
            factor = factor_of(rules, unit, META)
            b_weights, b_max, b_sum, b_rescale = online_softmax(b_scores, b_max, b_sum, factor, True, 0)
            b_kept = kept_at(rules, place, first, i_key, KEYS, False)
            b_weights = only_kept(b_weights, b_kept)
            b_left = gl.convert_layout((b_weights * values).to(half(v.pointer.dtype.element_ty)), LEFT)
            b_out = add_values(b_left, b_out * b_rescale[:, None], v, place, i_key, m_tile, 0, META)
    b_inverse = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
    if rules.dropout is not None:
        b_inverse = b_inverse * rules.dropout.factor
    return b_out * b_inverse[:, None]
