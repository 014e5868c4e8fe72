"""What comes before and after the backward kernel: one pass over memory each."""

import triton
import triton.language as tl

from flashtile.backends.hopper.sums import clear_tile, load_tile
from flashtile.kernels.places import locate, number_pointers
from flashtile.kernels.tiles import load_queries, store_rows


@triton.jit
def before_kernel(out, grad_out, grad_lse, delta, sums, packing, size, META: tl.constexpr):
    """delta = rowsum(dO * O) - dlse, and zeros in the float32 memory where dQ is summed; a query tile a program."""
    TILE: tl.constexpr = META.tile_q
    place = locate(packing, size, None, TILE, False, False, False)
    o_query = place.tile * TILE + tl.arange(0, TILE)
    b_out = load_queries(out, place, o_query, META.headdim_v, META.block_dv)
    b_grad = load_queries(grad_out, place, o_query, META.headdim_v, META.block_dv)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(number_pointers(grad_lse, place, o_query), mask=o_query < place.seqlen_q, other=0.0)
    tl.store(number_pointers(delta, place, o_query), b_delta, mask=o_query < place.seqlen_q)
    if sums is not None:
        clear_tile(sums, TILE, META.block_d)


@triton.jit
def after_kernel(sums, dq, scale, packing, size, META: tl.constexpr):
    """dQ from its sums; a query tile a program."""
    TILE: tl.constexpr = META.tile_q
    place = locate(packing, size, None, TILE, False, False, False)
    o_query = place.tile * TILE + tl.arange(0, TILE)
    b_dq = load_tile(sums, TILE, META.block_d) * scale
    store_rows(dq, place.batch, place.head, place.first_q, o_query, place.seqlen_q, b_dq, META.headdim, META.block_d)
