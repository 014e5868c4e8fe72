"""Where a tile lies, which tiles it meets, and which of them need the mask."""

import triton
import triton.language as tl

from flashtile.kernels.words import Place, Steps

SCANNED = tl.constexpr(128)


@triton.jit
def number_of(odd):
    return (odd - 3) >> 1


@triton.jit
def extent(offsets, used, i_sequence):
    """(first row, rows in use) of a packed sequence."""
    first = tl.load(offsets + i_sequence).to(tl.int32)
    if used is None:
        rows = tl.load(offsets + i_sequence + 1).to(tl.int32) - first
    else:
        rows = tl.load(used + i_sequence).to(tl.int32)
    return first, rows


@triton.jit
def lengths_of(packing, size, i_batch):
    """(first query, first key, seqlen_q, seqlen_k) of a batch entry or packed sequence."""
    first_q = i_batch * 0
    first_k = i_batch * 0
    seqlen_q = number_of(size.seqlen_q)
    seqlen_k = number_of(size.seqlen_k)
    if packing.sequences is not None:
        first_q, seqlen_q = extent(packing.offsets_q, packing.used_q, i_batch)
        first_k, seqlen_k = extent(packing.offsets_k, packing.used_k, i_batch)
    return first_q, first_k, seqlen_q, seqlen_k


@triton.jit
def slots(offsets, o_sequences, TILE: tl.constexpr):
    """The first program of a packed sequence that begins after c rows and is number i: c // TILE + i.

    Sequence i then has (c' // TILE + i + 1) - (c // TILE + i) programs, c' being where it ends: never less than its
    tiles, and at most one more, which finds no rows. So no list is made and nobody asks the device for a length.
    """
    before = tl.load(offsets + o_sequences) - tl.load(offsets)
    return before.to(tl.int32) // TILE + o_sequences


@triton.jit
def packed_tile(offsets, sequences, i_slot, o_lanes, TILE: tl.constexpr):
    """(sequence, tile of it) of a program: the last sequence whose first program is not a later one.

    The search reads some of the sequences at a time, evenly spread over those that are left: `o_lanes`, 0, 1, ...
    """
    begin = sequences * 0
    within = sequences
    while within > 1:
        step = (within + SCANNED - 1) // SCANNED
        o_sequences = begin + step * o_lanes
        i_first = slots(offsets, tl.minimum(o_sequences, sequences), TILE)
        begun = tl.sum(((o_sequences < sequences) & (i_first <= i_slot)).to(tl.int32), 0)
        begin += (begun - 1) * step
        within = step
    return begin, i_slot - slots(offsets, begin, TILE)


@triton.jit
def program_of(size):
    """(batch entry, head, tile): tiles run fastest."""
    i_program = tl.program_id(0)
    tiles = number_of(size.tiles)
    heads = number_of(size.heads)
    return i_program // (tiles * heads), (i_program // tiles) % heads, i_program % tiles


@triton.jit
def locate(packing, size, visits, TILE: tl.constexpr, KEYS: tl.constexpr, REVERSED: tl.constexpr, LISTS: tl.constexpr):
    """The `Place` of this program, a tile of keys or of queries; those that have more to do start first. REVERSED: the
    later ones (causal masks). LISTS: those that `visits` name."""
    i_batch, i_head, i_rank = program_of(size)
    o_lanes = tl.arange(0, SCANNED)
    return place_at(i_batch, i_head, i_rank, o_lanes, packing, size, visits, TILE, KEYS, REVERSED, LISTS)


@triton.jit
def place_at(
    i_batch, i_head, i_rank, o_lanes, packing, size, visits,
    TILE: tl.constexpr, KEYS: tl.constexpr, REVERSED: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """The `Place` of a head's tile, by its rank in the order of `locate`; `o_lanes`: see `packed_tile`."""
    i_tile = i_rank
    if LISTS:
        i_tile = tl.load(visits.order + row_of(visits, i_batch, i_head) + i_rank)
    if REVERSED:
        i_tile = number_of(size.tiles) - 1 - i_rank
    if packing.sequences is not None:
        offsets = packing.offsets_k if KEYS else packing.offsets_q
        i_batch, i_tile = packed_tile(offsets, number_of(packing.sequences), i_tile, o_lanes, TILE)
    first_q, first_k, seqlen_q, seqlen_k = lengths_of(packing, size, i_batch)
    if packing.sequences is not None:
        # A program behind the last tile of its sequence has nothing to walk.
        if KEYS:
            seqlen_q = tl.where(i_tile * TILE < seqlen_k, seqlen_q, 0)
        else:
            seqlen_k = tl.where(i_tile * TILE < seqlen_q, seqlen_k, 0)
    return Place(i_batch, i_head, i_tile, first_q, first_k, seqlen_q, seqlen_k)


@triton.jit
def with_head(place, i_head):
    """The same tile of another head."""
    return Place(place.batch, i_head, place.tile, place.first_q, place.first_k, place.seqlen_q, place.seqlen_k)


@triton.jit
def diagonal_of(place, TOP_LEFT: tl.constexpr):
    """The key position of query 0's diagonal."""
    return 0 if TOP_LEFT else place.seqlen_k - place.seqlen_q


@triton.jit
def key_range(window, diagonal, first_row, last_row, seqlen_k):
    """[begin, end) of the keys that any of these rows may see: what lies outside is never read."""
    begin = seqlen_k * 0
    end = seqlen_k
    if window.left is not None:
        begin = tl.maximum(first_row + diagonal - number_of(window.left), 0)
    if window.right is not None:
        end = tl.minimum(last_row + diagonal + number_of(window.right) + 1, seqlen_k)
    return begin, end


@triton.jit
def query_range(window, diagonal, first_key, last_key, seqlen_q):
    """[begin, end) of the rows that may see any of these keys."""
    begin = seqlen_q * 0
    end = seqlen_q
    if window.right is not None:
        begin = tl.maximum(first_key - diagonal - number_of(window.right), 0)
    if window.left is not None:
        end = tl.minimum(last_key - diagonal + number_of(window.left) + 1, seqlen_q)
    return begin, end


@triton.jit
def span(begin, end, all_begin, all_end, length, TILE: tl.constexpr):
    """(begin, full_begin, full_end, end) in tiles: hull [begin, end), and what all see, [all_begin, all_end)."""
    first = begin // TILE
    last = tl.maximum(first, (tl.maximum(end, 0) + TILE - 1) // TILE)
    full_begin = tl.minimum(tl.maximum((tl.maximum(all_begin, 0) + TILE - 1) // TILE, first), last)
    full_end = tl.maximum(tl.minimum(tl.minimum(tl.maximum(all_end, 0), length) // TILE, last), full_begin)
    return first, full_begin, full_end, last


@triton.jit
def key_span(window, diagonal, first_row, last_row, seqlen_k, TILE: tl.constexpr):
    """`span` of the keys for rows [first_row, last_row]."""
    begin, end = key_range(window, diagonal, first_row, last_row, seqlen_k)
    all_begin, all_end = key_range(window, diagonal, last_row, first_row, seqlen_k)
    return span(begin, end, all_begin, all_end, seqlen_k, TILE)


@triton.jit
def rows_of_tile(place, TILE: tl.constexpr):
    """(first, last) query of a tile."""
    first_row = place.tile * TILE
    return first_row, tl.minimum(first_row + TILE, place.seqlen_q) - 1


@triton.jit
def keys_of_tile(place, window, META: tl.constexpr):
    """`key_span` of a query tile."""
    first_row, last_row = rows_of_tile(place, META.tile_q)
    diagonal = diagonal_of(place, META.window_top_left)
    return key_span(window, diagonal, first_row, last_row, place.seqlen_k, META.tile_kv)


@triton.jit
def query_span(window, diagonal, first_key, last_key, seqlen_q, TILE: tl.constexpr):
    """`span` of the rows for keys [first_key, last_key]."""
    begin, end = query_range(window, diagonal, first_key, last_key, seqlen_q)
    all_begin, all_end = query_range(window, diagonal, last_key, first_key, seqlen_q)
    return span(begin, end, all_begin, all_end, seqlen_q, TILE)


@triton.jit
def row_of(visits, i_batch, i_head):
    """The first row of a head in `visits`."""
    return i_batch.to(tl.int64) * number_of(visits.batch) + i_head.to(tl.int64) * number_of(visits.head)


@triton.jit
def visited(visits, place):
    """(how many tiles need the mask, how many tiles in all, where their list begins)."""
    row = row_of(visits, place.batch, place.head) + place.tile
    partial = tl.load(visits.counts + 2 * row)
    return partial, partial + tl.load(visits.counts + 2 * row + 1), visits.tiles + row * number_of(visits.length)


@triton.jit
def steps_of(
    visits, place, begin, full_begin, full_end, end, LISTS: tl.constexpr, PHASE: tl.constexpr, GUARDED: tl.constexpr
):
    """What a sweep walks. Of lists that is, in PHASE 0, the tiles that need the mask, and in PHASE 1 the others, or
    GUARDED all of them at once."""
    tiles = begin
    if LISTS:
        partial, every, tiles = visited(visits, place)
        begin = 0 if PHASE == 0 else partial
        end = partial if PHASE == 0 and not GUARDED else every
    return Steps(tiles, begin, end, full_begin, full_end)


@triton.constexpr_function
def phases_of(lists, guarded):
    """How many sweeps a walk has, see `steps_of`."""
    return 2 if lists and not guarded else 1


@triton.constexpr_function
def masked_in(masked, phase, guarded):
    """Where a sweep evaluates the mask, by `Meta.masked`: of lists, those of phase 1 need none. GUARDED, see
    `forward_sweep`, asks the mask everywhere."""
    if guarded or (masked == "lists" and phase == 0):
        return "always"
    return "never" if masked == "lists" else masked


@triton.jit
def tile_at(steps, i_step, LISTS: tl.constexpr):
    """The number of a tile. A sweep asks one step ahead (lists have room for that): loads wait for no other load."""
    return tl.load(steps.tiles + i_step) if LISTS else i_step


@triton.jit
def stats_pointers(stats, place, o_query):
    row = place.batch.to(tl.int64) * stats.batch + place.head.to(tl.int64) * stats.head
    return stats.pointer + row + place.first_q + o_query


@triton.jit
def number_pointers(numbers, place, o_query):
    """As `stats_pointers`, of `Numbers`."""
    row = place.batch.to(tl.int64) * number_of(numbers.batch) + place.head.to(tl.int64) * number_of(numbers.head)
    return numbers.pointer + row + place.first_q + o_query
