"""Tiles and parts of calls over a KV cache: data, which changes no result beyond rounding."""

from typing import NamedTuple

from flashtile.tuning.portable import Tiles, portable_config


class DecodeConfig(NamedTuple):
    """tiles: of queries, all heads of a key head together, and of keys. splits: parts that the keys are cut into, of
    `part` tiles each or, None, as even as can be."""

    tiles: Tiles
    splits: int
    part: int | None = None


Rows = tuple[tuple[int, Tiles], ...]
"""(head dimension, tiles): a row holds up to the head dimension named; tile_q: the most that it serves."""

NARROW: dict[str, dict[str, Rows]] = {
    "hopper": {
        "half": ((64, Tiles(64, 128, 4, 3)), (128, Tiles(64, 64, 4, 3)), (256, Tiles(64, 32, 4, 3)),
                 (512, Tiles(32, 32, 4, 3))),
        "single": ((64, Tiles(32, 64, 4, 2)), (128, Tiles(32, 32, 4, 2)), (256, Tiles(16, 32, 4, 2)),
                   (512, Tiles(16, 16, 4, 1))),
    },
    "ampere": {
        "half": ((64, Tiles(64, 64, 4, 3)), (128, Tiles(64, 64, 4, 2)), (256, Tiles(32, 32, 4, 2)),
                 (512, Tiles(16, 16, 4, 2))),
        "single": ((64, Tiles(32, 32, 4, 2)), (128, Tiles(32, 32, 4, 2)), (256, Tiles(16, 16, 4, 2)),
                   (512, Tiles(16, 16, 4, 1))),
    },
    "cdna": {
        "half": ((64, Tiles(64, 64, 4, 2)), (128, Tiles(32, 64, 4, 1)), (256, Tiles(16, 32, 4, 1)),
                 (512, Tiles(16, 16, 4, 1))),
        "single": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(16, 32, 4, 1)), (256, Tiles(16, 16, 4, 1)),
                   (512, Tiles(16, 16, 4, 1))),
    },
    "rdna": {
        "half": ((64, Tiles(16, 32, 4, 1)), (128, Tiles(16, 16, 4, 1)), (256, Tiles(16, 16, 8, 1)),
                 (512, Tiles(16, 16, 8, 1))),
        "single": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(16, 32, 4, 1)), (256, Tiles(16, 16, 4, 1)),
                   (512, Tiles(16, 16, 4, 1))),
    },
}  # fmt: skip
"""By family, then 16-bit or float32. For few queries: key tiles that keep enough bytes in flight beside a second
program on a multiprocessor. The largest that do not spill; timed on none."""
NARROW["blackwell"] = NARROW["hopper"]

MANY = {"hopper": Tiles(64, 32, 8, 3)}
"""For more rows than those of 16 bits and more than 256 columns serve, as in latent attention with all its heads: key
tiles are on their way while others are multiplied, for which the forward kernel's tiles leave no memory."""

APPEND = (1, 2, 4)
"""New rows of a program: the first that holds all, or as many programs as it takes. Rows of more than 512 columns do
without the last."""

COMBINE = 32
"""Parts that are joined at a time."""

COLUMNS = 64
"""Columns of a row that one warp joins."""

PART = 1024
"""Keys of a part where all are of one size (`batch_invariant`)."""

SHARED = {"hopper": 227 * 1024, "blackwell": 227 * 1024}
"""Bytes of shared memory that the programs of a multiprocessor have; of other families 2 are taken to fit."""

BESIDE = 6 * 1024
"""Bytes of it that a program has beside its tiles of keys and values."""

PROGRAMS, PROGRAMS_QUANTIZED = 3, 2
"""Programs that a multiprocessor runs at a time at most, by their registers."""

LEAST = 2
"""Tiles that a part has at least, when the cache is full."""

MOST = 128
"""Parts at most."""

ALONE = 0.6
"""What programs take when hardly any others run, as a share of what they take when the device is full: the last ones
of several rounds are spread unevenly and do not fill the memory's bus."""

START, JOIN = 0.3, 0.6
"""Tiles that could be read while a part starts, and while parts are joined."""

SLACK = 1.01
"""The fewest parts are taken that take no longer than this times what the best number takes."""


def decode_tiles(headdim: int, rows: int, half: bool, kind: str, family: str) -> Tiles:
    """For `rows` packed rows of queries: narrow tiles, or those of the forward kernel where there are many."""
    table = NARROW[family]["half" if half else "single"]
    tiles = next(tiles for limit, tiles in table if headdim <= limit)
    if rows > tiles.tile_q:
        wide = MANY.get(family) if half and headdim > 256 else None
        return wide or portable_config(headdim, kind, family).forward
    return tiles._replace(tile_q=max(16, 1 << (rows - 1).bit_length()))


def resident(tiles: Tiles, row: int, quantized: bool, family: str) -> int:
    """Programs that a multiprocessor runs at a time; `row`: bytes of a key and its value."""
    if family not in SHARED:
        return 2
    tile = max(1, tiles.stages - 1) * tiles.tile_kv * row + BESIDE
    return max(1, min(PROGRAMS_QUANTIZED if quantized else PROGRAMS, SHARED[family] // tile))


def append_rows(rows: int, columns: int) -> int:
    """New rows of a program, from `APPEND`."""
    fitting = APPEND if columns <= 512 else APPEND[:-1]
    return next((tile for tile in fitting if rows <= tile), fitting[-1])


def decode_splits(programs: int, tiles: int, slots: int) -> int:
    """Parts that fill the device: `programs` there are without any, `tiles` a sequence has where the cache is full,
    `slots` programs run at a time."""
    most = max(1, min(MOST, tiles // LEAST))

    def cost(splits: int) -> float:
        """In the time that a full device takes for a tile of each program."""
        part = -(-tiles // splits)
        waves, rest = divmod(programs * -(-tiles // max(1, part)), slots)
        last = max(ALONE, rest / slots) if rest else 0.0
        return (part + START) * (waves + last) + (JOIN if splits > 1 else 0.0)

    costs = [cost(splits) for splits in range(1, most + 1)]
    return next(splits for splits, one in enumerate(costs, 1) if one <= SLACK * min(costs))
