"""The float32 memory in which dQ is summed, laid out as the accumulators of a product lie in registers.

A query tile has one or two pieces of 64 x 64, and a piece lies in memory the way a warpgroup holds it: (8 columns,
warp, 8 rows of it, pairs of columns, upper and lower rows, column of a pair). So every thread writes 16 bytes side by
side and the copy engine adds 16 KiB in a row; as rows and columns, the writes would meet in pairs in the banks of
shared memory. Tiles follow each other as the programs of `around` do: (batch entry, head, tile), packed (head,
`places.slots` + tile).
"""

import triton
import triton.language as tl
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.kernels.places import number_of, slots

PIECE_ROWS = gl.constexpr(128)
PIECE_COLUMNS = gl.constexpr(32)
"""A piece, as the copy engine is told of it: what fits its swizzle."""


PIECE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [16, 0], [32, 0], [64, 0]],
        [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]],
        [[4, 0], [8, 0]],
        [],
        [128, 32],
    )
)
"""How a warpgroup holds what `flat_piece` gives."""

PIECE_MEMORY = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
"""A piece in shared memory, for none but warps."""


@triton.constexpr_function
def pieces(tile, block_d):
    """Of a query tile: two, halves of 128 queries or of 128 columns, or one."""
    return tile * block_d // 4096


@gluon.jit
def first_tile(place, packing, size, group: gl.constexpr, META: gl.constexpr):
    """(head, number of its sequence's first tile) of the sums; `size`: that of the keys' heads."""
    if META.packed:
        return place.head, slots(packing.offsets_q, place.batch, META.tile_q)
    return place.batch * number_of(size.heads) * group + place.head, place.tile * 0


@gluon.jit
def flat_piece(b_grad_q):
    """A product of 64 x 64 as its memory: threads keep what they hold."""
    b_parts = b_grad_q.reshape([4, 2, 8, 8, 4, 2])
    return b_parts.permute((3, 0, 2, 4, 1, 5)).reshape([PIECE_ROWS, PIECE_COLUMNS])


@gluon.jit
def whole_piece(b_flat, layout: gl.constexpr):
    """The product of 64 x 64 that lies as `flat_piece` gave it."""
    b_parts = b_flat.reshape([8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
    return gl.convert_layout(b_parts.reshape([64, 64]), layout, assert_trivial=True)


@triton.jit
def clear_tile(sums, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for the query tile of this program."""
    tl.store(_numbers(sums, TILE, BLOCK_D), tl.zeros([TILE * BLOCK_D], tl.float32))


@triton.jit
def load_tile(sums, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The query tile of this program, as rows and columns."""
    PIECES: tl.constexpr = pieces(TILE, BLOCK_D)
    b_parts = tl.load(_numbers(sums, TILE, BLOCK_D)).reshape([PIECES, 8, 4, 8, 4, 2, 2])
    b_pieces = b_parts.permute((0, 2, 5, 3, 1, 4, 6)).reshape([PIECES, 64, 64])
    if TILE == 64:
        b_pieces = b_pieces.permute((1, 0, 2))
    return b_pieces.reshape([TILE, BLOCK_D])


@triton.jit
def _numbers(sums, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    return sums + tl.program_id(0).to(tl.int64) * (TILE * BLOCK_D) + tl.arange(0, TILE * BLOCK_D)
