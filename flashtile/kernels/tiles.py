"""Tiles of rows between memory and registers."""

import triton
import triton.language as tl

from flashtile.kernels.places import diagonal_of, key_range, number_of, rows_of_tile, stats_pointers
from flashtile.kernels.words import Source


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
def load_kept(
    rows, i_batch, i_head, first, first_row, begin, end,
    TILE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Rows first_row, ... of one head that `dots` multiplies by others again and again; see `load_rows`. With
    META.direct they come in parts, (parts, rows, columns): each wave loads the part that it multiplies."""
    PARTS: tl.constexpr = parts_of(META.parts, BLOCK)
    if META.direct and PARTS > 1:
        # As lanes hold the first operand of a matrix instruction: rows side by side, then fours of columns. Whatever
        # they hold beside that are further columns and rows.
        LOW: tl.constexpr = min(32, TILE)
        FOURS: tl.constexpr = 64 // LOW
        CHUNKS: tl.constexpr = BLOCK // PARTS // (4 * FOURS)
        o_rest = tl.arange(0, TILE // LOW * CHUNKS)[None, None, None, :, None]
        o_rows = first_row + o_rest // CHUNKS * LOW + tl.arange(0, LOW)[:, None, None, None, None]
        o_four = (o_rest % CHUNKS) * FOURS + tl.arange(0, FOURS)[None, :, None, None, None]
        o_part = tl.arange(0, PARTS)[None, None, :, None, None] * (BLOCK // PARTS)
        o_columns = o_part + o_four * 4 + tl.arange(0, 4)[None, None, None, None, :]
        base = rows.pointer + i_batch.to(tl.int64) * rows.batch + i_head.to(tl.int64) * rows.head
        pointers = base + (first + o_rows).to(tl.int64) * rows.row + o_columns
        m_rows = (o_rows >= begin) & (o_rows < end) & (o_columns < DIM)
        b_loaded = tl.load(pointers, mask=m_rows, other=0.0).reshape(LOW, FOURS, PARTS, TILE // LOW, CHUNKS, 4)
        b_rows = tl.permute(b_loaded, (2, 3, 0, 4, 1, 5)).reshape(PARTS, TILE, BLOCK // PARTS)
    else:
        b_rows = load_rows(rows, i_batch, i_head, first, first_row + tl.arange(0, TILE), begin, end, DIM, BLOCK)
    return b_rows


@triton.jit
def load_kept_queries(rows, place, DIM: tl.constexpr, BLOCK: tl.constexpr, META: tl.constexpr):
    """A query tile for `dots`."""
    first_row = place.tile * META.tile_q
    return load_kept(
        rows, place.batch, place.head, place.first_q, first_row, 0, place.seqlen_q, META.tile_q, DIM, BLOCK, META
    )


@triton.constexpr_function
def parts_of(parts, columns):
    """Into how many the columns are cut: a matrix instruction takes 16 of them at least."""
    return min(parts, max(1, columns // 16))


@triton.jit
def open_tiles(
    rows, i_batch, i_head, first, begin, end,
    DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr, PERHAPS_NONE: tl.constexpr = False,
):  # fmt: skip
    """The `Source` of rows [begin, end) of one head; PERHAPS_NONE: of which there may be none, where tiles are read."""
    base = rows.pointer + i_batch.to(tl.int64) * rows.batch + i_head.to(tl.int64) * rows.head
    tiles = base + first.to(tl.int64) * rows.row
    if TMA:
        tiles += begin.to(tl.int64) * rows.row
        # The copy engine takes no tensor without rows: in place of none there is one, far before all that is asked for.
        length = tl.maximum(end - begin, 1)
        if PERHAPS_NONE:
            begin = tl.where(end > begin, begin, -(2**30))
        tiles = tl.make_tensor_descriptor(tiles, [length, DIM], [rows.row.to(tl.int64), 1], [TILE, BLOCK])
    return Source(rows, tiles, begin, end)


@triton.jit
def columns_from(source, FIRST: tl.constexpr):
    """The `Source` of the same rows' columns from FIRST on, without the copy engine."""
    return Source(source.rows, source.tiles + FIRST, source.begin, source.end)


@triton.jit
def pages_of_tile(source, table, i_tile, TILE: tl.constexpr, PAGE: tl.constexpr, WHOLE: tl.constexpr):
    """The page that each row of a tile lies in; -1 for rows outside of [begin, end), which are never read. WHOLE: one
    page, all of the tile lies in it."""
    first_row = i_tile * TILE
    if WHOLE:
        m_tile = (first_row + TILE > source.begin) & (first_row < source.end)
        b_pages = tl.load(table.pointer + first_row // PAGE, mask=m_tile, other=-1)
    else:
        o_rows = first_row + tl.arange(0, TILE)
        m_rows = (o_rows >= source.begin) & (o_rows < source.end)
        b_pages = tl.load(table.pointer + (table.first + o_rows) // PAGE, mask=m_rows, other=-1)
    return b_pages


@triton.jit
def scales_of_rows(scale, i_head, b_pages):
    """What quantised rows are multiplied by: one number, or one for each row by its page, 0 where that is -1."""
    if scale.page is None:
        b_scale = tl.load(scale.pointer + i_head)
    else:
        pointers = scale.pointer + i_head + b_pages.to(tl.int64) * number_of(scale.page)
        b_scale = tl.load(pointers, mask=b_pages >= 0, other=0.0)
    return b_scale


@triton.jit
def widened(b_rows, DTYPE: tl.constexpr):
    """Rows of a cache as queries are; bytes hold two four-bit integers each (see `flashtile.problem.INT4`)."""
    if b_rows.dtype == tl.uint8:
        # The sign's bit turned over, a number n is n + 8.
        b_rows ^= 0x88
        b_rows = tl.interleave(from_bits(b_rows & 15, 8, DTYPE), from_bits(b_rows >> 4, 8, DTYPE))
    elif b_rows.dtype == tl.int8:
        b_rows = from_bits(b_rows.to(tl.uint8, bitcast=True) ^ 0x80, 128, DTYPE)
    return b_rows.to(DTYPE)


@triton.jit
def power_of_rows(b_rows):
    """The power of two below the largest number of each row, 1 for rows of zeros; float32 bits, as integers."""
    b_bits = tl.max(tl.abs(b_rows.to(tl.float32)), 1).to(tl.int32, bitcast=True) & 0x7F800000
    # Those that are infinite or nearly so stay what they are, and the inverse stays a normal number.
    return tl.where(b_bits == 0, 0x3F800000, tl.minimum(b_bits, 0x7E800000))


@triton.jit
def narrowed(b_rows, b_bits):
    """Rows divided by powers of two, as float16. What lies 2^14 below the largest of its row loses bits of a number
    that no sum notices."""
    b_inverse = (0x7F000000 - b_bits).to(tl.float32, bitcast=True)
    return (b_rows.to(tl.float32) * b_inverse[:, None]).to(tl.float16)


@triton.jit
def from_bits(b_bytes, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes less ZERO as numbers. 1024 + n is 0x6400 | n as float16, where n is less than 1024: conversions of integers
    would run at a quarter of the speed."""
    if DTYPE == tl.float16:
        b_numbers = (b_bytes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
    else:
        b_numbers = (b_bytes.to(tl.int32) - ZERO).to(DTYPE)
    return b_numbers


@triton.jit
def load_tile(
    source, i_tile, DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
    table=None, b_pages=None, PAGE: tl.constexpr = 0, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows of tile `i_tile`, with zeros outside of [begin, end) and beyond DIM columns. Where they lie in pages of PAGE
    rows, `b_pages` is what `pages_of_tile` found (WHOLE: see there)."""
    first_row = i_tile * TILE
    if TMA:
        # The descriptor begins at `begin`: rows before it have negative coordinates and come as zeros.
        b_rows = source.tiles.load([first_row - source.begin, 0])
    else:
        o_rows = tl.arange(0, TILE)
        o_columns = tl.arange(0, BLOCK)[None, :]
        stride = source.rows.row
        if WHOLE:
            page = source.tiles + b_pages.to(tl.int64) * source.rows.batch + (first_row % PAGE) * stride
            pointers = page + o_rows[:, None] * stride + o_columns
        elif PAGE:
            o_slots = (table.first + first_row + o_rows) % PAGE
            pointers = source.tiles + (b_pages.to(tl.int64) * source.rows.batch + o_slots * stride)[:, None] + o_columns
        else:
            pointers = source.tiles + first_row.to(tl.int64) * stride + o_rows[:, None] * stride + o_columns
        m_tile = ((first_row + o_rows >= source.begin) & (first_row + o_rows < source.end))[:, None]
        if DIM != BLOCK:
            m_tile &= o_columns < DIM
        b_rows = tl.load(pointers, mask=m_tile, other=0.0)
    return b_rows


@triton.jit
def load_aside(source, i_tile, DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """What `load_tile` gives, for a product that takes its rows as columns: asked for that way round, the compiler lays
    them out in shared memory as the product reads them."""
    first_row = i_tile * TILE
    o_rows = tl.arange(0, TILE)[None, :]
    o_columns = tl.arange(0, BLOCK)[:, None]
    stride = source.rows.row
    pointers = source.tiles + first_row.to(tl.int64) * stride + o_rows * stride + o_columns
    m_tile = (first_row + o_rows >= source.begin) & (first_row + o_rows < source.end)
    if DIM != BLOCK:
        m_tile &= o_columns < DIM
    return tl.trans(tl.load(pointers, mask=m_tile, other=0.0))


@triton.jit
def store_rows(rows, i_batch, i_head, first, o_rows, end, b_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    pointers = row_pointers(rows, i_batch, i_head, first, o_rows, BLOCK)
    m_rows = (o_rows < end)[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]
    tl.store(pointers, b_rows.to(rows.pointer.dtype.element_ty), mask=m_rows)


@triton.jit
def open_keys(keys, values, place, window, META: tl.constexpr):
    """The `Source`s of the keys and values that a query tile may see."""
    first_row, last_row = rows_of_tile(place, META.tile_q)
    diagonal = diagonal_of(place, META.window_top_left)
    begin, end = key_range(window, diagonal, first_row, last_row, place.seqlen_k)
    i_head = place.head // META.group
    NONE: tl.constexpr = window.left is not None
    k = open_tiles(
        keys, place.batch, i_head, place.first_k, begin, end, META.headdim, META.tile_kv, META.block_d, META.tma, NONE
    )
    v = open_tiles(
        values, place.batch, i_head, place.first_k, begin, end, META.headdim_v, META.tile_kv, META.block_dv, META.tma,
        NONE,
    )  # fmt: skip
    return k, v


@triton.jit
def load_stats(lse, delta, place, o_query, PACKED: tl.constexpr):
    """(lse, delta). Rows that saw no key or do not exist get lse inf: all their weights are 0."""
    if PACKED:
        m_rows = o_query < place.seqlen_q
        b_lse = tl.load(stats_pointers(lse, place, o_query), mask=m_rows, other=float("inf"))
        b_delta = tl.load(stats_pointers(delta, place, o_query), mask=m_rows, other=0.0)
    else:
        # The padding holds lse -inf and delta 0; without a mask several numbers come at once.
        b_lse = tl.load(stats_pointers(lse, place, o_query))
        b_delta = tl.load(stats_pointers(delta, place, o_query))
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse), b_delta


@triton.jit
def sum_of_parts(b_parts, PARTS: tl.constexpr):
    """Sums over the last of three axes: parts of numbers, a power of two of them, each in other warps.

    One half is added to the other until two parts are left. To split them the compiler gives all parts of a number to
    one thread, through shared memory, once and without conflicts of banks. `tl.sum` would put the parts of a number
    next to each other, where lanes side by side meet in few banks, and sums there again, for every warp to read them.
    The last two are its own: what it gives keeps its layout, where scores over a quantised cache would else be laid
    out as its rows are loaded, all columns to a thread.
    """
    b_sum = b_parts
    for STEP in tl.static_range(1, doublings(PARTS)):
        b_low, b_high = tl.split(b_sum.reshape(b_parts.shape[0], b_parts.shape[1], PARTS >> STEP, 2))
        b_sum = b_low + b_high
    return tl.sum(b_sum, 2)


@triton.constexpr_function
def doublings(count):
    return count.bit_length() - 1


@triton.jit
def dots(b_rows, b_others, META: tl.constexpr):
    """Rows (as `load_kept` gives them) times the transposed others, both with all their columns. With META.parts the
    columns are cut into as many parts, each of which other warps multiply, where one warp's registers do not hold the
    operands whole."""
    COLUMNS: tl.constexpr = b_others.shape[1]
    PARTS: tl.constexpr = parts_of(META.parts, COLUMNS)
    if PARTS == 1:
        b_dots = tl.dot(b_rows, tl.trans(b_others), input_precision=META.precision)
    else:
        b_left = b_rows
        if len(b_rows.shape) == 2:
            b_left = tl.permute(b_rows.reshape(b_rows.shape[0], PARTS, COLUMNS // PARTS), (1, 0, 2))
        b_right = b_others.reshape(b_others.shape[0], PARTS, COLUMNS // PARTS)
        b_each = tl.dot(b_left, tl.permute(b_right, (1, 2, 0)), input_precision=META.precision)
        # Columns in front: a thread holds neighbours of a row, and moves several of them at a time.
        b_dots = tl.trans(sum_of_parts(tl.permute(b_each, (2, 1, 0)), PARTS))
    return b_dots
