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


Rows = tuple[tuple[int, PortableConfig], ...]
"""(head dimension, tiles): a row holds up to the head dimension named."""

KINDS = ("half", "modified", "single")
"""16-bit inputs under windows; the same with whatever else takes registers: other masks, changed scores, dropout,
packed sequences; float32 inputs."""

HOPPER: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 4), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 4))),
        (128, PortableConfig(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2))),
        (256, PortableConfig(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 2))),
        (512, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3))),
        (128, PortableConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3))),
        (256, PortableConfig(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 2))),
        (512, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
    ),
    "single": (
        (64, PortableConfig(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1))),
        (128, PortableConfig(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
        (256, PortableConfig(Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 32, 8, 1))),
        (512, PortableConfig(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))),
    ),
}
"""sm_90, 227 KB of shared memory. 16-bit rows of up to 256 columns were timed on an H100."""

BLACKWELL: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))),
        *HOPPER["half"][2:],
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 64, 8, 2))),
        *HOPPER["modified"][2:],
    ),
    "single": HOPPER["single"],
}
"""sm_100, 227 KB of shared memory. Hopper's, smaller where those spill; timed on none."""

AMPERE: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))),
        (256, PortableConfig(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1))),
        (512, PortableConfig(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1))),
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 64, 8, 1))),
        (128, PortableConfig(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2))),
        (256, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 16, 4, 1), Tiles(32, 32, 8, 1))),
        (512, PortableConfig(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1))),
    ),
    "single": HOPPER["single"],
}
"""sm_80 to sm_89 and sm_120, whose smallest have 99 KB of shared memory. The largest tiles that do not spill there;
timed on none of them."""

CDNA: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 1))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 1))),
        (256, PortableConfig(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(16, 32, 4, 1))),
        (512, PortableConfig(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1))),
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 1))),
        (128, PortableConfig(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(16, 32, 4, 1))),
        (256, PortableConfig(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1))),
        (512, PortableConfig(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1))),
    ),
    "single": HOPPER["single"],
}
"""gfx90a, gfx942, gfx950: 64 KB of LDS. The largest tiles that do not spill on gfx942; timed on none of them."""

RDNA: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 8, 1))),
        (128, PortableConfig(Tiles(64, 32, 8, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))),
        (256, PortableConfig(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))),
        (512, PortableConfig(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))),
    ),
    "modified": (
        (64, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 8, 1))),
        (128, PortableConfig(Tiles(64, 32, 8, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))),
        (256, PortableConfig(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))),
        (512, PortableConfig(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))),
    ),
    "single": HOPPER["single"],
}
"""gfx1100, gfx1201: 64 KB of LDS. The largest tiles that do not spill on gfx1100; timed on none of them."""

TABLES: dict[str, dict[str, Rows]] = {
    "hopper": HOPPER,
    "blackwell": BLACKWELL,
    "ampere": AMPERE,
    "cdna": CDNA,
    "rdna": RDNA,
}
"""By family of GPUs, then by kind."""

SPILLS: dict[tuple[str, str, int], int] = {
    # The fastest on an H100 all the same: two accumulators of 64 x 128 beside two tiles of scores.
    ("hopper", "key_kernel", 128): 60,
    # sm_120 under Triton 3.6; the others, and Triton 3.9, need none.
    ("ampere", "forward_kernel", 64): 8,
    ("ampere", "query_kernel", 64): 8,
    ("ampere", "key_kernel", 64): 10,
    # The smallest tiles that matrix instructions take; rows of this many columns alone fill the registers.
    ("rdna", "query_kernel", 128): 80,
    ("rdna", "key_kernel", 128): 80,
    ("rdna", "forward_kernel", 256): 150,
    ("rdna", "query_kernel", 256): 300,
    ("rdna", "bias_kernel", 256): 150,
    ("rdna", "key_kernel", 256): 320,
}
"""How many spilling instructions a kernel may have, by family and head dimension, where not 0."""

VARIANT_SPILLS: dict[tuple[str, str, int, str], int] = {
    ("hopper", "key_kernel", 64, "varlen"): 20,
    ("hopper", "forward_kernel", 64, "table"): 90,
    ("hopper", "forward_kernel", 128, "dropout"): 10,
    ("hopper", "forward_kernel", 128, "mask_mod"): 140,
    ("hopper", "query_kernel", 128, "dropout"): 10,
    ("hopper", "query_kernel", 128, "mask_mod"): 20,
    ("hopper", "key_kernel", 128, "dropout"): 180,
    ("hopper", "key_kernel", 128, "mask_mod"): 90,
    ("hopper", "key_kernel", 128, "varlen"): 120,
    ("hopper", "key_kernel", 128, "window"): 90,
}
"""The same for calls that need more registers than the tiles leave, which were timed without them. Only a timing can
say whether smaller tiles or these spills cost less; until then this keeps them from growing."""


def spills_allowed(family: str, kernel: str, headdim: int, variant: str) -> int:
    """The limit of a row, for `flashtile compile`."""
    allowed = SPILLS.get((family, kernel, headdim), 0)
    return max(allowed, VARIANT_SPILLS.get((family, kernel, headdim, variant), 0))


def portable_config(headdim: int, bits: int, modified: bool, family: str = "hopper") -> PortableConfig:
    """The tiles for heads of this many columns, the wider of keys and values, and elements of this many bits.

    modified: the kernel does more than a window asks for.
    """
    kind = "single" if bits == 32 else "modified" if modified else "half"
    return next(config for limit, config in TABLES[family][kind] if headdim <= limit)


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
