"""Tiles of the portable backend's kernels by head dimension: data, which changes no result beyond rounding."""

from collections.abc import Iterator
from typing import NamedTuple


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, loads in flight."""

    tile_q: int
    tile_kv: int
    warps: int
    stages: int


class PortableConfig(NamedTuple):
    """Tiles of the forward kernel, and of the two backward kernels: query tiles outermost, key tiles outermost.

    value: tiles of a launch for dV alone, `key` then being for dK alone; None: one launch gives both.
    """

    forward: Tiles
    query: Tiles
    key: Tiles
    value: Tiles | None = None

    def passes_over_keys(self) -> dict[str, Tiles]:
        """What each launch of the second backward kernel gives, and its tiles."""
        return {"both": self.key} if self.value is None else {"dk": self.key, "dv": self.value}


HALF: tuple[tuple[int, PortableConfig], ...] = (
    (64, PortableConfig(Tiles(128, 64, 8, 4), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 4))),
    (128, PortableConfig(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2))),
    (256, PortableConfig(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 2))),
    (512, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
)
"""16-bit inputs: rows hold up to the head dimension named."""

SINGLE: tuple[tuple[int, PortableConfig], ...] = (
    (64, PortableConfig(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1))),
    (128, PortableConfig(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
    (256, PortableConfig(Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 32, 8, 1))),
    (512, PortableConfig(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))),
)
"""float32 inputs."""


MODIFIED: tuple[tuple[int, PortableConfig], ...] = (
    (64, PortableConfig(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2))),
    (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 1), Tiles(32, 64, 4, 2))),
    (256, PortableConfig(Tiles(64, 64, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 64, 8, 1))),
    (512, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
)
"""16-bit inputs with a bias or a function of scores: tiles of what they read lie in shared memory too."""


def portable_config(headdim: int, bits: int, modified: bool) -> PortableConfig:
    """The tiles for heads of this many columns, the wider of keys and values, and elements of this many bits.

    modified: scores are changed by tensors that the kernel reads.
    """
    table = SINGLE if bits == 32 else MODIFIED if modified else HALF
    return next(config for limit, config in table if headdim <= limit)


def spills_allowed(kernel: str, headdim: int, dtype: str) -> int:
    """How many spilling instructions a kernel may have."""
    return 0


def smaller(tiles: Tiles) -> Iterator[Tiles]:
    """These tiles, then ever smaller ones, for a device or a function that needs them."""
    yield tiles
    while tiles.stages > 1:
        tiles = tiles._replace(stages=tiles.stages - 1)
        yield tiles
    while max(tiles.tile_q, tiles.tile_kv) > 16:
        larger = "tile_q" if tiles.tile_q >= tiles.tile_kv else "tile_kv"
        tiles = tiles._replace(**{larger: getattr(tiles, larger) // 2})
        yield tiles
