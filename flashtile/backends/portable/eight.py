"""8-bit queries, keys and values (see `flashtile.scaled`): their scales, units, and values that lie on their side.

Before weights are rounded to 8 bits they are multiplied by the scales of their values and divided by a unit, so that
they fill what 8 bits hold; the output is added up in the unit of the tile at hand. Where all values of a tile share a
scale, the unit is that scale, and a row's largest weight, 1, is exact in 8 bits. Where they do not (`Meta.mixed`), each
row has a unit of its own, in which its largest product of weight and scale is exact: in another it may err by 2^-4, and
so may all of a row that sees hardly anything else.
"""

import triton
import triton.language as tl

from flashtile.kernels.places import number_of
from flashtile.kernels.rules import only
from flashtile.scaled import GROUP, KEYS, QUERIES

QUERY_ROWS = tl.constexpr(QUERIES)
KEY_ROWS = tl.constexpr(KEYS)
SIXTEEN = tl.constexpr(GROUP)
LEAST = tl.constexpr(2.0**-40)


@triton.jit
def scales_at(scale, i_batch, i_head, first, o_rows, end, ROWS: tl.constexpr, SCALED: tl.constexpr):
    """The scales of rows first + o_rows of a head, those from `end` on as the last one's; one number where they share
    it."""
    pointer = (
        scale.pointer + i_batch.to(tl.int64) * number_of(scale.batch) + i_head.to(tl.int64) * number_of(scale.head)
    )
    if SCALED == "block":
        found = tl.load(pointer + (first + tl.maximum(tl.minimum(o_rows, end - 1), 0)) // ROWS)
    else:
        found = tl.load(pointer) + 0.0 * o_rows
    return found


@triton.jit
def query_scales(scales, place, o_query, META: tl.constexpr):
    SCALED: tl.constexpr = META.scaled
    return scales_at(scales[0], place.batch, place.head, place.first_q, o_query, place.seqlen_q, QUERY_ROWS, SCALED)


@triton.jit
def key_scales(scale, place, i_tile, META: tl.constexpr):
    """(those of the keys, or values, of a tile: one number where they share it or (1, keys); the largest of them)."""
    i_head = place.head // META.group
    SCALED: tl.constexpr = META.scaled
    TILE: tl.constexpr = META.tile_kv
    o_keys = i_tile * TILE + tl.arange(0, TILE) if META.mixed else i_tile * TILE
    found = scales_at(scale, place.batch, i_head, place.first_k, o_keys, place.seqlen_k, KEY_ROWS, SCALED)
    if META.mixed:
        b_scales, largest = found[None, :], tl.max(found, 0)
    else:
        b_scales, largest = found, found
    return b_scales, largest


@triton.jit
def first_unit(META: tl.constexpr):
    """The output's unit before any tile: one number, or one a row, as it is in all steps of a loop."""
    return tl.full([META.tile_q], 1.0, tl.float32) if META.mixed else 1.0


@triton.jit
def in_own_unit(b_out, b_weights, b_unit, scale, place, i_tile, META: tl.constexpr):
    """(output, weights times the scales of a tile's values, unit): both in this unit, the output so far in `b_unit`."""
    b_scales, largest = key_scales(scale, place, i_tile, META)
    if META.mixed:
        b_weights *= b_scales
        # A row that sees nothing of the tile, or next to nothing, would divide what it has added up by almost 0.
        b_own = tl.maximum(tl.max(b_weights, 1), largest * LEAST) * META.lowered
        b_out *= (b_unit / b_own)[:, None]
        b_weights *= (1.0 / b_own)[:, None]
    else:
        b_own = largest * META.lowered
        b_out *= b_unit / b_own
        b_weights *= b_scales / b_own
    return b_out, b_weights, b_own


@triton.jit
def out_of_unit(b_out, b_unit, META: tl.constexpr):
    """The output itself."""
    return b_out * (b_unit[:, None] if META.mixed else b_unit)


@triton.jit
def in_places(b_tile):
    """(rows, keys): keys in the order in which values lie."""
    ROWS: tl.constexpr = b_tile.shape[0]
    TILE: tl.constexpr = b_tile.shape[1]
    b_groups = tl.permute(b_tile.reshape(ROWS, TILE // SIXTEEN, 2, 4, 2), (0, 1, 3, 2, 4))
    return b_groups.reshape(ROWS, TILE)


@triton.jit
def load_turned(source, i_tile, DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """(columns, keys) of values on their side; `source.rows.row` is the stride of a column."""
    o_places, o_columns = i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK)
    m_tile = (o_places < (source.end + SIXTEEN - 1) // SIXTEEN * SIXTEEN)[None, :] & (o_columns < DIM)[:, None]
    pointers = source.tiles + o_columns.to(tl.int64)[:, None] * source.rows.row + o_places[None, :]
    return tl.load(pointers, mask=m_tile, other=0.0)


@triton.jit
def key_of_place(o_places):
    """The inverse of `in_places`: which key lies there."""
    return o_places // 16 * 16 + o_places % 16 // 4 * 2 + o_places // 2 % 2 * 8 + o_places % 2


@triton.jit
def only_seen_turned(m_tile, b_v):
    """Of values on their side, those that some query of the tile sees, 0 in place of the others."""
    TILE: tl.constexpr = m_tile.shape[1]
    # Not by `in_places`: the compiler would follow it to the mask, and evaluate that again with all rows in one thread.
    m_seen = tl.gather(tl.max(m_tile.to(tl.int32), 0), key_of_place(tl.arange(0, TILE)), 0)
    return only(-m_seen[None, :], b_v)
