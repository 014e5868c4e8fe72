"""dQ in the backward kernel, from dS in shared memory to float32 memory.

dQ = dS^T K needs all keys of a tile: each of two math warpgroups puts its dS into shared memory and multiplies half of
dQ. It multiplies that of the step before, which is there already, so that neither waits for the other. A warp beside
them has the copy engine add each half to memory (`sums`), so that they do not wait for the engine either.

Who waits for whom is told at named barriers of the hardware: of each warpgroup, one where its half has room, one where
it is there, and two, in turn, where the other has read the dS before last and put down its last one.
"""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from flashtile.backends.hopper.compat import gl, tma_add, tma_store_wait
from flashtile.backends.hopper.memory import ADDED, BOTH, HANDED, ONE_AND_ONE, TOLD, await_all, report, slot_of
from flashtile.backends.hopper.schedule import ONE_WARP, key_tile, row_tile, rows_walk
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.strips import strip_of
from flashtile.backends.hopper.sums import PIECE_COLUMNS, PIECE_ROWS, first_tile, flat_piece, pieces
from flashtile.kernels.places import with_head


@gluon.jit
def own_grad(ds_smem, count, I_GROUP: gl.constexpr):
    """Where this warpgroup puts dS of a step."""
    return ds_smem.index(slot_of(count, 2)).slice(I_GROUP * ROWS, ROWS, dim=0)


@gluon.jit
def tell_other(count, I_GROUP: gl.constexpr):
    """What this warpgroup put down is seen by products, and it has read what was put down a step before."""
    report(TOLD + 2 * (1 - I_GROUP) + slot_of(count, 2), BOTH)


@gluon.jit
def await_other(count, I_GROUP: gl.constexpr):
    """Until the other has put down dS of the step before `count` and has read that of two steps before."""
    await_all(TOLD + 2 * I_GROUP + slot_of(count + 1, 2), BOTH)


@gluon.jit
def before_first(ds_smem, I_GROUP: gl.constexpr, META: gl.constexpr):
    """The step before the first one has a dS of zeros."""
    TILE_Q: gl.constexpr = META.tile_q
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    own_grad(ds_smem, 1, I_GROUP).store(gl.zeros([ROWS, TILE_Q], ds_smem.dtype, layout))
    fence_async_shared()
    tell_other(1, I_GROUP)


@gluon.jit
def half_of_grad_q(ds_smem, k_smem, count, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Starts this warpgroup's half of dS^T K of the step before `count`: 64 of 128 queries; of 64 queries, 64 of 128
    columns; or the part of its own keys, where there are no more than 64 of either."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_k = strip_of(k_smem, 0)
    b_grad = ds_smem.index(slot_of(count + 1, 2))
    if META.tile_q == 128:
        b_grad = b_grad.slice(I_GROUP * 64, 64, dim=1)
    elif META.block_d == 128:
        b_k = b_k.slice(I_GROUP * 64, 64, dim=1)
    else:
        b_grad = b_grad.slice(I_GROUP * 64, 64, dim=0)
        b_k = b_k.slice(I_GROUP * 64, 64, dim=0)
    b_zeros = gl.zeros([64, 64], gl.float32, layout)
    return warpgroup_mma(b_grad.permute((1, 0)), b_k, b_zeros, use_acc=False, is_async=True)


@gluon.jit
def hand_over_grad_q(b_grad_q, sums_smem, I_GROUP: gl.constexpr):
    """Gives the half to `adder`. The fence is for this step's dS too."""
    await_all(ADDED + I_GROUP, ONE_AND_ONE)
    sums_smem.index(I_GROUP).reshape([PIECE_ROWS, PIECE_COLUMNS]).store(flat_piece(b_grad_q))
    fence_async_shared()
    report(HANDED + I_GROUP, ONE_AND_ONE)


@gluon.jit
def start_last(memory, count, I_GROUP: gl.constexpr, META: gl.constexpr):
    """Starts the half of dQ of the last step."""
    await_other(count, I_GROUP)
    return half_of_grad_q(memory[6], memory[0], count, I_GROUP, META)


@gluon.jit
def await_half(I_GROUP: gl.constexpr):
    """Says that there is room, and waits for a half; the engine has read the one before by then."""
    tma_store_wait(0)
    report(ADDED + I_GROUP, ONE_AND_ONE)
    await_all(HANDED + I_GROUP, ONE_AND_ONE)


@gluon.jit
def adder(descriptors, memory, call, META: gl.constexpr, I_GROUP: gl.constexpr):
    """The warp that has the copy engine add a warpgroup's halves of dQ, after the one of before the first step."""
    packing, size, rules, visits = call
    shared = key_tile(packing, size, visits, ONE_WARP, META)
    block = memory[7].index(I_GROUP)
    i_piece: gl.constexpr = I_GROUP if pieces(META.tile_q, META.block_d) == 2 else 0
    await_half(I_GROUP)
    for i_member in range(META.group):
        place = with_head(shared, shared.head * META.group + i_member)
        i_head, i_first = first_tile(place, packing, size, META.group, META)
        walk = rows_walk(place, rules.window, visits, META)
        for n in range(walk[1], walk[4]):
            i_row = row_tile(walk, n, META)
            await_half(I_GROUP)
            tma_add(descriptors[4], [i_head, i_first + i_row, i_piece * PIECE_ROWS, 0], block)
    tma_store_wait(0)
