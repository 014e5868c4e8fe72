"""KV caches in kernels: where a sequence lies, new rows written into it and turned, its keys cut into parts.

Lengths, rows and pages are read here, on the device: a launch depends on none of them, so that one that a CUDA graph
holds may find others the next time.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashtile.kernels.places import number_of, program_of
from flashtile.kernels.tiles import row_pointers, scales_of_rows
from flashtile.kernels.words import Cache, Place, Rotary, Rows, Scale, Source, Table, odd
from flashtile.lower.rules import round_half_even
from flashtile.problem import CacheTensors


def cache_of(cache: CacheTensors) -> Cache:
    """A call's cache in the kernels' words."""
    places = (cache.seqlens, cache.batch_idx, cache.leftpad)
    numbers = [None if tensor is None else tensor.contiguous() for tensor in places]
    table = cache.block_table
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    appended = 0 if cache.k is None else cache.k.shape[1]
    return Cache(*[*numbers, table, None if table is None else odd(table.stride(0)), odd(appended)])


def stored(tensor: Tensor) -> Rows:
    """A cache, never copied: rows are written into it. Batch entries are rows of the cache, or pages."""
    return Rows(tensor, *tensor.stride()[:3])


def rotary_of(cache: CacheTensors) -> Rotary | None:
    """The tables, if rows are turned."""
    if cache.rotary_cos is None or cache.rotary_sin is None:
        return None
    return Rotary(cache.rotary_cos, cache.rotary_sin, cache.rotary_cos.stride(0), cache.rotary_sin.stride(0))


def scale_of(scale: Tensor | None) -> Scale | None:
    """A quantised cache's scales, (heads_kv,) or (pages, heads_kv)."""
    if scale is None:
        return None
    return Scale(scale, None if scale.ndim == 1 else odd(scale.stride(0)))


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """EARLY: once all programs have come here, those of the kernel behind are launched where there is room."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_kernel(EARLY: tl.constexpr):
    """EARLY: this kernel was launched before the one before had ended; nothing of it may be read any earlier."""
    if EARLY:
        gdc_wait()


@triton.jit
def sequence_of(cache, i_batch):
    """(row of the cache or of the block table, left padding, rows before the call) of a sequence."""
    i_row = i_batch
    if cache.rows is not None:
        i_row = tl.load(cache.rows + i_batch).to(tl.int32)
    first = i_batch * 0
    if cache.leftpad is not None:
        first = tl.load(cache.leftpad + i_batch).to(tl.int32)
    return i_row, first, tl.load(cache.seqlens + i_batch).to(tl.int32)


@triton.jit
def table_of(cache, i_row, first):
    """The `Table` of a sequence, None where there are no pages."""
    table = None
    if cache.table is not None:
        table = Table(cache.table + i_row.to(tl.int64) * number_of(cache.table_row), first)
    return table


@triton.jit
def open_cache(rows, cache, i_row, i_head, first, begin, end):
    """The `Source` of a sequence's rows [begin, end), counted behind its left padding."""
    tiles = rows.pointer + i_head.to(tl.int64) * rows.head
    if cache.table is None:
        tiles += i_row.to(tl.int64) * rows.batch + first.to(tl.int64) * rows.row
    return Source(rows, tiles, begin, end)


@triton.jit
def store_new(
    rows, scale, cache, i_row, i_head, o_places, m_rows, b_rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows of one head to places `o_places` of a sequence, left padding counted; with a `scale` quantised (see
    `flashtile.kvcache.quantized`)."""
    STORED: tl.constexpr = rows.pointer.dtype.element_ty
    o_columns = tl.arange(0, BLOCK)[None, :]
    b_pages = None
    if PAGE:
        b_pages = tl.load(table_of(cache, i_row, 0).pointer + o_places // PAGE, mask=m_rows, other=0)
        o_rows = b_pages.to(tl.int64) * rows.batch + (o_places % PAGE) * rows.row
    else:
        o_rows = i_row.to(tl.int64) * rows.batch + o_places.to(tl.int64) * rows.row
    if quantizes(STORED):
        b_scale = scales_of_rows(scale, i_head, b_pages)
        if scale.page is not None:
            b_scale = b_scale[:, None]
        b_rows = tl.div_rn(b_rows.to(tl.float32), b_scale)
        LARGEST: tl.constexpr = largest_of(STORED)
        b_rows = tl.where(b_rows > LARGEST, LARGEST, tl.where(b_rows < -LARGEST, -LARGEST, b_rows))
        if STORED == tl.int8 or STORED == tl.uint8:
            b_rows = round_half_even(b_rows)
    p_rows = rows.pointer + i_head.to(tl.int64) * rows.head + o_rows[:, None]
    if STORED == tl.uint8:  # four-bit integers
        b_low, b_high = tl.split(tl.reshape(b_rows.to(tl.int32), [b_rows.shape[0], BLOCK // 2, 2]))
        o_pairs = tl.arange(0, BLOCK // 2)[None, :]
        tl.store(
            p_rows + o_pairs, ((b_low & 15) | (b_high << 4)).to(STORED), mask=m_rows[:, None] & (o_pairs < DIM // 2)
        )
    else:
        tl.store(p_rows + o_columns, b_rows.to(STORED), mask=m_rows[:, None] & (o_columns < DIM))


_LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0, "int8": 127.0, "uint8": 7.0}
"""The largest number of what a quantised cache holds; of integers -127 to 127, of four bits -7 to 7, so that signs are
alike."""


@triton.constexpr_function
def quantizes(dtype):
    """Whether rows of this type have scales."""
    return dtype.name in _LARGEST


@triton.constexpr_function
def largest_of(dtype):
    return _LARGEST[dtype.name]


@triton.jit
def load_turned(
    rows, i_batch, i_head, o_rows, m_rows, o_places, rotary,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of one head, float32, turned by the angles of `o_places`: see `flashtile.kvcache.turned`."""
    o_columns = tl.arange(0, BLOCK)
    pointers = row_pointers(rows, i_batch, i_head, 0, o_rows, BLOCK)
    b_rows = tl.load(pointers, mask=m_rows[:, None] & (o_columns < DIM)[None, :], other=0.0).to(tl.float32)
    if rotary is not None:
        if INTERLEAVED:
            m_first = o_columns % 2 == 0
            o_other = tl.where(m_first, o_columns + 1, o_columns - 1)
            o_angles = o_columns // 2
        else:
            m_first = o_columns < HALF
            o_other = tl.where(m_first, o_columns + HALF, o_columns - HALF)
            o_angles = tl.where(m_first, o_columns, o_columns - HALF)
        m_turned = m_rows[:, None] & (o_columns < 2 * HALF)[None, :]
        b_other = tl.load(pointers + (o_other - o_columns)[None, :], mask=m_turned, other=0.0).to(tl.float32)
        o_places = o_places.to(tl.int64)[:, None]
        b_cos = tl.load(rotary.cos + o_places * rotary.cos_row + o_angles[None, :], mask=m_turned, other=1.0)
        b_sin = tl.load(rotary.sin + o_places * rotary.sin_row + o_angles[None, :], mask=m_turned, other=0.0)
        b_sin = tl.where(m_first[None, :], -b_sin.to(tl.float32), b_sin.to(tl.float32))
        b_rows = b_rows * b_cos.to(tl.float32) + b_other * b_sin
    return b_rows


@triton.jit
def append_kernel(
    k, v, k_cache, v_cache, q, turned, cache, k_scale, v_scale, rotary, size, heads_kv,
    TILE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, MOVING: tl.constexpr, PAGE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """New rows go behind those that a sequence has, a key head a program; with `rotary` the programs behind those turn
    the queries, a head each. MOVING: each query by its own place, or all by that of the first new row. EARLY: the next
    kernel's programs may begin, and wait (see `wait_for_kernel`)."""
    let_next_begin(EARLY)
    i_batch, i_head, i_tile = program_of(size)
    i_row, _, seqlen = sequence_of(cache, i_batch)
    o_rows = i_tile * TILE + tl.arange(0, TILE)
    o_places = seqlen + o_rows
    if i_head < number_of(heads_kv):
        # A sequence that has grown too long gets no row beyond its end, nor a negative place.
        m_rows = (o_rows < number_of(cache.appended)) & (o_places >= 0) & (o_places < number_of(size.seqlen_k))
        b_k = load_turned(k, i_batch, i_head, o_rows, m_rows, o_places, rotary, DIM, BLOCK, HALF, INTERLEAVED)
        b_v = load_turned(v, i_batch, i_head, o_rows, m_rows, o_places, None, DIM_V, BLOCK_V, 0, False)
        b_k = b_k.to(k.pointer.dtype.element_ty)
        store_new(k_cache, k_scale, cache, i_row, i_head, o_places, m_rows, b_k, DIM, BLOCK, PAGE)
        store_new(v_cache, v_scale, cache, i_row, i_head, o_places, m_rows, b_v, DIM_V, BLOCK_V, PAGE)
    elif rotary is not None:
        i_head -= number_of(heads_kv)
        # Of more queries than new rows the last ones have places behind all rows, and there are angles for them.
        beyond = tl.maximum(number_of(size.seqlen_q) - number_of(cache.appended), 0)
        if not MOVING:
            o_places, beyond = seqlen + o_rows * 0, 0
        m_rows = (o_rows < number_of(size.seqlen_q)) & (o_places >= 0) & (o_places < number_of(size.seqlen_k) + beyond)
        b_q = load_turned(q, i_batch, i_head, o_rows, m_rows, o_places, rotary, DIM, BLOCK, HALF, INTERLEAVED)
        p_q = row_pointers(turned, i_batch, i_head, 0, o_rows, BLOCK)
        m_q = (o_rows < number_of(size.seqlen_q))[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]
        tl.store(p_q, b_q.to(turned.pointer.dtype.element_ty), mask=m_q)


@triton.jit
def program_of_part(size, parts):
    """(batch entry, key head, query tile, part): query tiles run fastest, then heads."""
    i_program = tl.program_id(0)
    tiles, heads, splits = number_of(size.tiles), number_of(size.heads), number_of(parts.splits)
    i_rank = i_program // (tiles * heads)
    return i_rank // splits, (i_program // tiles) % heads, i_program % tiles, i_rank % splits


@triton.jit
def cached_place(cache, size, i_batch, i_tile, i_head):
    """(the `Place` of a tile; the sequence's row of the cache or of the block table). i_head: of the whole tile, or one
    for each row of its scores."""
    i_row, first, seqlen = sequence_of(cache, i_batch)
    # A sequence that has grown too long is cut off: nothing behind the cache is read.
    seqlen_k = tl.minimum(seqlen + number_of(cache.appended), number_of(size.seqlen_k)) - first
    seqlen_k = tl.maximum(seqlen_k, 0)
    return Place(i_batch, i_head, i_tile, 0, first, number_of(size.seqlen_q), seqlen_k), i_row


@triton.jit
def part_of(parts, i_part, begin, end):
    """The tiles of a part out of [begin, end), perhaps none."""
    if parts.tiles is None:
        tiles = (end - begin + number_of(parts.splits) - 1) // number_of(parts.splits)
        first = begin + i_part * tiles
    else:
        tiles = number_of(parts.tiles)
        first = i_part * tiles
    return tl.maximum(begin, first), tl.minimum(end, first + tiles)
