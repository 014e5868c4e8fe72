"""Queries and keys in shared memory, in strips of their columns.

Triton's tiles have powers of two, so heads of 129 to 192 columns would be padded to 256 and cost a third more. They lie
in three strips of 64 columns, one behind the other: a product that sums over columns is a chain of products that add to
the same sums, one that has columns is three side by side. Other heads are one strip. The copy engine moves 64 columns
of 16 bits at a time in any case.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashtile.backends.hopper.compat import gl, tma_load
from flashtile.backends.hopper.memory import first_rows, hand_over


@gluon.jit
def strip_of(smem, i):
    """The i-th of all strips, as rows and columns."""
    TILE: gl.constexpr = smem.shape[2]
    WIDTH: gl.constexpr = smem.shape[4]
    return smem.index(i).reshape([TILE, WIDTH])


@gluon.jit
def strips_of(smem, slot, STRIPS: gl.constexpr):
    """Those of a slot."""
    if STRIPS == 1:
        return (strip_of(smem, slot),)
    else:
        return (strip_of(smem, 3 * slot), strip_of(smem, 3 * slot + 1), strip_of(smem, 3 * slot + 2))


@gluon.jit
def load_strips(desc, where, full, smem, slot, STRIPS: gl.constexpr):
    """Asks the copy engine for the rows of a slot; where: (batch entry, row, head)."""
    WIDTH: gl.constexpr = smem.shape[4]
    for i in gl.static_range(STRIPS):
        tma_load(desc, [where[0], where[1], where[2], i * WIDTH], full, smem.index(slot * STRIPS + i))


@gluon.jit
def multiply_rows(left, right, layout: gl.constexpr, STRIPS: gl.constexpr):
    """Starts left right^T, strip by strip, in an accumulator of this layout."""
    LEFT: gl.constexpr = left[0].shape[0]
    RIGHT: gl.constexpr = right[0].shape[0]
    token = gl.zeros([LEFT, RIGHT], gl.float32, layout)
    for i in gl.static_range(STRIPS):
        token = warpgroup_mma(left[i], right[i].permute((1, 0)), token, use_acc=i > 0, is_async=True)
    return token


@gluon.jit
def zero_strips(layout: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, STRIPS: gl.constexpr):
    """Sums for `multiply_columns`."""
    if STRIPS == 1:
        return (gl.zeros([ROWS, WIDTH], gl.float32, layout),)
    else:
        b_zeros = gl.zeros([ROWS, WIDTH], gl.float32, layout)
        return (b_zeros, b_zeros, b_zeros)


@gluon.jit
def multiply_columns(b_left, right, b_sums, STRIPS: gl.constexpr):
    """Starts sums += left right, a product a strip."""
    if STRIPS == 1:
        return (warpgroup_mma(b_left, right[0], b_sums[0], is_async=True),)
    else:
        first = warpgroup_mma(b_left, right[0], b_sums[0], is_async=True)
        second = warpgroup_mma(b_left, right[1], b_sums[1], is_async=True)
        return (first, second, warpgroup_mma(b_left, right[2], b_sums[2], is_async=True))


@gluon.jit
def await_columns(tokens, STRIPS: gl.constexpr):
    """The sums, once no product is under way."""
    if STRIPS == 1:
        return (warpgroup_mma_wait(0, [tokens[0]]),)
    else:
        return warpgroup_mma_wait(0, [tokens[0], tokens[1], tokens[2]])


@gluon.jit
def store_strips(
    desc, rows, smem, slot, b_strips, scale, place, first, origin, length, DIM: gl.constexpr, META: gl.constexpr
):  # fmt: skip
    """64 rows of the gradients of queries or keys leave, multiplied with `scale`, through the memory of a slot; see
    `memory.hand_over`."""
    STRIPS: gl.constexpr = META.strips
    for i in gl.static_range(STRIPS):
        strip = first_rows(smem.index(slot * STRIPS + i), desc)
        hand_over(
            desc, rows, strip, b_strips[i] * scale, place, first, origin, length, i * META.strip, DIM, META.packed
        )
