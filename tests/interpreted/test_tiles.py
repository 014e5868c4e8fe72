"""Tiles that come through the copy engine."""

import pytest
import torch
import triton
import triton.language as tl

from flashtile.kernels.tiles import load_tile, open_tiles
from flashtile.kernels.words import Rows

DIM, TILE = 16, 8


@triton.jit
def tiles_kernel(rows, bounds, out, DIM: tl.constexpr, TILE: tl.constexpr):
    begin, end, i_tile, zero = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    source = open_tiles(rows, zero, zero, zero, begin, end, DIM, TILE, DIM, True, True)
    o_rows, o_columns = tl.arange(0, TILE), tl.arange(0, DIM)
    tl.store(out + o_rows[:, None] * DIM + o_columns[None, :], load_tile(source, i_tile, DIM, TILE, DIM, True))


@pytest.mark.parametrize(("begin", "end"), [(0, 20), (5, 13), (9, 9), (13, 9), (60, 20), (3, -4)])
def test_rows_outside_are_zeros(begin: int, end: int) -> None:
    """All of them, where the range is empty: a copy engine that is told of no rows stops the kernel."""
    tensor = torch.randn(20, DIM)
    for i_tile in range(3):
        found = torch.full((TILE, DIM), torch.nan)
        bounds = torch.tensor([begin, end, i_tile, 0], dtype=torch.int32)
        tiles_kernel[(1,)](Rows(tensor, 0, DIM, 0), bounds, found, DIM, TILE)
        rows = torch.arange(i_tile * TILE, (i_tile + 1) * TILE)
        inside = (rows >= begin) & (rows < end)
        expected = torch.where(inside[:, None], tensor[rows.clamp(max=19)], 0.0)
        assert torch.equal(found, expected)
