"""8-bit queries, keys and values (see `flashtile.scaled`): their scales, and values that lie on their side."""

import triton
import triton.language as tl

from flashtile.kernels.places import number_of
from flashtile.kernels.rules import only
from flashtile.scaled import GROUP, KEYS, QUERIES

QUERY_ROWS = tl.constexpr(QUERIES)
KEY_ROWS = tl.constexpr(KEYS)
SIXTEEN = tl.constexpr(GROUP)


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
def key_scales(scale, place, o_keys, META: tl.constexpr):
    """Those of keys, or of values."""
    i_head = place.head // META.group
    SCALED: tl.constexpr = META.scaled
    return scales_at(scale, place.batch, i_head, place.first_k, o_keys, place.seqlen_k, KEY_ROWS, SCALED)


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
def only_seen_turned(m_tile, b_v):
    """Of values on their side, those that some query of the tile sees, 0 in place of the others."""
    m_seen = tl.max(m_tile.to(tl.int32), 0)[None, :]
    return only(-in_places(m_seen), b_v)
