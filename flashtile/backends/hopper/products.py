"""The products of 64 rows with a tile of keys or values, which run asynchronously, and their operands.

Both are started once the tile is there and waited for elsewhere (`warpgroup_mma_wait`), so that work of other units
fits between. The left side of scores lies in shared memory; weights are multiplied from the registers where they were
computed, in the layout that these have already.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from flashtile.backends.hopper.compat import gl, mbarrier
from flashtile.backends.hopper.eight import packed
from flashtile.backends.hopper.strips import multiply_rows, strips_of
from flashtile.backends.hopper.words import from_words, halves_in_words


@gluon.jit
def multiply_scores(queries, k_smem, k_full, count, STRIPS: gl.constexpr, META: gl.constexpr):
    """Starts q k^T with the keys of slot `count`, or dO v^T with values, which lie in so many strips; nothing waits for
    the result yet."""
    STAGES: gl.constexpr = k_smem.shape[0] // STRIPS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.tile_kv, META.depth])
    slot = count % STAGES
    mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
    return multiply_rows(queries, strips_of(k_smem, slot, STRIPS), scores, STRIPS)


@gluon.jit
def multiply_values(b_weights, b_out, v_smem, v_full, count, META: gl.constexpr):
    """Starts out += p v with the values of slot `count`."""
    TILE_KV: gl.constexpr = META.tile_kv
    BLOCK_DV: gl.constexpr = META.block_dv
    slot = count % META.stages
    mbarrier.wait(v_full.index(slot), (count // META.stages) & 1)
    if META.eight:
        b_v = v_smem.index(slot).reshape([BLOCK_DV, TILE_KV]).permute((1, 0))
    else:
        b_v = v_smem.index(slot).reshape([TILE_KV, BLOCK_DV])
    return warpgroup_mma(as_left(b_weights, v_smem.dtype, META), b_v, b_out, is_async=True)


@gluon.jit
def narrowed(b_weights, dtype: gl.constexpr, META: gl.constexpr):
    """Weights in the dtype of values; those of 8 bits in `eight.packed`."""
    if META.eight:
        b_low = packed(b_weights, dtype, META)
    elif META.rows:
        b_low = halves_in_words(b_weights, dtype)
    else:
        b_low = b_weights.to(dtype)
    return b_low


@gluon.jit
def as_left(b_weights, dtype: gl.constexpr, META: gl.constexpr):
    """Narrowed weights as the left side of their product with values, in the registers where they are."""
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, META.block_dv, META.depth])
    left: gl.constexpr = gl.DotOperandLayout(0, output, META.depth // 8)
    if META.eight or META.rows:
        b_left = from_words(b_weights, dtype, left)
    else:
        b_left = gl.convert_layout(b_weights, left, assert_trivial=True)
    return b_left
