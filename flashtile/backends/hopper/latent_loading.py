"""How queries and keys of the latent kernel come into shared memory, and most of the queries into registers."""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.backends.hopper.compat import gl, mbarrier, tma_load, view_as
from flashtile.backends.hopper.latent_memory import COLUMNS, HELD, query_slots
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.widening import narrow_queries
from flashtile.kernels.caches import table_of


@gluon.jit
def row_of_tile(n, cache, place, i_row, META: gl.constexpr):
    """(row of the cache or page, row in it) where tile n of a sequence begins; no tile lies in two pages."""
    first = n * META.tile_kv
    if META.page:
        found = gl.load(table_of(cache, i_row, 0).pointer + first // META.page)
        entry, row = found.to(gl.int32), first % META.page
    else:
        entry, row = i_row, place.first_k + first
    return entry, row


@gluon.jit
def load_columns(desc, n, FIRST: gl.constexpr, full, smem, cache, place, i_row, META: gl.constexpr):
    """Columns of tile n, from FIRST on."""
    entry, row = row_of_tile(n, cache, place, i_row, META)
    mbarrier.expect(full, desc.block_type.nbytes)
    tma_load(desc, [entry, row, 0, FIRST], full, smem)


@gluon.jit
def load_narrow(desc, rest_desc, n, slot, arriving, cache, place, i_row, META: gl.constexpr):
    """All columns of tile n, which is to be widened."""
    full = arriving.full.index(slot)
    entry, row = row_of_tile(n, cache, place, i_row, META)
    mbarrier.expect(full, desc.block_type.nbytes + rest_desc.block_type.nbytes)
    tma_load(desc, [entry, row, 0, 0], full, arriving.keys.index(slot))
    tma_load(rest_desc, [entry, row, 0, COLUMNS], full, arriving.rest.index(slot))


@gluon.jit
def load_first(descs, begin, end, cache, place, i_row, memory, barriers, arriving, META: gl.constexpr):
    """The queries, where later on tiles of keys lie, and as many of those as there is room for beside."""
    QUERIES: gl.constexpr = query_slots(META)
    STAGES: gl.constexpr = META.stages
    NARROW: gl.constexpr = META.narrow
    q_desc, q_rest_desc, k_desc, k_rest_desc = descs
    first = place.tile * ROWS
    mbarrier.expect(barriers.asked, q_desc.block_type.nbytes + q_rest_desc.block_type.nbytes)
    tma_load(q_desc, [place.batch, first, 0, 0], barriers.asked, first_queries(memory, q_desc.dtype, META))
    tma_load(q_rest_desc, [place.batch, first, 0, HELD], barriers.asked, last_queries(memory, q_desc.dtype))
    if NARROW:
        for slot in gl.static_range(NARROW):
            if begin + slot < end:
                load_narrow(k_desc, k_rest_desc, begin + slot, slot, arriving, cache, place, i_row, META)
    else:
        if begin < end:
            load_columns(k_rest_desc, begin, COLUMNS, barriers.rest_full, memory.rest, cache, place, i_row, META)
        for slot in gl.static_range(QUERIES, STAGES):
            n = begin + slot - QUERIES
            if n < end:
                full, smem = barriers.full.index(slot), memory.keys.index(slot)
                load_columns(k_desc, n, 0, full, smem, cache, place, i_row, META)


@gluon.jit
def first_queries(memory, dtype: gl.constexpr, META: gl.constexpr):
    """The first slots of keys as one tile of 64 rows."""
    TILES: gl.constexpr = memory.keys.shape[0] // query_slots(META)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, ROWS, 1, COLUMNS], dtype)
    return view_as(memory.keys, dtype, [TILES, 1, ROWS, 1, COLUMNS], layout).index(0)


@gluon.jit
def last_queries(memory, dtype: gl.constexpr):
    """The memory of the queries' last columns."""
    LAST: gl.constexpr = memory.queries.shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, ROWS, 1, LAST], dtype)
    return view_as(memory.queries, dtype, [1, ROWS, 1, LAST], layout)


@gluon.jit
def take_queries(memory, barriers, dtype: gl.constexpr, k_scale, META: gl.constexpr):
    """(the first columns of the queries as the left side of products, in registers; what the scores are multiplied
    with). Their slots are free then."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.tile_kv, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    QUERIES: gl.constexpr = query_slots(META)
    mbarrier.wait(barriers.asked, 0)
    b_unit = 1.0
    if META.narrow:
        b_unit = gl.load(k_scale.pointer)
        if dtype == gl.bfloat16:
            last = last_queries(memory, dtype)
            first = first_queries(memory, dtype, META).reshape([ROWS, COLUMNS])
            b_unit *= narrow_queries(first, last.reshape([ROWS, last.shape[3]]), layout)
    held = first_queries(memory, memory.keys.dtype, META).reshape([ROWS, COLUMNS])
    b_first = held.slice(0, 256, dim=1).load(left)
    b_second = held.slice(256, 128, dim=1).load(left)
    b_third = held.slice(384, 64, dim=1).load(left)
    fence_async_shared()
    for slot in gl.static_range(QUERIES):
        # They were there, and are not any more.
        mbarrier.arrive(barriers.full.index(slot), count=2 if META.narrow else 1)
        mbarrier.arrive(barriers.empty.index(slot), count=2)
    return (b_first, b_second, b_third), b_unit
