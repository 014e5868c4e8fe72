"""Which query tile a program works on, and in which order: persistent programs, the tiles with the most to do first."""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl, mbarrier


@gluon.jit
def place_of(i_tile, tiles_q, heads, section, total, META: gl.constexpr):
    """(batch entry, head, query tile) of a number below `total`.

    Without a diagonal the tiles of a head follow each other. With one, later tiles have more to do: `section` heads,
    whose keys fit into the L2 cache together, give their last tiles first, then those before.
    """
    if META.right:
        i_section = i_tile // (tiles_q * section)
        within = i_tile % (tiles_q * section)
        members = gl.minimum(section, total // tiles_q - i_section * section)
        i_row = tiles_q - 1 - within // members
        i_pair = i_section * section + within % members
    else:
        i_row = i_tile % tiles_q
        i_pair = i_tile // tiles_q
    return i_pair // heads, i_pair % heads, i_row


@gluon.jit
def key_tiles(i_row, seqlen_q, seqlen_k, left, right, META: gl.constexpr):
    """(begin, full_begin, full_end, end) of the key tiles of a query tile; [full_begin, full_end) need no mask.

    At least one: where a tile sees nothing, its mask says so.
    """
    first = i_row * META.tile_q
    last = gl.minimum(first + META.tile_q, seqlen_q) - 1
    diagonal = 0 if META.top_left else seqlen_k - seqlen_q
    tiles = gl.cdiv(seqlen_k, META.tile_kv)
    begin = tiles * 0
    full_begin = tiles * 0
    end = tiles
    full_end = seqlen_k // META.tile_kv
    if META.right:
        end = gl.minimum(tiles, gl.cdiv(gl.maximum(last + diagonal + right + 1, 0), META.tile_kv))
        full_end = gl.minimum(full_end, gl.maximum(first + diagonal + right + 1, 0) // META.tile_kv)
    if META.left:
        begin = gl.minimum(gl.maximum(first + diagonal - left, 0) // META.tile_kv, tiles - 1)
        full_begin = gl.cdiv(gl.maximum(last + diagonal - left, 0), META.tile_kv)
    end = gl.maximum(end, begin + 1)
    full_begin = gl.minimum(gl.maximum(full_begin, begin), end)
    full_end = gl.maximum(gl.minimum(full_end, end), full_begin)
    return begin, full_begin, full_end, end


@gluon.jit
def part(begin, full_begin, full_end, end, PART: gl.constexpr):
    """[from, to) of the tiles before the full ones (PART 0), of those (1), and of those behind (2)."""
    if PART == 0:
        end = full_begin
    elif PART == 1:
        begin = full_begin
        end = full_end
    else:
        begin = full_end
    return begin, end


@triton.constexpr_function
def has_part(number, before, behind):
    """Whether a walk has such a part: `before`, `behind`: whether a window ends on that side."""
    return number == 1 or (before if number == 0 else behind)


@gluon.jit
def query_tiles(i_column, seqlen_q, seqlen_k, left, right, META: gl.constexpr):
    """(begin, full_begin, full_end, end) of the query tiles of a key tile; [full_begin, full_end) need no mask.

    Rows and keys beyond the ends need none either: the former have no weights, the latter are zeros.
    """
    first = i_column * META.tile_kv
    last = gl.minimum(first + META.tile_kv, seqlen_k) - 1
    diagonal = 0 if META.top_left else seqlen_k - seqlen_q
    end = gl.cdiv(seqlen_q, META.tile_q)
    begin = end * 0
    full_begin = end * 0
    full_end = end
    if META.right:
        begin = gl.minimum(gl.maximum(first - diagonal - right, 0) // META.tile_q, end)
        full_begin = gl.cdiv(gl.maximum(last - diagonal - right, 0), META.tile_q)
    if META.left:
        full_end = gl.maximum(first - diagonal + left + 1, 0) // META.tile_q
        end = gl.minimum(end, gl.cdiv(gl.maximum(last - diagonal + left + 1, 0), META.tile_q))
    end = gl.maximum(end, begin)
    full_begin = gl.minimum(gl.maximum(full_begin, begin), end)
    full_end = gl.maximum(gl.minimum(full_end, end), full_begin)
    return begin, full_begin, full_end, end


@gluon.jit
def hand_out(counter, i_tile, META: gl.constexpr):
    """The loader's next tile: whoever is done first takes the next one, or every program takes every n-th."""
    if META.dynamic:
        return gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
    return i_tile + gl.num_programs(0)


@gluon.jit
def announce(mailbox, i_next, turn):
    """The loader tells the math warpgroups which tile comes next."""
    value, full, empty = mailbox
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty, (turn & 1) ^ 1)
    value.store(gl.full([1], 0, gl.int32, one) + i_next)
    mbarrier.arrive(full, count=1)


@gluon.jit
def hear(mailbox, turn):
    """What `announce` said."""
    value, full, empty = mailbox
    four: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full, turn & 1)
    i_next = gl.sum(value.load(four), 0)
    mbarrier.arrive(empty, count=1)
    return i_next
