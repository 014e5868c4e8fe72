"""Tiles of the portable backend's kernels by head dimension: data, which changes no result beyond rounding."""

from collections.abc import Iterator
from typing import NamedTuple


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, loads in flight; what only AMD's compiler is told, where its own
    choice (0) is not the best: rows of a matrix instruction (`matrix_instr_nonkdim`), and waves a SIMD unit that
    registers are kept free for (`waves_per_eu`); into how many parts the columns of queries and keys are cut, which
    warps share, where one warp's registers do not hold them; and what only NVIDIA's is told, registers that a thread
    may have (`maxnreg`), where it would spill a few to make room for one more program; whether rows that a product
    takes as columns are loaded that way round (keys forward, values for dQ, and its keys of up to 64 columns); whether
    loops compute again each time what never changes in them (`disable_licm`), in place of keeping it in registers;
    whether warps of 64 lanes load the parts of what a program keeps as they multiply them, past shared memory."""

    tile_q: int
    tile_kv: int
    warps: int
    stages: int
    instruction: int = 0
    waves: int = 0
    parts: int = 1
    registers: int = 0
    aside: bool = False
    lean: bool = False
    direct: bool = False

    def options(self) -> dict[str, int]:
        """As Triton's compiler takes them."""
        given = {"num_warps": self.warps, "num_stages": self.stages}
        told = {
            "matrix_instr_nonkdim": self.instruction,
            "waves_per_eu": self.waves,
            "maxnreg": self.registers,
        }
        return given | {name: value for name, value in told.items() if value}

    def chosen(self) -> tuple[int, ...]:
        """Without what is left to the compiler, or not cut, at the end."""
        chosen = tuple(map(int, self))
        while len(chosen) > 4 and chosen[-1] == self._field_defaults[self._fields[len(chosen) - 1]]:
            chosen = chosen[:-1]
        return chosen


class PortableConfig(NamedTuple):
    """Tiles of the forward kernel, and of the two backward kernels: query tiles outermost, key tiles outermost.

    value: tiles of a launch for dV alone, `key` then being for dK alone; None: one launch gives both.
    bias: tiles of a bias's gradient; None: those of `query`.
    """

    forward: Tiles
    query: Tiles
    key: Tiles
    value: Tiles | None = None
    bias: Tiles | None = None

    def passes_over_keys(self) -> dict[str, Tiles]:
        """What each launch of the second backward kernel gives, and its tiles."""
        return {"both": self.key} if self.value is None else {"dk": self.key, "dv": self.value}


Rows = tuple[tuple[int, PortableConfig], ...]
"""(head dimension, tiles): a row holds up to the head dimension named."""

KINDS = ("half", "packed", "masked", "modified", "function", "table", "single", "eight", "eight_masked")
"""16-bit inputs under windows; the same packed; under other masks; with changed scores or dropout, which take registers
too; with scores that a function changes; that one which reads tensors does; float32 inputs; 8-bit ones, timed nowhere,
of which the forward tiles alone are used; and those under other masks than windows."""

COARSER = {
    "packed": "masked",
    "masked": "modified",
    "function": "modified",
    "table": "function",
    "eight": "modified",
    "eight_masked": "eight",
}
"""Whose rows hold where a family has none of its own for a kind."""

_WIDE = (512, PortableConfig(Tiles(64, 64, 8, 1, lean=True), Tiles(64, 32, 8, 1, lean=True),
                             Tiles(32, 64, 8, 1, lean=True), Tiles(64, 64, 8, 1, lean=True)))  # fmt: skip
_WIDE_ASKED = (512, _WIDE[1]._replace(forward=Tiles(64, 32, 8, 1, lean=True), bias=Tiles(16, 32, 8, 1, lean=True)))

HOPPER: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 4), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 4))),
        (128, PortableConfig(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2, lean=True))),
        (256, PortableConfig(Tiles(128, 64, 8, 2, lean=True), Tiles(128, 32, 8, 3, lean=True),
                             Tiles(32, 128, 8, 2, lean=True), Tiles(64, 128, 8, 2, lean=True))),
        _WIDE,
    ),
    "packed": (
        (64, PortableConfig(Tiles(128, 64, 4, 3, lean=True), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3, lean=True))),
        (128, PortableConfig(Tiles(128, 128, 8, 3, lean=True), Tiles(64, 64, 4, 2, lean=True),
                             Tiles(32, 64, 4, 3, lean=True))),
        (256, PortableConfig(Tiles(128, 64, 8, 2, lean=True), Tiles(128, 32, 8, 3, lean=True),
                             Tiles(32, 128, 8, 2, lean=True), Tiles(32, 64, 4, 2, lean=True))),
        _WIDE,
    ),
    "masked": (
        (64, PortableConfig(Tiles(64, 64, 4, 3, lean=True), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2, lean=True))),
        (128, PortableConfig(Tiles(128, 64, 8, 3, lean=True), Tiles(64, 64, 4, 2, lean=True),
                             Tiles(32, 64, 4, 3, lean=True))),
        (256, PortableConfig(Tiles(128, 32, 8, 3, lean=True), Tiles(128, 32, 8, 3, lean=True), Tiles(32, 128, 8, 2),
                             Tiles(32, 64, 4, 2, lean=True))),
        _WIDE_ASKED,
    ),
    "modified": (
        (64, PortableConfig(Tiles(64, 64, 4, 3, lean=True), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3, lean=True))),
        (128, PortableConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2, lean=True), Tiles(32, 64, 4, 3, lean=True))),
        (256, PortableConfig(Tiles(128, 64, 8, 2, lean=True), Tiles(128, 32, 8, 2, lean=True),
                             Tiles(32, 128, 8, 2, lean=True), Tiles(64, 128, 8, 2, lean=True),
                             bias=Tiles(64, 32, 8, 2))),
        _WIDE_ASKED,
    ),
    "single": (
        (64, PortableConfig(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1))),
        (128, PortableConfig(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
        (256, PortableConfig(Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 32, 8, 1))),
        (512, PortableConfig(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))),
    ),
    "eight": (
        (64, PortableConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 4))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2))),
        (256, PortableConfig(Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 2))),
        (512, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
    ),
}  # fmt: skip
HOPPER["table"] = (
    (64, HOPPER["modified"][0][1]._replace(forward=Tiles(128, 32, 4, 3, lean=True),
                                           key=Tiles(32, 64, 4, 3, lean=True))),
    HOPPER["modified"][1],
    (256, HOPPER["modified"][2][1]._replace(query=Tiles(128, 32, 8, 2), value=Tiles(64, 64, 8, 2, lean=True))),
    HOPPER["modified"][3],
)  # fmt: skip
"""sm_90, 227 KB of shared memory. 16-bit rows were timed on an H100, `lean` and not (Triton 3.6, lengths 1k and 8k):
the fastest that do not spill, unless they take over a twentieth longer than one that does (docs/portable.md)."""

REGISTERS = 255
"""Registers that a thread of NVIDIA's can have."""

_WIDE_BLACKWELL = (512, PortableConfig(Tiles(64, 32, 8, 1, lean=True), Tiles(64, 32, 8, 1, lean=True),
                                       Tiles(32, 64, 8, 1, lean=True), Tiles(32, 64, 8, 1, lean=True),
                                       bias=Tiles(16, 32, 8, 1, lean=True)))  # fmt: skip

BLACKWELL: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2, registers=REGISTERS), Tiles(32, 64, 8, 2))),
        (256, PortableConfig(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 3), Tiles(32, 64, 8, 1, registers=REGISTERS),
                             Tiles(64, 64, 8, 1, registers=REGISTERS))),
        _WIDE_BLACKWELL,
    ),
    "masked": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 8, 2, registers=REGISTERS))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 64, 4, 1))),
        (256, PortableConfig(Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(16, 64, 8, 1),
                             Tiles(64, 64, 8, 1, registers=REGISTERS))),
        _WIDE_BLACKWELL,
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 8, 2, registers=REGISTERS))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 64, 4, 1))),
        (256, PortableConfig(Tiles(128, 32, 8, 2, lean=True), Tiles(64, 32, 8, 2), Tiles(16, 64, 8, 1),
                             Tiles(64, 64, 8, 1, registers=REGISTERS))),
        _WIDE_BLACKWELL,
    ),
    "single": HOPPER["single"],
}  # fmt: skip
BLACKWELL["modified"] = (
    BLACKWELL["modified"][0],
    (120, BLACKWELL["modified"][1][1]._replace(query=Tiles(64, 32, 8, 1, registers=REGISTERS))),
    *BLACKWELL["modified"][1:],
)
"""sm_100, 227 KB of shared memory. The largest tiles that do not spill; timed on none. Rows of 512 columns have 64 that
accumulate: with 32 it is not `tcgen05` that multiplies, and with 128 they do not fit into tensor memory."""

_WIDE_AMPERE = (512, PortableConfig(Tiles(32, 32, 8, 1, lean=True), Tiles(32, 16, 8, 1, parts=4, lean=True),
                                    Tiles(16, 32, 8, 1, parts=8), Tiles(16, 32, 8, 1, parts=4, lean=True)))  # fmt: skip
_WIDE_AMPERE_ASKED = (512, _WIDE_AMPERE[1]._replace(query=Tiles(16, 16, 8, 1, parts=4, lean=True),
                                                    bias=Tiles(16, 32, 8, 1, lean=True)))  # fmt: skip

AMPERE: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2, lean=True))),
        (128, PortableConfig(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))),
        (256, PortableConfig(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1))),
        _WIDE_AMPERE,
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2, registers=REGISTERS),
                            Tiles(32, 32, 4, 1))),
        (128, PortableConfig(Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2))),
        (256, PortableConfig(Tiles(64, 32, 8, 1), Tiles(16, 32, 4, 1, registers=REGISTERS, aside=True),
                             Tiles(32, 16, 8, 1))),
        _WIDE_AMPERE_ASKED,
    ),
    "single": HOPPER["single"],
}  # fmt: skip
AMPERE["eight"] = (
    *AMPERE["modified"][:2],
    (256, PortableConfig(Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1, registers=REGISTERS))),
    *AMPERE["modified"][3:],
)
AMPERE["masked"] = (
    AMPERE["eight"][0],
    (120, AMPERE["eight"][1][1]._replace(forward=Tiles(64, 64, 8, 2), key=Tiles(32, 32, 8, 2, registers=REGISTERS))),
    (128, AMPERE["eight"][1][1]._replace(forward=Tiles(64, 64, 8, 2))),
    *AMPERE["eight"][2:],
)
AMPERE["function"] = (
    (64, AMPERE["modified"][0][1]._replace(key=Tiles(32, 32, 4, 1, lean=True))),
    *AMPERE["modified"][1:],
)
AMPERE["table"] = AMPERE["modified"]
AMPERE["packed"] = (
    (64, AMPERE["masked"][0][1]._replace(forward=Tiles(128, 32, 8, 2, registers=REGISTERS))),
    *AMPERE["masked"][1:],
)
"""sm_80 to sm_89 and sm_120, whose smallest have 99 KB of shared memory. The largest tiles that do not spill there;
timed on none of them. Backward, warps share rows of 512 columns."""

_EIGHTHS_64 = Tiles(32, 32, 8, 1, parts=8, direct=True)
_WIDE_CDNA = (512, PortableConfig(_EIGHTHS_64._replace(tile_q=64, lean=True), _EIGHTHS_64,
                                  _EIGHTHS_64._replace(lean=True)))  # fmt: skip
_WIDE_CDNA_MODIFIED = (512, PortableConfig(_EIGHTHS_64, _EIGHTHS_64, _EIGHTHS_64._replace(tile_q=16)))
_WIDE_CDNA_ASKED = (512, PortableConfig(_EIGHTHS_64, _EIGHTHS_64._replace(tile_q=16),
                                        _EIGHTHS_64._replace(tile_q=16, tile_kv=16)))  # fmt: skip

CDNA: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(128, 64, 8, 2, aside=True), Tiles(128, 32, 4, 2, aside=True),
                            Tiles(32, 128, 4, 1))),
        (128, PortableConfig(Tiles(128, 64, 8, 2, 16, aside=True), Tiles(64, 32, 4, 1, 16, aside=True),
                             Tiles(32, 64, 4, 1, 16))),
        (256, PortableConfig(Tiles(64, 32, 4, 2, 16, aside=True), Tiles(64, 16, 4, 1, 16, aside=True),
                             Tiles(16, 64, 4, 1))),
        _WIDE_CDNA,
    ),
    "modified": (
        (64, PortableConfig(Tiles(128, 64, 8, 2, aside=True), Tiles(64, 32, 4, 2, 16, aside=True),
                            Tiles(32, 128, 4, 1, 16))),
        (128, PortableConfig(Tiles(64, 64, 4, 2, 16, aside=True), Tiles(64, 32, 4, 1, 16, aside=True),
                             Tiles(16, 128, 8, 1))),
        (256, PortableConfig(Tiles(64, 32, 4, 2, 16, aside=True), Tiles(64, 16, 4, 1, 16, aside=True),
                             Tiles(16, 64, 4, 1))),
        _WIDE_CDNA_MODIFIED,
    ),
    "single": HOPPER["single"],
}  # fmt: skip
CDNA["masked"] = (
    (64, CDNA["modified"][0][1]._replace(forward=Tiles(128, 64, 8, 2, 16, aside=True))),
    CDNA["modified"][1],
    (256, CDNA["modified"][2][1]._replace(forward=Tiles(64, 32, 4, 2), key=Tiles(16, 64, 4, 1, lean=True))),
    _WIDE_CDNA_ASKED,
)
CDNA["packed"] = CDNA["half"]
CDNA["function"] = (
    CDNA["modified"][0],
    (128, CDNA["modified"][1][1]._replace(forward=CDNA["half"][1][1].forward)),
    CDNA["modified"][2],
    _WIDE_CDNA_ASKED,
)
CDNA["table"] = (
    (32, CDNA["modified"][0][1]._replace(forward=Tiles(128, 32, 8, 2))),
    *CDNA["modified"][:3],
    _WIDE_CDNA_ASKED,
)
CDNA["modified"] = ((32, CDNA["modified"][0][1]._replace(forward=Tiles(128, 64, 8, 2))), *CDNA["modified"])
"""gfx90a, gfx942, gfx950: 64 KB of LDS; timed on none of them. Of tiles that do not spill, those of which no product is
made twice, with two waves where there are such, and then the fewest cycles of LDS and vector instructions in emulation
(docs/amd.md). Warps share rows of 512 columns in half precision, which one does not hold."""

_QUARTERS, _EIGHTHS = Tiles(16, 16, 4, 1, parts=4), Tiles(16, 16, 8, 1, parts=8)
_SIXTEENTHS = Tiles(16, 16, 16, 1, parts=16)

RDNA: dict[str, Rows] = {
    "half": (
        (64, PortableConfig(Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(16, 32, 4, 1, parts=4))),
        (128, PortableConfig(Tiles(64, 32, 8, 1), Tiles(16, 32, 4, 1, parts=4), Tiles(16, 32, 8, 1, parts=8))),
        (256, PortableConfig(Tiles(16, 32, 8, 1, parts=8), Tiles(16, 32, 8, 1, parts=8), _EIGHTHS)),
        (512, PortableConfig(_SIXTEENTHS._replace(tile_q=32), _SIXTEENTHS._replace(tile_q=32), _SIXTEENTHS)),
    ),
    "masked": (
        (64, PortableConfig(Tiles(64, 32, 8, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1, parts=4))),
        (128, PortableConfig(Tiles(32, 16, 8, 1, parts=4), _QUARTERS, _QUARTERS)),
        (512, PortableConfig(_SIXTEENTHS._replace(tile_q=32), _SIXTEENTHS, _SIXTEENTHS)),
    ),
    "modified": (
        (64, PortableConfig(Tiles(64, 32, 8, 1), Tiles(64, 16, 4, 1), Tiles(16, 32, 4, 1, parts=4))),
        (128, PortableConfig(Tiles(64, 32, 8, 1), _QUARTERS, _QUARTERS)),
        (512, PortableConfig(_SIXTEENTHS._replace(tile_q=32), _SIXTEENTHS, _SIXTEENTHS)),
    ),
    "single": HOPPER["single"],
}
RDNA["function"] = (
    (64, RDNA["modified"][0][1]._replace(query=RDNA["masked"][0][1].query)),
    (128, RDNA["modified"][1][1]._replace(forward=Tiles(64, 32, 8, 1, aside=True))),
    *RDNA["modified"][2:],
)
RDNA["eight"] = RDNA["masked"]
RDNA["eight_masked"] = (
    (64, RDNA["masked"][0][1]._replace(forward=Tiles(128, 32, 8, 1, lean=True))),
    *RDNA["masked"][1:],
)
"""gfx1100, gfx1201: 64 KB of LDS; timed on none of them. Large tiles that do not spill on gfx1100; those of 64 columns
make no product twice, but for dQ under masks and scores that are functions. Its registers do not hold rows of 128
columns whole for the backward pass, nor of 256 for the forward pass: there warps share the columns, sixteen of them
where there are 512."""

TABLES: dict[str, dict[str, Rows]] = {
    "hopper": HOPPER,
    "blackwell": BLACKWELL,
    "ampere": AMPERE,
    "cdna": CDNA,
    "rdna": RDNA,
}
"""By family of GPUs, then by kind."""


def portable_config(headdim: int, kind: str, family: str = "hopper") -> PortableConfig:
    """The tiles for heads of this many columns, the wider of keys and values."""
    tables = TABLES[family]
    while kind not in tables:
        kind = COARSER[kind]
    return next(config for limit, config in tables[kind] if headdim <= limit)


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
