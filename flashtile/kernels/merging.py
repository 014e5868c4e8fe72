"""Two States become one, in one pass over memory (see `flashtile.state.merge`)."""

import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.places import number_of
from flashtile.kernels.tape import current
from flashtile.kernels.words import odd

TILE = 16
"""Rows of a program."""


@triton.jit
def merge_kernel(
    held, held_lse, out, lse, sizes, held_strides, held_lse_strides, out_strides, lse_strides,
    TILE: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some rows of a head of a batch entry. sizes: tiles, rows, heads, width; strides: batch, row, head, and of the
    log-sum-exps batch, head. All `odd` but the strides of tiles: those are multiples of 16, and loads long for it."""
    i_program = tl.program_id(0)
    tiles, heads = number_of(sizes[0]), number_of(sizes[2])
    i_batch = (i_program // (tiles * heads)).to(tl.int64)
    i_head = ((i_program // tiles) % heads).to(tl.int64)
    o_rows = (i_program % tiles) * TILE + tl.arange(0, TILE)
    o_columns = tl.arange(0, WIDTH)
    m_rows = o_rows < number_of(sizes[1])
    m_tile = m_rows[:, None] & (o_columns < WIDTH if WHOLE else o_columns < number_of(sizes[3]))[None, :]
    p_held_lse = held_lse + i_batch * number_of(held_lse_strides[0]) + i_head * number_of(held_lse_strides[1]) + o_rows
    p_lse = lse + i_batch * number_of(lse_strides[0]) + i_head * number_of(lse_strides[1]) + o_rows
    p_held = held + i_batch * held_strides[0] + i_head * held_strides[2]
    p_out = out + i_batch * out_strides[0] + i_head * out_strides[2]
    o_held = o_rows.to(tl.int64)[:, None] * held_strides[1] + o_columns[None, :]
    o_out = o_rows.to(tl.int64)[:, None] * out_strides[1] + o_columns[None, :]

    b_before = tl.load(p_held_lse, mask=m_rows, other=-float("inf"))
    b_after = tl.load(p_lse, mask=m_rows, other=-float("inf"))
    b_highest = tl.maximum(b_before, b_after)
    # Rows that neither has seen: subtract 0 rather than -inf, so that no NaN appears.
    b_base = tl.where(b_highest == -float("inf"), 0.0, b_highest)
    b_left, b_right = tl.exp(b_before - b_base), tl.exp(b_after - b_base)
    b_total = b_left + b_right
    m_unseen = b_total == 0.0
    b_divisor = tl.where(m_unseen, 1.0, b_total)
    b_held = tl.load(p_held + o_held, mask=m_tile, other=0.0).to(tl.float32)
    b_out = tl.load(p_out + o_out, mask=m_tile, other=0.0).to(tl.float32)
    b_merged = b_held * (b_left / b_divisor)[:, None] + b_out * (b_right / b_divisor)[:, None]
    tl.store(p_held + o_held, b_merged.to(held.dtype.element_ty), mask=m_tile)
    tl.store(p_held_lse, tl.where(m_unseen, -float("inf"), b_base + tl.log(b_divisor)), mask=m_rows)


def merge(held: Tensor, held_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merges (out, lse) into (held, held_lse), in place: (batch, rows, heads, width) and float32 (batch, heads, rows),
    any strides but the last, which is 1."""
    batch, rows, heads, width = held.shape
    tiles = triton.cdiv(rows, TILE)
    if held.numel() == 0:
        return
    sizes = tuple(map(odd, (tiles, rows, heads, width)))
    strides = [tensor.stride()[:-1] for tensor in (held, held_lse, out, lse)]
    strides[1], strides[3] = (tuple(map(odd, strides[place])) for place in (1, 3))
    block = triton.next_power_of_2(width)
    with current(held.device):
        merge_kernel[(tiles * heads * batch,)](
            held, held_lse, out, lse, sizes, *strides, TILE=TILE, WIDTH=block, WHOLE=block == width, num_warps=4
        )
