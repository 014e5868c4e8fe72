"""8-bit keys of a cache as the 16-bit numbers that the latent kernel multiplies: from slots that the copy engine fills
into those that the products read. Eight bits are exact in float16, and converted to it by one instruction for two.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.backends.hopper.compat import gl, mbarrier
from flashtile.backends.hopper.latent_memory import COLUMNS, slot_of
from flashtile.backends.hopper.memory import by_rows
from flashtile.kernels.tiles import narrowed, power_of_rows

HALF = gl.constexpr(256)

PIECE = gl.constexpr(8)
"""Rows at a time: there are few registers beside the output."""

PIECES = gl.constexpr(64)
"""Columns of queries at a time."""


@gluon.jit
def widen_rows(narrow, wide):
    """Rows of shared memory, in other numbers."""
    COUNT: gl.constexpr = narrow.shape[0]
    layout: gl.constexpr = by_rows(narrow.shape[1])
    for row in gl.static_range(0, COUNT, PIECE):
        b_rows = narrow.slice(row, PIECE, dim=0).load(layout)
        wide.slice(row, PIECE, dim=0).store(b_rows.to(wide.dtype))


@gluon.jit
def widen_values(i_step, memory, barriers, arriving, META: gl.constexpr, I_HALF: gl.constexpr):
    """Those columns of a step's keys that a warpgroup multiplies as values."""
    TILE_KV: gl.constexpr = META.tile_kv
    slot, _filled = slot_of(i_step, META)
    source = i_step % META.narrow
    mbarrier.wait(arriving.full.index(source), (i_step // META.narrow) & 1)
    narrow = arriving.keys.index(source).reshape([TILE_KV, COLUMNS]).slice(I_HALF * HALF, HALF, dim=1)
    widen_rows(narrow, memory.keys.index(slot).reshape([TILE_KV, COLUMNS]).slice(I_HALF * HALF, HALF, dim=1))
    fence_async_shared()
    mbarrier.arrive(barriers.full.index(slot), count=1)


@gluon.jit
def widen_rest(i_step, memory, barriers, arriving, META: gl.constexpr, I_HALF: gl.constexpr):
    """A warpgroup's half of the rows of the last columns of a step's keys."""
    TILE_KV: gl.constexpr = META.tile_kv
    COUNT: gl.constexpr = TILE_KV // 2
    REST: gl.constexpr = memory.rest.shape[3]
    source = i_step % META.narrow
    mbarrier.wait(arriving.full.index(source), (i_step // META.narrow) & 1)
    narrow = arriving.rest.index(source).reshape([TILE_KV, REST]).slice(I_HALF * COUNT, COUNT, dim=0)
    widen_rows(narrow, memory.rest.reshape([TILE_KV, REST]).slice(I_HALF * COUNT, COUNT, dim=0))
    fence_async_shared()
    mbarrier.arrive(barriers.rest_full, count=1)


@gluon.jit
def narrow_queries(smem, rest_smem, scores: gl.constexpr):
    """Queries of bfloat16 become float16 where they lie, divided by a power of two a row, which is returned."""
    REST: gl.constexpr = rest_smem.shape[1]
    b_bits = power_of_rows(rest_smem.slice(0, PIECES, dim=1).load(by_rows(PIECES)))
    for column in gl.static_range(PIECES, REST, PIECES):
        b_bits = gl.maximum(b_bits, power_of_rows(rest_smem.slice(column, PIECES, dim=1).load(by_rows(PIECES))))
    for column in gl.static_range(0, COLUMNS, PIECES):
        b_bits = gl.maximum(b_bits, power_of_rows(smem.slice(column, PIECES, dim=1).load(by_rows(PIECES))))
    for column in gl.static_range(0, COLUMNS, PIECES):
        narrow_piece(smem.slice(column, PIECES, dim=1), b_bits)
    for column in gl.static_range(0, REST, PIECES):
        narrow_piece(rest_smem.slice(column, PIECES, dim=1), b_bits)
    return gl.convert_layout(b_bits.to(gl.float32, bitcast=True), gl.SliceLayout(1, scores))


@gluon.jit
def narrow_piece(smem, b_bits):
    b_rows = narrowed(smem.load(by_rows(smem.shape[1])), b_bits)
    # The same memory holds as many bits of another type.
    smem.store(b_rows.to(gl.int16, bitcast=True).to(smem.dtype, bitcast=True))


@gluon.jit
def unit_of_rows(b_unit):
    """One number, or one for each row, to multiply scores with."""
    if len(b_unit.shape) == 1:
        b_unit = b_unit[:, None]
    return b_unit
