"""How far queries lie from keys, for a tile of scores as it lies in the registers of a warpgroup."""

from triton.experimental import gluon

from flashtile.backends.hopper.bits import parted
from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels.places import diagonal_of


@gluon.jit
def query_less_key(first, layout: gl.constexpr, COLUMNS: gl.constexpr, KEYS: gl.constexpr):
    """(64, COLUMNS) float32: query less key, exact up to 2^24. first: row 0 less column 0; rows are queries or KEYS.

    One addition an element: what differs from register to register of a thread is known to the compiler, the rest, a
    row less its first column, is converted for the row. Made of positions, every column would be converted.
    """
    whole: gl.constexpr = parted(COLUMNS)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, whole)))
    lanes: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, whole)))
    eights: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, whole)))
    pair: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, whole)))
    o_rows = first + gl.arange(0, ROWS, rows).expand_dims(1).expand_dims(2).expand_dims(3)
    o_begins = o_rows - 2 * gl.arange(0, 4, lanes).expand_dims(0).expand_dims(1).expand_dims(3)
    o_eights = 8 * gl.arange(0, COLUMNS // 8, eights).expand_dims(0).expand_dims(2).expand_dims(3)
    o_within = o_eights + gl.arange(0, 2, pair).expand_dims(0).expand_dims(1).expand_dims(2)
    # Not the one less than 0: for that Triton 3.6 subtracts once more.
    if KEYS:
        b_less = o_within.to(gl.float32) - o_begins.to(gl.float32)
    else:
        b_less = o_begins.to(gl.float32) - o_within.to(gl.float32)
    return gl.convert_layout(b_less.reshape([ROWS, COLUMNS]), layout, assert_trivial=True)


@gluon.jit
def distances_of(first_row, first_column, place, layout: gl.constexpr, META: gl.constexpr, KEYS: gl.constexpr):
    """(query less key, aligned query less key) of a tile whose rows are queries or KEYS: see `rules.ruled`."""
    COLUMNS: gl.constexpr = META.tile_q if KEYS else META.tile_kv
    first = first_row - first_column
    diagonal = diagonal_of(place, META.alibi_top_left)
    aligned = first - diagonal if KEYS else first + diagonal
    b_apart = query_less_key(first, layout, COLUMNS, KEYS)
    return b_apart, query_less_key(aligned, layout, COLUMNS, KEYS)
