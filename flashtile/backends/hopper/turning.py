"""Packed values of 8 bits are laid on their side before the forward kernel runs.

The copy engine cannot turn tiles, and `flashtile.fp8.quantize`, which could, leaves packed values as they were. They
come to lie as the values of a batch of one entry do, whatever sequences they belong to.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.hopper.calls import Call
from flashtile.kernels.arguments import memory_for, rows_of
from flashtile.kernels.places import number_of
from flashtile.kernels.turning import store_turned
from flashtile.kernels.words import odd
from flashtile.problem import Problem
from flashtile.scaled import GROUP, KEYS


@triton.jit
def turn_kernel(
    v, turned, column, length,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program some rows of a head. v: `Rows`, packed; turned: (heads, columns, rows to a multiple of GROUP), `column`
    from one column to the next; length: rows, `odd`."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_rows, o_columns = i_block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    rows = number_of(length)
    p_rows = v.pointer + i_head * v.head + o_rows.to(tl.int64)[:, None] * v.row + o_columns[None, :]
    # Zeros behind the last row: what lies there is multiplied.
    b_rows = tl.load(p_rows, mask=(o_rows < rows)[:, None] & (o_columns < DIM)[None, :], other=0.0)
    padded = (rows + GROUP - 1) // GROUP * GROUP
    apart = tl.cast(column, tl.int64)
    store_turned(turned + i_head * DIM * apart, apart, b_rows, i_block * ROWS, padded, DIM, GROUP)


def room_for(v: Tensor, problem: Problem) -> Tensor | None:
    """Memory for values on their side, (1, heads, columns, rows); None: they lie so, or their products want no such."""
    if not problem.packed_eight:
        return None
    rows, heads, columns = v.shape
    return memory_for((1, heads, columns, rows + -rows % GROUP), v.dtype, v.device)


def turn(call: Call, turned: Tensor) -> None:
    """Fills `room_for` the values of a call."""
    v = call.inputs.v
    rows, heads, columns = v.shape
    given: dict[str, Any] = {
        **{"v": rows_of(v), "turned": turned, "column": turned.stride(2), "length": odd(rows)},
        **{"ROWS": KEYS, "DIM": columns, "BLOCK": call.meta.block_dv, "GROUP": GROUP},
    }
    call.launch(turn_kernel, (-(-rows // KEYS), heads, 1), given, num_warps=8)
