"""Tile sizes for the PyTorch backend's sweep."""

from typing import NamedTuple


class SweepConfig(NamedTuple):
    """Masks are lowered to tiles of tile_q x tile_kv; a run of tiles is walked `step_kv` keys at a time.

    Scores of `pairs` (batch, head) pairs, tile_q x step_kv each, are held at once.
    """

    tile_q: int
    tile_kv: int
    step_kv: int
    pairs: int


# Largest seqlen_kv of the row -> (tile_q, tile_kv, step_kv). Fine key tiles follow a mask closely; wide steps amortise
# the cost of a PyTorch call. Very long sequences take coarser tiles, so that the lists of tiles stay short.
TILES = (
    (16384, 128, 64, 512),
    (65536, 128, 128, 512),
    (2**62, 256, 256, 512),
)

SCORES_HELD = 2**19
"""Scores held at once: 2 MB in float32, so that a tile's exponentials stay in the cores' second-level caches."""


def sweep_config(seqlen_q: int, seqlen_kv: int) -> SweepConfig:
    """The row of `TILES` for this length, cut to the problem, and how many (batch, head) pairs share a pass."""
    tile_q, tile_kv, step_kv = next(row[1:] for row in TILES if seqlen_kv <= row[0])
    held = max(1, min(tile_q, seqlen_q) * min(step_kv, seqlen_kv))
    return SweepConfig(tile_q, tile_kv, step_kv, max(1, SCORES_HELD // held))
