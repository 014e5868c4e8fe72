"""Rows of 8 bits that become columns: tensor cores take them only along the dimension that is summed."""

import triton
import triton.language as tl


@triton.jit
def store_turned(out, stride_column, b_rows, first, length, DIM: tl.constexpr, GROUP: tl.constexpr):
    """Rows as columns, in each group of 16 key 8 j + 2 t + e at place 4 t + 2 j + e (see `flashtile.scaled`)."""
    ROWS: tl.constexpr = b_rows.shape[0]
    BLOCK: tl.constexpr = b_rows.shape[1]
    b_groups = b_rows.reshape(ROWS // GROUP, 2, 4, 2, BLOCK)
    b_columns = tl.permute(b_groups, (4, 0, 2, 1, 3)).reshape(BLOCK, ROWS)
    o_columns, o_rows = tl.arange(0, BLOCK), first + tl.arange(0, ROWS)
    m_tile = (o_columns < DIM)[:, None] & (o_rows < length)[None, :]
    tl.store(out + o_columns[:, None] * stride_column + o_rows[None, :], b_columns, mask=m_tile)
