"""8-bit queries, keys and values (FlashAttention-3, section 3.3): their scales, and weights of 8 bits.

Scales of queries and keys go into the softmax's factor. Those of values, where each block of keys has one, would change
within a sum: the output is kept in the unit of the last tile's values, and changes it where it is rescaled anyway.

Packed sequences begin anywhere within a block. Their tiles of keys begin where blocks do, the first one in front of the
sequence, and what lies there is hidden; a tile of queries has a scale for each row.
"""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels.places import number_of
from flashtile.scaled import KEYS, QUERIES

QUERY_ROWS = gl.constexpr(QUERIES)
KEY_ROWS = gl.constexpr(KEYS)


@gluon.jit
def scale_at(scale, i_batch, i_head, i_block):
    """The scale of a block of rows of a head."""
    row = i_batch.to(gl.int64) * number_of(scale.batch) + i_head.to(gl.int64) * number_of(scale.head)
    return gl.load(scale.pointer + row + i_block)


@gluon.jit
def first_key_of(i_tile, place, META: gl.constexpr):
    """The number of a tile's first key, negative in front of the sequence."""
    first = i_tile * META.tile_kv
    if META.aligned > 1:
        first -= place.first_k & (META.aligned - 1)
    return first


@gluon.jit
def numbered(o_keys, place, META: gl.constexpr):
    """Numbers of keys, those in front of the sequence as if they were behind it: there nothing is seen or read."""
    if META.aligned > 1:
        o_keys = gl.where(o_keys < 0, place.seqlen_k, o_keys)
    return o_keys


@gluon.jit
def query_unit(scales, place, first, o_query, META: gl.constexpr):
    """That of the 64 queries from `first` on; of packed blocks one for each `o_query`."""
    unit = 1.0
    if META.scaled == "block" and META.packed:
        o_rows = place.first_q + gl.minimum(o_query, place.seqlen_q - 1)
        unit = scale_at(scales[0], place.batch, place.head, o_rows // QUERY_ROWS)
    elif META.eight:
        i_block = first // QUERY_ROWS if META.scaled == "block" else 0
        # A warpgroup whose rows lie beyond the sequence takes the last block's.
        i_block = gl.minimum(i_block, (place.seqlen_q - 1) // QUERY_ROWS)
        unit = scale_at(scales[0], place.batch, place.head, i_block)
    return unit


@gluon.jit
def units_of(scales, queries, place, i_tile, META: gl.constexpr):
    """(what the dot products of a key tile are multiplied by, what its values are); 1.0 where inputs have 16 bits."""
    dots = 1.0
    values = 1.0
    if META.eight:
        i_block = place.tile * 0
        if META.scaled == "block":
            last = (place.first_k + place.seqlen_k - 1) // KEY_ROWS
            first = place.first_k + first_key_of(i_tile, place, META)
            i_block = gl.minimum(gl.maximum(first // KEY_ROWS, 0), last)
        i_head = place.head // META.group
        dots = queries * scale_at(scales[1], place.batch, i_head, i_block)
        values = scale_at(scales[2], place.batch, i_head, i_block)
    return dots, values


@gluon.jit
def factor_of(rules, unit, META: gl.constexpr):
    """What takes scores to base 2."""
    factor = rules.factor
    if META.eight and not META.modified:
        factor = factor * unit
    return factor


@triton.constexpr_function
def _converts(dtype):
    """Four float32 to 8-bit floats in one register."""
    kind = {"fp8e4nv": "e4m3x2", "fp8e5": "e5m2x2"}[dtype.name]
    convert = f"cvt.rn.satfinite.{kind}.f32"
    return f"{{ .reg .b16 low, high; {convert} low, $2, $1; {convert} high, $4, $3; mov.b32 $0, {{low, high}}; }}"


@gluon.jit
def packed(b_weights, dtype: gl.constexpr, META: gl.constexpr):
    """(64, TILE / 16, 4) of four 8-bit weights each, whose keys are those that the values have there (see
    `flashtile.scaled`). A loop that carried them one by one would take a register for each (Triton 3.9)."""
    b_groups = b_weights.reshape([ROWS, META.tile_kv // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    b_even, b_odd = gl.split(b_groups)
    b_0, b_2 = gl.split(b_even)
    b_1, b_3 = gl.split(b_odd)
    return gl.inline_asm_elementwise(
        _converts(dtype), "=r,r,r,r,r", [b_0, b_1, b_2, b_3], dtype=gl.int32, is_pure=True, pack=1
    )
