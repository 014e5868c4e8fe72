"""What the Hopper kernels work out for a tile of scores as it lies in registers: bits of a window, and distances."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.bits import cut_window
from flashtile.backends.hopper.distances import distances_of
from flashtile.backends.hopper.softmax import ROWS
from flashtile.kernels.arguments import odd
from flashtile.kernels.words import Place, Window
from tests.emulated.hopper import Emulated
from tools.ptx_emulation import SWEEP


@dataclass(frozen=True)
class Known:
    """Of `Meta`, what the kernel below reads."""

    tile_q: int
    tile_kv: int
    left: bool
    right: bool
    window_top_left: bool = False
    alibi_top_left: bool = False
    aligned: int = 1


@gluon.jit
def tile_kernel(hidden, apart, aligned, first_row, first_column, place, window, META: gl.constexpr, KEYS: gl.constexpr):
    COLUMNS: gl.constexpr = META.tile_q if KEYS else META.tile_kv
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    o_rows = gl.arange(0, ROWS, gl.SliceLayout(1, scores))[:, None]
    o_tile = o_rows * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, scores))[None, :]
    b_zeros = gl.zeros([ROWS, COLUMNS], gl.float32, scores)
    gl.store(hidden + o_tile, cut_window(b_zeros, True, first_row, first_column, place, window, META, KEYS))
    b_apart, b_aligned = distances_of(first_row, first_column, place, scores, META, KEYS)
    gl.store(apart + o_tile, b_apart)
    gl.store(aligned + o_tile, b_aligned)


def _run(
    first: tuple[int, int],
    lengths: tuple[int, int],
    window: tuple[int | None, int | None],
    columns: int,
    keys: bool,
    aligned: int = 1,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[scores of 0 that are -inf where hidden, query less key, the same aligned], queries and keys of the tile.

    first: query and key; keys: rows are keys.
    """
    found = [torch.full((ROWS.value, columns), 777.0) for _ in range(3)]
    place = Place(0, 0, 0, 0, 0, *lengths)
    limits = Window(*(None if limit is None else odd(limit) for limit in window))
    known = Known(columns, columns, *(limit is not None for limit in window), aligned=aligned)
    device = Emulated(SWEEP[0])
    first = first[::-1] if keys else first
    arguments = [*found, *first, place, limits, known, keys]
    device.machine.launch(tile_kernel, 1, arguments, {"num_warps": 4})
    assert device.complaints == []
    o_rows, o_columns = first[0] + torch.arange(ROWS.value)[:, None], first[1] + torch.arange(columns)[None, :]
    return found, *((o_columns, o_rows) if keys else (o_rows, o_columns))


@pytest.mark.parametrize(("columns", "keys"), [(32, False), (128, False), (64, True)])
@pytest.mark.parametrize(
    ("window", "lengths", "first"),
    [
        ((None, None), (300, 301), (256, 192)),
        ((None, 0), (300, 300), (128, 128)),
        ((None, 5), (200, 333), (64, 128)),
        ((37, 0), (450, 400), (192, 128)),
        ((3, -1), (300, 300), (128, 128)),
        ((100, None), (300, 250), (192, 64)),
        ((10, 20), (90, 1000), (0, 896)),
    ],
)
def test_what_a_window_leaves(window: Any, lengths: Any, first: Any, columns: int, keys: bool) -> None:
    """Against the definition, for tiles that windows and lengths cut anywhere."""
    _compare(_run(first, lengths, window, columns, keys), window, lengths)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (70, 0)])
@pytest.mark.parametrize(("aligned", "first"), [(16, (0, -5)), (128, (0, -127)), (128, (0, -1))])
def test_what_a_window_leaves_of_a_tile_that_begins_in_front(window: Any, aligned: int, first: Any) -> None:
    """Of a sequence, as tiles of packed keys of 8 bits do."""
    lengths = (150, 160)
    _compare(_run(first, lengths, window, 128, False, aligned), window, lengths)


def _compare(found: tuple[list[Tensor], Tensor, Tensor], window: Any, lengths: tuple[int, int]) -> None:
    (hidden, *_), query, key = found
    left, right = window
    aligned = query + lengths[1] - lengths[0]
    seen = (query < lengths[0]) & (key >= 0) & (key < lengths[1])
    seen &= (key >= aligned - left) if left is not None else True
    seen &= (key <= aligned + right) if right is not None else True
    assert torch.equal(hidden, torch.where(seen, 0.0, -torch.inf))
    assert seen.any()


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("first", [(0, 0), (64, 4096), (2**24 - 80, 0), (0, 2**24 - 80), (2**30, 2**30 + 64)])
def test_distances_are_exact(first: tuple[int, int], keys: bool) -> None:
    """Up to 2^24, wherever the two lie: positions of longer sequences are no whole numbers of float32."""
    (_, apart, aligned), query, key = _run(first, (100, 107), (None, None), 64, keys)
    assert torch.equal(apart.double(), (query - key).double())
    assert torch.equal(aligned.double(), (query + 7 - key).double())
