"""Shared memory: its barriers, rows that leave it without the copy engine, and rows that must not be seen."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.backends.hopper.compat import gl, mbarrier, tma_store, view_as
from flashtile.backends.hopper.softmax import ROWS


@gluon.jit
def new_barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """One mbarrier a slot."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@triton.constexpr_function
def _named(verb, threads):
    return f"bar.{verb} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def await_all(number, THREADS: gl.constexpr):
    """Waits at a named barrier of the hardware until so many threads have come, those that only `report` too. An
    mbarrier would take one of those before a warpgroup arrives, one after, and a loop."""
    TEXT: gl.constexpr = _named("sync", THREADS)
    gl.inline_asm_elementwise(TEXT, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def report(number, THREADS: gl.constexpr):
    """Comes to a named barrier and does not wait."""
    TEXT: gl.constexpr = _named("arrive", THREADS)
    gl.inline_asm_elementwise(TEXT, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


MEETING = gl.constexpr(4)
TOLD = gl.constexpr(5)
ADDED = gl.constexpr(9)
HANDED = gl.constexpr(11)
FREED = gl.constexpr(13)
KEYS_FREED = gl.constexpr(5)
VALUES_FREED = gl.constexpr(9)
_FIRST_TURN = gl.constexpr(13)
"""Of the 16 named barriers of a program, those that no warps of Triton's use. The backward kernel's: where math
warpgroups meet; for dQ, see `adding`; one a slot of the ring. Of kernels that walk over keys: one a slot of keys, one a
slot of values; turns."""

BOTH = gl.constexpr(256)
"""Threads of two math warpgroups."""

ONE_AND_ONE = gl.constexpr(160)
"""Threads of a math warpgroup and a warp."""


@gluon.jit
def slot_of(count, STAGES: gl.constexpr):
    """The slot of a ring that a step of the backward kernel has. For a power of two it is found without the care that a
    remainder takes of negative numbers, and so in uniform registers. (The forward kernels were slower with that.)"""
    return count & (STAGES - 1) if STAGES & (STAGES - 1) == 0 else count % STAGES


@gluon.jit
def turn_of(count, STAGES: gl.constexpr):
    """The parity of that slot's mbarrier once it is filled for the step."""
    return (count >> (STAGES.bit_length() - 1)) & 1 if STAGES & (STAGES - 1) == 0 else (count // STAGES) & 1


@triton.constexpr_function
def slot_threads(consumers):
    """Who comes to the barrier of a slot: math warpgroups that have read it, and the warp that fills it."""
    return 128 * consumers + 32


@gluon.jit
def free_slot(FIRST: gl.constexpr, count, STAGES: gl.constexpr, META: gl.constexpr):
    """This side has read the slot of a step."""
    report(FIRST + count % STAGES, slot_threads(META.consumers))


@gluon.jit
def await_slot(FIRST: gl.constexpr, count, STAGES: gl.constexpr, META: gl.constexpr):
    """Until step `count` - `STAGES` is over, on all sides."""
    # Else slots would share barriers with something else.
    gl.static_assert(STAGES <= 4 and FIRST + STAGES <= 16)
    if count >= STAGES:
        await_all(FIRST + count % STAGES, slot_threads(META.consumers))


@gluon.jit
def meet():
    """Two math warpgroups wait for each other."""
    await_all(MEETING, BOTH)


@gluon.jit
def take_turn(I_GROUP: gl.constexpr, CONSUMERS: gl.constexpr):
    """Waits until the warpgroup before has passed its turn (FlashAttention-3, section 3.1)."""
    await_all(_FIRST_TURN + I_GROUP % CONSUMERS, BOTH)


@gluon.jit
def pass_turn(I_GROUP: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets the next warpgroup start its products, behind this one's."""
    report(_FIRST_TURN + (I_GROUP + 1) % CONSUMERS, BOTH)


@triton.constexpr_function
def by_rows(columns):
    """How a warpgroup reads and writes rows of 16 bits, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def store_rows(rows, smem, first, count, i_head, FIRST: gl.constexpr, DIM: gl.constexpr):
    """The first `count` of 64 rows of a packed tensor, from shared memory, 16 bytes a thread; columns from FIRST on."""
    BLOCK: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = by_rows(BLOCK)
    o_rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_columns = FIRST + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    pointers = rows.pointer + i_head.to(gl.int64) * rows.head
    pointers = pointers + (first + o_rows).to(gl.int64)[:, None] * rows.row + o_columns[None, :]
    gl.store(pointers, smem.load(layout), mask=(o_rows < count)[:, None] & (o_columns < DIM)[None, :])


@gluon.jit
def hand_over(
    desc, rows, smem, b_rows, place, first, origin, length, FIRST: gl.constexpr, DIM: gl.constexpr, PACKED: gl.constexpr
):  # fmt: skip
    """Puts 64 rows, columns from FIRST on, into shared memory, which was read empty before; the copy engine takes them
    from there and leaves out those beyond the sequence of `length` rows.

    Behind a packed sequence, which begins at row `origin`, lies another one, so there the warps write for themselves.
    """
    b_memory = smem.reshape([ROWS, smem.shape[3]])
    b_memory.store(b_rows.to(smem.dtype))
    if PACKED:
        store_rows(rows, b_memory, origin + first, length - first, place.head, FIRST, DIM)
    else:
        fence_async_shared()
        tma_store(desc, [place.batch, first, place.head, FIRST], smem)


@gluon.jit
def first_rows(smem, desc):
    """The first 64 rows of a tile in shared memory, for `hand_over` with this descriptor."""
    TILE: gl.constexpr = smem.shape[1] // ROWS
    BLOCK: gl.constexpr = smem.shape[3]
    return view_as(smem, smem.dtype, [TILE, 1, ROWS, 1, BLOCK], desc.layout).index(0)


@gluon.jit
def store_wide(rows, b_rows, place, first, DIM: gl.constexpr):
    """64 rows leave as float32, straight from registers: shared memory has no room for them."""
    TILE: gl.constexpr = b_rows.type.layout
    o_rows = gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    o_columns = gl.arange(0, b_rows.shape[1], gl.SliceLayout(0, TILE))
    base = rows.pointer + place.batch.to(gl.int64) * rows.batch + place.head.to(gl.int64) * rows.head
    row_pointers = base + (place.first_q + first + o_rows).to(gl.int64) * rows.row
    mask = (o_rows < place.seqlen_q - first)[:, None] & (o_columns < DIM)[None, :]
    gl.store(row_pointers[:, None] + o_columns[None, :], b_rows, mask=mask)


@triton.constexpr_function
def _exponents(dtype):
    """(the bits of the exponents of two numbers of 16 bits, the lowest of each)."""
    return (0x7F807F80, 0x00800080) if dtype == gl.bfloat16 else (0x7C007C00, 0x04000400)


NO_SIGNS = gl.constexpr("{ .reg .b32 signs; prmt.b32 signs, $1, $1, 0xBB99; not.b32 $0, signs; }")
"""All bits of each half whose sign is not set."""


@gluon.jit
def without_nan(smem, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Puts zeros where COUNT rows of a tile (.., rows, 1, columns), from FIRST on, hold what is no finite number, for a
    weight of 0 does not stop that. Rows of queries that saw such a key need no care: their log-sum-exp or delta is NaN.

    Two numbers of 16 bits at a time: an exponent of ones that is added one carries into the sign. To look first and
    write only if need be takes longer: warps must agree, and behind that ptxas keeps the addresses of products, which
    lie in uniform registers otherwise, in those of threads, too few.
    """
    TILE: gl.constexpr = smem.shape[smem.rank - 3]
    BLOCK: gl.constexpr = smem.shape[smem.rank - 1]
    EXPONENTS: gl.constexpr = _exponents(smem.dtype)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [256 // BLOCK, BLOCK // 8], [4, 1], [1, 0])
    rows = view_as(smem, gl.int32, [1, TILE, 1, BLOCK // 2], pairs).reshape([TILE, BLOCK // 2])
    rows = rows.slice(FIRST, COUNT, dim=0)
    b_pairs = rows.load(layout)
    b_signs = (b_pairs & EXPONENTS[0]) + EXPONENTS[1]
    b_finite = gl.inline_asm_elementwise(NO_SIGNS, "=r,r", [b_signs], dtype=gl.int32, is_pure=True, pack=1)
    rows.store(b_pairs & b_finite)
    fence_async_shared()


@gluon.jit
def without_rows(smem, count):
    """Puts zeros behind the first `count` rows of shared memory: there begins another packed sequence, or nothing."""
    BLOCK: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = by_rows(BLOCK)
    o_rows = gl.arange(0, smem.shape[0], gl.SliceLayout(1, layout))
    b_rows = smem.load(layout)
    smem.store(gl.where((o_rows < count)[:, None], b_rows, gl.zeros_like(b_rows)))
    fence_async_shared()


@gluon.jit
def clear_half(strips, b_other, left, I_GROUP: gl.constexpr, STRIPS: gl.constexpr):
    """Of a packed sequence's last tiles, which both warpgroups read: each puts zeros behind the end in its half."""
    HALF: gl.constexpr = b_other.shape[0] // 2
    for i in gl.static_range(STRIPS):
        without_rows(strips[i].slice(I_GROUP * HALF, HALF, dim=0), left - I_GROUP * HALF)
    without_rows(b_other.slice(I_GROUP * HALF, HALF, dim=0), left - I_GROUP * HALF)
    meet()
