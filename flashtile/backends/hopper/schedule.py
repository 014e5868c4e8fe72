"""Which tile a program works on next, and in which order: persistent programs, the tiles with the most to do first."""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl, mbarrier
from flashtile.backends.hopper.eight import first_key_of
from flashtile.backends.hopper.registers import here
from flashtile.kernels.places import (
    SCANNED,
    diagonal_of,
    key_range,
    keys_of_tile,
    number_of,
    place_at,
    query_span,
    row_of,
    rows_of_tile,
    span,
    visited,
)
from flashtile.kernels.words import Place

ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
ONE_GROUP = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def ranked(i_number, total, size, section, META: gl.constexpr):
    """(batch entry, head, rank of its tile) of a number below `total`.

    `section` heads, what is read of which fits into the L2 cache together, give their heaviest tiles first, then those
    after; where all tiles weigh the same, those of a head follow each other.
    """
    tiles = number_of(size.tiles)
    heads = number_of(size.heads)
    if META.sections:
        i_section = i_number // (tiles * section)
        within = i_number % (tiles * section)
        members = gl.minimum(section, total // tiles - i_section * section)
        i_rank = within // members
        i_pair = i_section * section + within % members
    else:
        i_rank = i_number % tiles
        i_pair = i_number // tiles
    return i_pair // heads, i_pair % heads, i_rank


@gluon.jit
def query_tile(i_number, packing, size, section, total, visits, META: gl.constexpr):
    """The `Place` of a number below `total`, for the loading warp."""
    i_batch, i_head, i_rank = ranked(i_number, total, size, section, META)
    o_lanes = gl.arange(0, SCANNED, ONE_WARP)
    return place_at(
        i_batch, i_head, i_rank, o_lanes, packing, size, visits,
        META.tile_q, False, META.reversed, META.masked == "lists",
    )  # fmt: skip


@gluon.jit
def key_tile(packing, size, visits, layout: gl.constexpr, META: gl.constexpr):
    """The `Place` of this program of the backward kernel, with a head of the keys: see `calls.grid_of_keys`. layout: of
    the warps that ask."""
    if META.sections:
        i_pair = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
        i_rank = gl.program_id(1)
    else:
        i_pair = gl.program_id(1)
        i_rank = gl.program_id(0)
    heads = number_of(size.heads)
    o_lanes = gl.arange(0, SCANNED, layout)
    return place_at(
        i_pair // heads, i_pair % heads, i_rank, o_lanes, packing, size, visits,
        META.tile_kv, True, False, META.masked == "lists",
    )  # fmt: skip


@gluon.jit
def counts_of(place, visits, META: gl.constexpr):
    """(tiles that need the mask, tiles in all) of a query tile's list."""
    partial = place.tile * 0
    every = partial
    if META.masked == "lists":
        partial, every, _tiles = visited(visits, place)
    return partial, every


@gluon.jit
def keys_in_blocks(place, window, META: gl.constexpr):
    """`keys_of_tile`, where the first tile begins in front of the sequence."""
    first_row, last_row = rows_of_tile(place, META.tile_q)
    diagonal = diagonal_of(place, META.window_top_left)
    begin, end = key_range(window, diagonal, first_row, last_row, place.seqlen_k)
    every_begin, every_end = key_range(window, diagonal, last_row, first_row, place.seqlen_k)
    before = -first_key_of(0, place, META)
    return span(
        before + begin, before + gl.maximum(end, 0), before + every_begin, before + gl.maximum(every_end, 0),
        before + place.seqlen_k, META.tile_kv,
    )  # fmt: skip


@gluon.jit
def walk_of(place, counts, window, visits, META: gl.constexpr):
    """(tiles, first, full_begin, full_end, steps): how a query tile walks its keys, at least one step.

    Step n meets tile `first` - n, or the n-th of the list at `tiles`; steps [full_begin, full_end) need no mask.
    counts: see `counts_of`.
    """
    if META.masked == "lists":
        partial, steps = counts
        tiles = visits.tiles + (row_of(visits, place.batch, place.head) + place.tile) * number_of(visits.length)
        first = partial * 0
        full_begin = partial
        full_end = steps
    else:
        if META.aligned > 1:
            begin, every_begin, every_end, end = keys_in_blocks(place, window, META)
        else:
            begin, every_begin, every_end, end = keys_of_tile(place, window, META)
        end = gl.maximum(end, begin + 1)
        tiles = end - 1
        first = end - 1
        full_begin = end - every_end
        full_end = end - every_begin
        steps = end - begin
    return tiles, first, full_begin, full_end, gl.maximum(steps, 1)


@triton.constexpr_function
def edges_in(apart, phase):
    """Whether "all", "some" or "none" of the steps of a phase of a walk need the mask."""
    return ("all", "none")[phase] if apart else "some"


@gluon.jit
def tile_of(walk, n, META: gl.constexpr):
    """The number of the tile that step n meets."""
    tiles, first, _full_begin, _full_end, _steps = walk
    return gl.load(tiles + n) if META.masked == "lists" else first - n


@gluon.jit
def announce(mailbox, place, counts, turn, META: gl.constexpr):
    """The loader tells the math warpgroups which tile comes next, and what it has read of its list."""
    values, full, empty = mailbox
    mbarrier.wait(empty, (turn & 1) ^ 1)
    write(values, 0, place.batch)
    write(values, 1, place.head)
    write(values, 2, place.tile)
    if META.packed:
        write(values, 3, place.first_q)
        write(values, 4, place.first_k)
        write(values, 5, place.seqlen_q)
        write(values, 6, place.seqlen_k)
    if META.masked == "lists":
        write(values, 3, counts[0])
        write(values, 4, counts[1])
    mbarrier.arrive(full, count=1)


@gluon.jit
def end(mailbox, turn):
    """The loader tells them that none does."""
    values, full, empty = mailbox
    mbarrier.wait(empty, (turn & 1) ^ 1)
    write(values, 0, -1)
    mbarrier.arrive(full, count=1)


@gluon.jit
def hear(mailbox, size, turn, META: gl.constexpr):
    """What `announce` said, (place, counts); the batch entry is -1 where there is nothing more to do."""
    values, full, empty = mailbox
    mbarrier.wait(full, turn & 1)
    i_batch = read(values, 0)
    i_head = read(values, 1)
    i_tile = read(values, 2)
    first_q = i_batch * 0
    first_k = i_batch * 0
    if META.packed:
        first_q = read(values, 3)
        first_k = read(values, 4)
        seqlen_q = read(values, 5)
        seqlen_k = read(values, 6)
    else:
        seqlen_q = number_of(here(size.seqlen_q))
        seqlen_k = number_of(here(size.seqlen_k))
    partial = i_batch * 0
    every = partial
    if META.masked == "lists":
        partial = read(values, 3)
        every = read(values, 4)
    mbarrier.arrive(empty, count=1)
    return Place(i_batch, i_head, i_tile, first_q, first_k, seqlen_q, seqlen_k), (partial, every)


@gluon.jit
def write(values, FIELD: gl.constexpr, number):
    values.index(FIELD).store(gl.full([1], 0, gl.int32, ONE_WARP) + number)


@gluon.jit
def read(values, FIELD: gl.constexpr):
    return gl.sum(values.index(FIELD).load(ONE_GROUP), 0)


@gluon.jit
def rows_walk(place, window, visits, META: gl.constexpr):
    """(tiles, begin, full_begin, full_end, end): how a key tile walks the queries of a head.

    Step n meets tile n, or the n-th of the list at `tiles`; steps [full_begin, full_end) need no mask.
    """
    first_key = place.tile * META.tile_kv
    last_key = gl.minimum(first_key + META.tile_kv, place.seqlen_k) - 1
    if META.masked == "lists":
        partial, end, tiles = visited(visits, place)
        begin = partial * 0
        full_begin = partial
        full_end = end
    else:
        diagonal = diagonal_of(place, META.window_top_left)
        begin, full_begin, full_end, end = query_span(
            window, diagonal, first_key, last_key, place.seqlen_q, META.tile_q
        )
        tiles = begin
        if META.left:
            full_end = gl.maximum(full_end, full_begin)
        else:
            # Rows beyond the end have no weights: no mask is needed for them.
            full_end = end
    if META.masked == "always" or first_key + META.tile_kv > place.seqlen_k:
        # Keys beyond the end may score more than any other.
        full_begin = end
        full_end = end
    return tiles, begin, full_begin, full_end, end


@gluon.jit
def row_tile(walk, n, META: gl.constexpr):
    """The number of the query tile that step n meets."""
    return gl.load(walk[0] + n) if META.masked == "lists" else n
