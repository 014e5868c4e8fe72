"""What the kernels of this backend share: where a tile lies, how it is loaded, what happens to its scores.

In kernel code a prefix says what a name is: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
Scores meet the exponential in base 2 (exp2 is one instruction); the log-sum-exp is natural outside of the kernels.

Tuples group the arguments. A field that is None is known to be None when a kernel is compiled, so `is not None` is a
compile-time switch: what a call does not use costs nothing. Triton compiles anew where an integer becomes 1 or a
multiple of 16; those that follow from lengths come as `odd` numbers, which are neither: one kernel serves all lengths.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.lower_rules import tanh, whole

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """A tensor (batch, row, head, column): strides in elements, columns side by side. Packed: batch stride 0."""

    pointer: Any
    batch: Any
    row: Any
    head: Any


class Stats(NamedTuple):
    """One number a query, (batch, head, row), rows side by side and padded (see `PADDED`). Packed: batch stride 0."""

    pointer: Any
    batch: Any
    head: Any


class Packing(NamedTuple):
    """Packed sequences: where each begins (one more than there are), how many rows are in use (None: all), how many
    sequences (`odd`). All None: the problem is dense."""

    offsets_q: Any
    offsets_k: Any
    used_q: Any
    used_k: Any
    sequences: Any


class Size(NamedTuple):
    """A dense problem's lengths, or 0; programs a head (query or key tiles, packed: their `slots`). All `odd`."""

    seqlen_q: Any
    seqlen_k: Any
    heads: Any
    tiles: Any


class Grid(NamedTuple):
    """A contiguous (batch, head, row, column) tensor; strides of the first two, sizes of the last two, `odd`."""

    pointer: Any
    batch: Any
    head: Any
    rows: Any
    columns: Any


class Window(NamedTuple):
    """The keys from `left` before the diagonal to `right` behind it, `odd`; None: no limit."""

    left: Any
    right: Any


class Visits(NamedTuple):
    """Which tiles a tile meets, those that need the mask first: counts (batch, head, tile, 2), tiles (.., tile, n).

    order (batch, head, tile): the tiles, those that meet the most first. `length`, n, and the strides are `odd`.
    """

    counts: Any
    tiles: Any
    order: Any
    length: Any
    batch: Any
    head: Any


class Modifiers(NamedTuple):
    """What changes scores: softcap; bias with strides (batch, head, query, key); slopes; arguments of functions.

    Strides are as `whole` reads them. `score`, `mask`: what the functions of that name get, `totals`: where gradients
    of the first go (see `lower`).
    """

    softcap: Any
    bias: Any
    bias_batch: Any
    bias_head: Any
    bias_query: Any
    bias_key: Any
    slopes: Any
    slopes_batch: Any
    score: Any
    totals: Any
    mask: Any


class Dropout(NamedTuple):
    """Entries whose 32-bit number is under `threshold` are dropped, the others scaled by `factor`."""

    seed: Any
    threshold: Any
    factor: Any


class Rules(NamedTuple):
    """What happens to scores. `factor` takes scores (or dot products that nothing modifies) to base 2, `scale` dot
    products to scores."""

    window: Any
    modifiers: Any
    dropout: Any
    factor: Any
    scale: Any


class Place(NamedTuple):
    """What a program works on: a tile of a head of a batch entry or packed sequence, and where that lies."""

    batch: Any
    head: Any
    tile: Any
    first_q: Any
    first_k: Any
    seqlen_q: Any
    seqlen_k: Any


class Source(NamedTuple):
    """What a sweep reads tile by tile: rows [begin, end) of one head; `tiles`: a descriptor for the copy engine, or a
    pointer to row 0."""

    rows: Any
    tiles: Any
    begin: Any
    end: Any


class Steps(NamedTuple):
    """The tiles [begin, end) of a sweep, by number, or by their place in the list at `tiles`; [full_begin, full_end)
    need no mask at the edges."""

    tiles: Any
    begin: Any
    end: Any
    full_begin: Any
    full_end: Any


def odd(number: int) -> int:
    """An integer that Triton tells apart from no other (see above); at least 0. `number_of` undoes it in a kernel."""
    return 2 * number + 3


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


SCANNED = tl.constexpr(128)


@triton.jit
def slots(offsets, o_sequences, TILE: tl.constexpr):
    """The first program of a packed sequence that begins after c rows and is number i: c // TILE + i.

    Sequence i then has (c' // TILE + i + 1) - (c // TILE + i) programs, c' being where it ends: never less than its
    tiles, and at most one more, which finds no rows. So no list is made and nobody asks the device for a length.
    """
    before = tl.load(offsets + o_sequences) - tl.load(offsets)
    return before.to(tl.int32) // TILE + o_sequences


@triton.jit
def packed_tile(offsets, sequences, i_slot, TILE: tl.constexpr):
    """(sequence, tile of it) of a program: the last sequence whose first program is not a later one.

    The search reads some of the sequences at a time, evenly spread over those that are left.
    """
    begin = sequences * 0
    within = sequences
    while within > 1:
        step = (within + SCANNED - 1) // SCANNED
        o_sequences = begin + step * tl.arange(0, SCANNED)
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
    i_batch, i_head, i_tile = program_of(size)
    if LISTS:
        i_tile = tl.load(visits.order + row_of(visits, i_batch, i_head) + i_tile)
    if REVERSED:
        i_tile = number_of(size.tiles) - 1 - i_tile
    if packing.sequences is not None:
        offsets = packing.offsets_k if KEYS else packing.offsets_q
        i_batch, i_tile = packed_tile(offsets, number_of(packing.sequences), i_tile, TILE)
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
def row_pointers(rows, i_batch, i_head, first, o_rows, BLOCK: tl.constexpr):
    base = rows.pointer + i_batch.to(tl.int64) * rows.batch + i_head.to(tl.int64) * rows.head
    return base + (first + o_rows).to(tl.int64)[:, None] * rows.row + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_rows(rows, i_batch, i_head, first, o_rows, begin, end, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first + o_rows of one head; zeros outside [begin, end) and beyond DIM columns."""
    pointers = row_pointers(rows, i_batch, i_head, first, o_rows, BLOCK)
    m_rows = ((o_rows >= begin) & (o_rows < end))[:, None]
    return tl.load(pointers, mask=m_rows & (tl.arange(0, BLOCK) < DIM)[None, :], other=0.0)


@triton.jit
def load_queries(rows, place, o_query, DIM: tl.constexpr, BLOCK: tl.constexpr):
    return load_rows(rows, place.batch, place.head, place.first_q, o_query, 0, place.seqlen_q, DIM, BLOCK)


@triton.jit
def open_tiles(
    rows, i_batch, i_head, first, begin, end,
    DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The `Source` of rows [begin, end) of one head."""
    base = rows.pointer + i_batch.to(tl.int64) * rows.batch + i_head.to(tl.int64) * rows.head
    tiles = base + first.to(tl.int64) * rows.row
    if TMA:
        tiles += begin.to(tl.int64) * rows.row
        length = tl.maximum(end - begin, 0)
        tiles = tl.make_tensor_descriptor(tiles, [length, DIM], [rows.row.to(tl.int64), 1], [TILE, BLOCK])
    return Source(rows, tiles, begin, end)


@triton.jit
def load_tile(source, i_tile, DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Rows of tile `i_tile`, with zeros outside of [begin, end) and beyond DIM columns."""
    first_row = i_tile * TILE
    if TMA:
        # The descriptor begins at `begin`: rows before it have negative coordinates and come as zeros.
        b_rows = source.tiles.load([first_row - source.begin, 0])
    else:
        o_rows = tl.arange(0, TILE)
        o_columns = tl.arange(0, BLOCK)[None, :]
        stride = source.rows.row
        pointers = source.tiles + first_row.to(tl.int64) * stride + o_rows[:, None] * stride + o_columns
        m_tile = ((first_row + o_rows >= source.begin) & (first_row + o_rows < source.end))[:, None]
        if DIM != BLOCK:
            m_tile &= o_columns < DIM
        b_rows = tl.load(pointers, mask=m_tile, other=0.0)
    return b_rows


@triton.jit
def store_rows(rows, i_batch, i_head, first, o_rows, end, b_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    pointers = row_pointers(rows, i_batch, i_head, first, o_rows, BLOCK)
    m_rows = (o_rows < end)[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]
    tl.store(pointers, b_rows.to(rows.pointer.dtype.element_ty), mask=m_rows)


@triton.jit
def stats_pointers(stats, place, o_query):
    row = place.batch.to(tl.int64) * stats.batch + place.head.to(tl.int64) * stats.head
    return stats.pointer + row + place.first_q + o_query


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
def open_keys(keys, values, place, window, META: tl.constexpr):
    """The `Source`s of the keys and values that a query tile may see."""
    first_row, last_row = rows_of_tile(place, META.tile_q)
    diagonal = diagonal_of(place, META.window_top_left)
    begin, end = key_range(window, diagonal, first_row, last_row, place.seqlen_k)
    i_head = place.head // META.group
    k = open_tiles(
        keys, place.batch, i_head, place.first_k, begin, end, META.headdim, META.tile_kv, META.block_d, META.tma
    )
    v = open_tiles(
        values, place.batch, i_head, place.first_k, begin, end, META.headdim_v, META.tile_kv, META.block_dv, META.tma
    )
    return k, v


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
def steps_of(visits, place, begin, full_begin, full_end, end, LISTS: tl.constexpr, PHASE: tl.constexpr):
    """What a sweep walks. With LISTS that is, in PHASE 0, the tiles that need the mask, and in PHASE 1 the others."""
    tiles = begin
    if LISTS:
        partial, every, tiles = visited(visits, place)
        begin = 0 if PHASE == 0 else partial
        end = partial if PHASE == 0 else every
    return Steps(tiles, begin, end, full_begin, full_end)


@triton.constexpr_function
def masked_in(masked, phase, guarded):
    """Where a sweep evaluates the mask, by `Meta.masked`: of lists, those of phase 1 need none. GUARDED, see
    `forward_sweep`, asks the mask everywhere."""
    if masked == "lists":
        return "always" if phase == 0 else "never"
    return "always" if guarded else masked


@triton.jit
def has_nan(b_tile):
    return tl.max((b_tile != b_tile).to(tl.int32)) > 0


@triton.jit
def tile_at(steps, i_step, LISTS: tl.constexpr):
    """The number of a tile. A sweep asks one step ahead (lists have room for that): loads wait for no other load."""
    return tl.load(steps.tiles + i_step) if LISTS else i_step


@triton.jit
def allowed(place, rules, o_query, o_key, META: tl.constexpr, MASK: tl.constexpr):
    """What the mask allows; `o_query` and `o_key` broadcast to the tile, either way round."""
    m_tile = (o_key < place.seqlen_k) & (o_query < place.seqlen_q)
    diagonal = diagonal_of(place, META.window_top_left)
    if rules.window.right is not None:
        m_tile &= o_key <= o_query + diagonal + number_of(rules.window.right)
    if rules.window.left is not None:
        m_tile &= o_key >= o_query + diagonal - number_of(rules.window.left)
    if MASK is not None:
        shift = place.seqlen_k - place.seqlen_q
        m_tile &= MASK(place.batch, place.head, o_query, o_key, shift, rules.modifiers.mask)
    return m_tile


@triton.jit
def bias_pointers(modifiers, place, o_query, o_key):
    base = place.batch.to(tl.int64) * whole(modifiers.bias_batch) + place.head.to(tl.int64) * whole(modifiers.bias_head)
    tile = o_query.to(tl.int64) * whole(modifiers.bias_query) + o_key.to(tl.int64) * whole(modifiers.bias_key)
    return modifiers.bias + base + tile


@triton.jit
def alibi_distance(place, o_query, o_key, META: tl.constexpr):
    """In float32 from the start: to convert every element of a tile costs as much as its exponential."""
    diagonal = diagonal_of(place, META.alibi_top_left)
    return tl.abs((o_query + diagonal).to(tl.float32) - o_key.to(tl.float32))


@triton.jit
def modify(b_scores, place, rules, o_query, o_key, META: tl.constexpr, SCORE: tl.constexpr):
    """(modified scores, scores between softcap and the rest, scores before SCORE), natural base."""
    modifiers = rules.modifiers
    if modifiers.softcap is not None:
        b_scores = modifiers.softcap * tanh(b_scores / modifiers.softcap)
    b_capped = b_scores
    if modifiers.bias is not None:
        m_tile = (o_query < place.seqlen_q) & (o_key < place.seqlen_k)
        pointers = bias_pointers(modifiers, place, o_query, o_key)
        b_scores += tl.load(pointers, mask=m_tile, other=0.0).to(tl.float32)
    if modifiers.slopes is not None:
        slope = tl.load(modifiers.slopes + place.batch * whole(modifiers.slopes_batch) + place.head).to(tl.float32)
        b_scores -= slope * alibi_distance(place, o_query, o_key, META)
    b_plain = b_scores
    if SCORE is not None:
        b_scores = SCORE(b_scores, place.batch, place.head, o_query, o_key, modifiers.score)
    return b_scores, b_capped, b_plain


@triton.jit
def kept(dropout, place, o_query, first_key, TILE: tl.constexpr):
    """Which entries dropout keeps, (queries, TILE keys): four keys share one counter (see `flashtile.dropout`).

    All bits of an int32 or none, for `only`: for AMD, Triton 3.9 fails to pass booleans on to a matrix product.
    """
    seed = tl.load(dropout.seed)
    o_groups = first_key // 4 + tl.arange(0, TILE // 4)
    zeros = tl.zeros_like(o_query[:, None] + o_groups[None, :])
    c0, c1 = zeros + o_groups[None, :], zeros + o_query[:, None]
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, zeros + place.head, zeros + place.batch, 7)
    lanes = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(o_query.shape[0], TILE)
    return ((whole(dropout.threshold).to(tl.int64) - 1 - lanes.to(tl.int64)) >> 63).to(tl.int32)


@triton.jit
def only(m_kept, b_values):
    """The values, 0 where `m_kept`, all bits of an int32 or none, has none: even NaN, and without a boolean tile."""
    WHOLE: tl.constexpr = tl.int32 if b_values.dtype.primitive_bitwidth == 32 else tl.int16
    return (b_values.to(WHOLE, bitcast=True) & m_kept.to(WHOLE)).to(b_values.dtype, bitcast=True)


@triton.jit
def only_seen(m_tile, b_rows):
    """The rows of keys that some query of the tile sees, 0 in place of the others."""
    return only(-tl.max(m_tile.to(tl.int32), 0)[:, None], b_rows)
