"""Tile sizes for the PyTorch backend's sweep."""

from typing import NamedTuple


class SweepConfig(NamedTuple):
    """tile_q x tile_kv scores of `heads` (batch, head) pairs are held at once."""

    tile_q: int
    tile_kv: int
    pairs: int


# Largest seqlen_kv of the row -> (tile_q, tile_kv). Longer sequences amortise the cost of one PyTorch call over wider
# tiles; short ones are cut less coarsely, so that masks skip more.
TILES = (
    (1024, 64, 256),
    (4096, 128, 512),
    (2**62, 128, 512),
)

SCORES_HELD = 2**19
"""Scores held at once: 2 MB in float32, so that a tile's exponentials stay in the cores' second-level caches."""


def sweep_config(seqlen_q: int, seqlen_kv: int) -> SweepConfig:
    """The row of `TILES` for this length, cut to the problem, and how many (batch, head) pairs share a pass."""
    tile_q, tile_kv = next(row[1:] for row in TILES if seqlen_kv <= row[0])
    held = max(1, min(tile_q, seqlen_q) * min(tile_kv, seqlen_kv))
    return SweepConfig(tile_q, tile_kv, max(1, SCORES_HELD // held))
