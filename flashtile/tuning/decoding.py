"""Tiles and parts of calls over a KV cache: data, which changes no result beyond rounding."""

from typing import NamedTuple

from flashtile.tuning.portable import REGISTERS, Tiles, portable_config


class DecodeConfig(NamedTuple):
    """tiles: of queries, all heads of a key head together, and of keys. splits: parts that the keys are cut into, of
    `part` tiles each or, None, as even as can be. append: new rows of a program at most."""

    tiles: Tiles
    splits: int
    part: int | None = None
    append: int = 1


Rows = tuple[tuple[int, Tiles], ...]
"""(head dimension, tiles): a row holds up to the head dimension named; tile_q: the most that it serves. The first one
that serves a call is taken."""

NARROW: dict[str, dict[str, Rows]] = {
    "hopper": {
        "half": ((64, Tiles(64, 128, 4, 3)), (128, Tiles(16, 128, 4, 3)), (128, Tiles(64, 64, 4, 3)),
                 (256, Tiles(64, 32, 4, 3)), (512, Tiles(32, 32, 4, 3))),
        "half_paged": ((64, Tiles(64, 128, 4, 3)), (128, Tiles(64, 64, 4, 3)), (256, Tiles(64, 32, 4, 3)),
                       (512, Tiles(32, 32, 4, 3))),
        "narrow": ((64, Tiles(64, 128, 4, 3)), (128, Tiles(64, 64, 4, 3)), (256, Tiles(64, 32, 4, 3)),
                   (512, Tiles(32, 32, 4, 3))),
        "narrow_paged": ((64, Tiles(64, 128, 4, 3)), (128, Tiles(16, 128, 4, 3)), (128, Tiles(64, 64, 4, 3)),
                         (256, Tiles(64, 32, 4, 3)), (512, Tiles(32, 32, 4, 3))),
        "single": ((64, Tiles(32, 64, 4, 2)), (128, Tiles(32, 32, 4, 2)), (256, Tiles(16, 32, 4, 2)),
                   (512, Tiles(16, 16, 4, 1))),
    },
    "ampere": {
        "half": ((64, Tiles(64, 64, 4, 3)), (128, Tiles(64, 64, 4, 2)), (256, Tiles(32, 32, 4, 2)),
                 (512, Tiles(16, 16, 4, 2, registers=REGISTERS))),
        "single": ((64, Tiles(32, 32, 4, 2)), (128, Tiles(32, 32, 4, 2)), (256, Tiles(16, 16, 4, 2)),
                   (512, Tiles(16, 16, 4, 1))),
    },
    "cdna": {
        "half": ((64, Tiles(64, 64, 4, 2)), (128, Tiles(32, 64, 4, 1)), (256, Tiles(16, 32, 4, 1)),
                 (512, Tiles(16, 16, 8, 1, parts=8))),
        "single": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(16, 32, 4, 1)), (256, Tiles(16, 16, 4, 1)),
                   (512, Tiles(16, 16, 4, 1))),
    },
    "rdna": {
        "half": ((64, Tiles(16, 32, 4, 1)), (128, Tiles(16, 16, 4, 1, parts=4)),
                 (512, Tiles(16, 16, 8, 1, parts=8))),
        "narrow": ((64, Tiles(16, 32, 4, 1, parts=4)), (128, Tiles(16, 16, 4, 1, parts=4)),
                   (256, Tiles(16, 16, 8, 1, parts=8)), (512, Tiles(16, 16, 16, 3, parts=16))),
        "single": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(16, 32, 4, 1)), (256, Tiles(16, 16, 4, 1)),
                   (512, Tiles(16, 16, 4, 1))),
    },
}  # fmt: skip
"""By family, then by what queries and cache are: 16 bits, float32, or 16 bits over a `narrow` cache (8 or 4 bits); in
pages where there is such a table. Those of families without a table for a kind are the 16-bit ones.

For few queries: key tiles that keep enough bytes in flight. On an H100 (torch 2.11, Triton 3.6, clocks as they come) 16
tiles and up to 9 numbers of parts were timed with head dimension 128, 32/8 and 64/8 heads: 8k to 128k keys, 1 to 64
sequences, 16 bits and e4m3, in one piece and in pages of 64, and latent attention (`tools/tune_decoding.py`). The rows
are the ones that come closest to the best everywhere; one program of 128 keys on each multiprocessor reads as fast as
any number of smaller ones. The other families' rows are the largest that do not spill, timed on none."""
NARROW["blackwell"] = {
    kind: rows if kind == "single" else (*rows[:-1], (512, Tiles(32, 32, 8, 3, registers=REGISTERS)))
    for kind, rows in NARROW["hopper"].items()
}
NARROW["blackwell"]["half"] = (
    NARROW["blackwell"]["half"][0],
    (120, Tiles(16, 64, 4, 4)),
    *NARROW["blackwell"]["half"][1:],
)
NARROW["ampere"]["narrow"] = ((64, Tiles(64, 64, 4, 3, registers=REGISTERS)), *NARROW["ampere"]["half"][1:])
NARROW["ampere"]["narrow_paged"] = NARROW["ampere"]["narrow"]
NARROW["rdna"]["narrow_paged"] = NARROW["rdna"]["narrow"]

MANY: dict[str, tuple[tuple[int, Tiles | None], ...]] = {
    "hopper": ((128, None), (256, Tiles(128, 32, 8, 3, lean=True)), (512, Tiles(32, 64, 8, 2))),
    "blackwell": ((256, None), (512, Tiles(32, 16, 8, 2, registers=REGISTERS))),
    "ampere": ((256, None), (512, Tiles(32, 16, 8, 2, registers=REGISTERS))),
    "cdna": ((256, None), (512, Tiles(32, 32, 8, 1, parts=8))),
}
"""For more rows of 16 bits than those serve, where the forward kernel's tiles (None) would not do: up to 256 columns
they spill on Hopper, and above, as in latent attention with all its heads, they are too small. There tiles of 64 rows
were faster on an H100, but their products read shared memory through the asynchronous proxy, and the code of Triton 3.9
has no fence before that: the emulator says so. None of these spills; only Hopper's were timed."""

LATENT = Tiles(64, 64, 12, 3)
"""Of Hopper's kernel for latent attention with many rows of queries; `stages` counts slots for tiles of keys."""

LATENT_WIDENED, LATENT_NARROW = Tiles(64, 64, 12, 2), 1
"""The same over a cache of 8 bits, and the slots of tiles that are not widened yet."""

LATENT_LEAST: int | None = 33
"""Rows of queries from which on that kernel is taken; None: it is not, and the portable one runs."""

LATENT_COUNTED = 128
"""Keys that count as a tile where parts are chosen for it.

With 128 heads a sequence has two tiles of rows. Of 132 multiprocessors, which run one program each, 64 sequences fill
128 without parts, and 16 with 4 parts each, of 2048 keys where there are 8192: any other number leaves more of them
idle or comes in turns. One sequence of 8192 has 32 parts of 256 keys (`LEAST`) on 64 of them: 64 parts of 128 would end
a tile earlier, and write and join twice as much. So it is not the number of parts that keeps 16 sequences from taking a
quarter of the time of 64. In one trial on an H100, 82 microseconds against 263, 8 went by as 2048 rows were joined, 4
parts at a time, and about 11 as parts began and ended; 3 and 8 parts took 14 and 25 % longer than 4."""

LATENT_REGISTERS = 168
"""A thread that it is compiled for; its warps trade them once it runs."""

APPEND = 4
"""New rows of a program at most; those of more than 512 columns have programs of their own."""

APPEND_WIDE = {"blackwell": 1, "ampere": 1, "rdna": 1}
"""By family, the same for rows of more than 256 columns: a warp of 32 lanes that turns four of 512 spills up to 191
registers, and two of them up to 8. Hopper's are left as they were; CDNA's warps have 64 lanes."""

COMBINE = (4, 16, 32)
"""Parts that are joined at a time: the first that holds all. Of more than the last, `IN_TURN` at a time are.

On an H100, with 32 at a time always, 8192 rows of 512 columns were joined in 99, 96 and 90 microseconds from 2, 3 and 4
parts, 2048 rows of 128 columns in 7.4, 7.9 and 7.7 (`tools/tune_decoding.py`): a row costs what is done for 32 parts,
most of which there were not. By that 4 at a time take about an eighth of what is not reading. 4 and 16 were not
timed."""

IN_TURN = 16

COLUMNS = 64
"""Columns of a row that one warp joins."""

PART = 1024
"""Keys of a part where all are of one size (`batch_invariant`)."""

SHARED = {"hopper": 227 * 1024, "blackwell": 227 * 1024}
"""Bytes of shared memory that the programs of a multiprocessor have; of other families 2 are taken to fit."""

BESIDE = 6 * 1024
"""Bytes of it that a program has beside its tiles of keys and values."""

PROGRAMS, PROGRAMS_NARROW = 3, 2
"""Programs that a multiprocessor runs at a time at most, by their registers."""

LEAST = 2
"""Tiles that a part has at least, when the cache is full."""

MOST = 128
"""Parts at most."""

FLIGHT = 96 * 1024
"""Bytes that a multiprocessor has to have on their way, so that as many programs of 16-bit caches as that takes read as
fast as any number of them. Those of narrow caches compute as long as they read: all that fit are wanted."""

ENOUGH, LAST = 0.95, 0.6
"""What the programs that run at last take at least, as a share of what a full device takes for as many tiles each, on
as many multiprocessors as have enough of them; and after full rounds, which leave them spread unevenly."""

START, JOIN = 1.0, 0.6
"""Tiles that could be read while a part starts, and by a full device while parts are joined."""

SLACK = 1.01
"""The fewest parts are taken that take no longer than this times what the best number takes."""


def decode_tiles(headdim: int, rows: int, cache: str, kind: str, family: str) -> Tiles:
    """For `rows` packed rows of queries over a `cache` of one of the kinds of `NARROW`: narrow tiles, or those of the
    forward kernel where there are many."""
    tables = NARROW[family]
    for limit, tiles in tables.get(cache, tables["half"]):
        if headdim <= limit and rows <= tiles.tile_q:
            return tiles._replace(tile_q=max(16, 1 << (rows - 1).bit_length()))
    many = MANY.get(family, ()) if cache != "single" else ()
    wide = next((tiles for limit, tiles in many if headdim <= limit), None)
    return wide or portable_config(headdim, kind, family).forward


class Room(NamedTuple):
    """Programs that a multiprocessor runs at a time, and how many of them are enough."""

    programs: int
    enough: int


def room_for(tiles: Tiles, row: int, narrow: bool, family: str) -> Room:
    """`row`: bytes of a key and its value."""
    if family not in SHARED:
        return Room(2, 2)
    tile = max(1, tiles.stages - 1) * tiles.tile_kv * row
    programs = max(1, min(PROGRAMS_NARROW if narrow else PROGRAMS, SHARED[family] // (tile + BESIDE)))
    return Room(programs, programs if narrow else min(programs, -(-FLIGHT // tile)))


def append_most(columns: int, family: str) -> int:
    """New rows of a program at most, a power of two."""
    if columns > 512:
        return 1
    return APPEND_WIDE.get(family, APPEND) if columns > 256 else APPEND


def parts_at_once(splits: int) -> int:
    """From `COMBINE`. Which it is changes no bit (see `joining.join_rows`)."""
    return next((count for count in COMBINE if splits <= count), IN_TURN)


def decode_splits(programs: int, tiles: int, multiprocessors: int, room: Room) -> int:
    """Parts that fill the device: `programs` there are without any, `tiles` a sequence has where the cache is full. For
    the rows above these are the fastest number of those timed, or one within 2 % of it."""
    slots, most = multiprocessors * room.programs, max(1, min(MOST, tiles // LEAST))
    enough = ENOUGH * room.enough / room.programs

    def cost(splits: int) -> float:
        """In the time that a full device takes for a tile of each program."""
        part = -(-tiles // splits)
        rounds, rest = divmod(programs * -(-tiles // max(1, part)), slots)
        least = LAST if rounds and room.enough < room.programs else enough
        share = rounds + (max(least, rest / slots) if rest else 0.0)
        return (part + START) * share + (JOIN if splits > 1 else 0.0)

    costs = [cost(splits) for splits in range(1, most + 1)]
    return next(splits for splits, one in enumerate(costs, 1) if one <= SLACK * min(costs))
