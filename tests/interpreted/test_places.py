"""Which tiles a window leaves."""

import random

import torch
import triton
import triton.language as tl

from flashtile.kernels.places import span

TILE = 16


@triton.jit
def spans_kernel(numbers, found, TILE: tl.constexpr):
    at = numbers + tl.program_id(0) * 5
    tiles = span(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), TILE)
    for place in tl.static_range(4):
        tl.store(found + tl.program_id(0) * 4 + place, tiles[place])


def test_a_span_has_the_tiles_of_its_hull() -> None:
    """An empty hull has none, wherever it lies."""
    draw = random.Random(0)
    numbers = []
    for _ in range(200):
        length = draw.randrange(1, 100)
        begin, end = draw.randrange(0, 120), draw.randrange(-20, length + 1)
        numbers.append([begin, end, begin + draw.randrange(20), end - draw.randrange(20), length])
    found = torch.full((len(numbers), 4), -1, dtype=torch.int32)
    spans_kernel[(len(numbers),)](torch.tensor(numbers, dtype=torch.int32), found, TILE)
    assert any(end <= begin < -(-end // TILE) * TILE for begin, end, *_ in numbers)
    for (begin, end, all_begin, all_end, length), tiles in zip(numbers, found.tolist(), strict=True):
        first, full_begin, full_end, last = tiles
        expected = range(begin // TILE, -(-end // TILE)) if begin < end else range(0)
        assert list(range(first, last)) == list(expected)
        assert first <= full_begin <= full_end <= max(first, last)
        for tile in range(full_begin, full_end):
            assert all_begin <= tile * TILE
            assert (tile + 1) * TILE <= min(all_end, length)
