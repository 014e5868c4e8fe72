"""Interval analysis of traced masks: never wrong, and sharp for the masks that people write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashtile import intervals, trace
from flashtile.spans import FULL, MASKED, PARTIAL, Tiling

B, H, SQ, SK = 2, 3, 90, 100


def functions() -> dict[str, tuple[Callable[..., Any], bool]]:
    """name -> (mask_mod, whether every tile's state must be found exactly)."""
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (B, SK)).sort().values
    shuffled = torch.randint(0, 4, (SK,))
    lengths, dense, heights = torch.tensor([20, 70]), torch.rand(SK, SK) > 0.5, torch.randn(SK)
    flags, width = torch.rand(SK) > 0.3, 10
    short, unsigned = ((torch.randint(-128, 128, (SK,)).to(kind)) for kind in (torch.int8, torch.uint8))
    far, strides = torch.randint(-(2**62), 2**62, (SK,)), torch.tensor([1, 7, 16])
    return {
        "causal": (lambda b, h, q, k: q >= k, True),
        "window": (lambda b, h, q, k: (q - k).abs() <= 12, True),
        "two-sided": (lambda b, h, q, k: (q - k <= 12) & (k - q <= 3), True),
        "document": (lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k), True),
        "shuffled document": (lambda b, h, q, k: shuffled[q] == shuffled[k], True),
        "prefix": (lambda b, h, q, k: (q >= k) | (k < lengths[b]), True),
        "by head": (lambda b, h, q, k: torch.where(h == 0, q >= k, q - k < 10), True),
        "not": (lambda b, h, q, k: ~(q < k), True),
        "xor": (lambda b, h, q, k: (q < k) ^ (k > 40), True),
        "clamped": (lambda b, h, q, k: k <= q.clamp(max=50), True),
        "chunks": (lambda b, h, q, k: q // 16 == k // 16, True),
        "key flags": (lambda b, h, q, k: flags[k], True),
        "heights": (lambda b, h, q, k: heights[q] > heights[k], True),
        "nothing": (lambda b, h, q, k: q < 0, True),
        "shifted": (lambda b, h, q, k: (q >> 4) == (k >> 4), True),
        "strides by head": (lambda b, h, q, k: q // strides[h] == k // strides[h], True),
        "cast to int8": (lambda b, h, q, k: (q * 43).to(torch.int8) >= k - 50, False),
        "sums of int8": (lambda b, h, q, k: short[q] + short[k] > 50, False),
        "products of int8": (lambda b, h, q, k: short[q] * short[k] > 0, False),
        "negated int8": (lambda b, h, q, k: -short[q] > short[k], False),
        "differences of uint8": (lambda b, h, q, k: unsigned[q] - unsigned[k] < 100, False),
        "int8 beside a large number": (lambda b, h, q, k: short[q] < 300, False),
        "products beyond int64": (lambda b, h, q, k: far[q] * k > 0, False),
        "reversed, scaled": (lambda b, h, q, k: torch.rsub(q, k, alpha=2) > 0, False),
        "reversed, scaled, a number": (lambda b, h, q, k: torch.rsub(q, 90, alpha=2) > 0, True),
        "low bits": (lambda b, h, q, k: (q & 7) >= (k & 7), False),
        "circle": (lambda b, h, q, k: (q - 40) ** 2 + (k - 50) ** 2 <= 900, False),
        "dilated": (lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k), False),
        "natten": (
            lambda b, h, q, k: ((q // width - k // width).abs() <= 2) & ((q % width - k % width).abs() <= 3),
            False,
        ),
        "dense": (lambda b, h, q, k: dense[q, k] & (q >= k), False),
        "floats": (lambda b, h, q, k: (q.float() / 7).floor() >= k / 9, False),
        "products": (lambda b, h, q, k: (q - 40) * (k - 50) > 300, False),
        "constant": (lambda b, h, q, k: torch.ones((), dtype=torch.bool), False),
    }


def states(function: Callable[..., Any], tile_q: int, tile_kv: int) -> tuple[Tensor, Tensor]:
    """(what the analysis says, what evaluation says), both (batch, heads, query tiles, key tiles)."""
    lifted = trace.lift(function, "mask")
    traced = trace.graph(lifted.key)
    tiling = Tiling(SQ, SK, tile_q, tile_kv, B, H)
    said = intervals.layout(traced, lifted.tensors, tiling.query_rows(), tiling.key_columns(), B, H)
    index = [torch.arange(n) for n in (B, H, SQ, SK)]
    at = [part.view([-1 if d == dim else 1 for d in range(4)]) for dim, part in enumerate(index)]
    allowed = traced.evaluate(None, *at, lifted.tensors).expand(B, H, SQ, SK)
    padded = torch.nn.functional.pad(allowed.int(), (0, -SK % tile_kv, 0, -SQ % tile_q), value=-1)
    tiles = padded.unflatten(3, (-1, tile_kv)).unflatten(2, (-1, tile_q)).transpose(3, 4).flatten(-2)
    some, every = (tiles == 1).any(-1), ~(tiles == 0).any(-1)
    true = torch.where(every, FULL, torch.where(some, PARTIAL, MASKED))
    return said.expand(true.shape), true


@pytest.mark.parametrize("name", functions())
@pytest.mark.parametrize(("tile_q", "tile_kv"), [(16, 16), (32, 8), (64, 50)])
def test_states_are_sound_and_sharp(name: str, tile_q: int, tile_kv: int) -> None:
    function, sharp = functions()[name]
    said, true = states(function, tile_q, tile_kv)
    known = said != PARTIAL
    assert torch.equal(said[known].long(), true[known])
    if sharp:
        assert torch.equal(said.long(), true)


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(-30, 30), st.integers(-3, 3), st.integers(1, 9), st.booleans()
)
def test_random_linear_masks_are_sound(
    tile_q: int, tile_kv: int, offset: int, slope: int, divisor: int, either: bool
) -> None:
    def function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        left, right = q * slope + offset >= k // divisor, (k - q) % (divisor + 1) < divisor
        return left | right if either else left & right

    said, true = states(function, tile_q, tile_kv)
    known = said != PARTIAL
    assert torch.equal(said[known].long(), true[known])


def test_unused_dimensions_stay_one() -> None:
    tiling = Tiling(SQ, SK, 16, 16, B, H)
    lifted = trace.lift(lambda b, h, q, k: q >= k, "mask")
    said = intervals.layout(trace.graph(lifted.key), (), tiling.query_rows(), tiling.key_columns(), B, H)
    assert said.shape[:2] == (1, 1)


def test_too_many_cells_are_evaluated_instead() -> None:
    tiling = Tiling(SQ, SK, 16, 16)
    lifted = trace.lift(lambda b, h, q, k: (q >= k) & (h >= 0), "mask")
    heads = intervals.MOST_CELLS
    said = intervals.layout(trace.graph(lifted.key), (), tiling.query_rows(), tiling.key_columns(), 1, heads)
    assert said.shape[:2] == (1, 1)
    assert (said == PARTIAL).all()
