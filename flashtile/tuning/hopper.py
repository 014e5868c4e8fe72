"""Tiles of the Hopper backend's kernels by head dimension: data, which changes no result beyond rounding."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class HopperConfig(NamedTuple):
    """consumers: math warpgroups, each with 64 rows of the query tile; stages: key and value tiles in flight.

    halves: the columns of outputs wider than 128 leave one half after the other, through memory for one of them. turns:
    the warpgroups start their products one after the other, so that the exponentials of one run under the products of
    the others. section: heads whose tiles are handed out together, heaviest first, so that they share the L2 cache.
    query_stages: query tiles in flight. rows: a thread does its two rows one after the other, and outputs are
    multiplied where a maximum has grown by much alone (`softmax.softmax_of_rows`). early: keys are freed once they are
    multiplied, and not with values. apart: steps that need the mask have a loop of their own, in front of the
    others, unless a window ends on the left.
    """

    consumers: int
    tile_kv: int
    stages: int
    halves: bool = False
    turns: bool = False
    section: int = 16
    query_stages: int = 1
    rows: bool = False
    early: bool = False
    apart: bool = False

    @property
    def tile_q(self) -> int:
        return 64 * self.consumers


class Row(NamedTuple):
    """Of a table: the tiles for heads of up to `headdim` columns, and up to `longest` rows (None: any number), of
    queries and, in a backward pass, of keys. values: columns of their values, at most, where those must be fewer."""

    headdim: int
    longest: int | None
    config: Any
    values: int | None = None

    def fits(self, headdim: int, headdim_v: int | None) -> bool:
        """Whether it is for heads of so many columns; headdim_v: None where values have as many."""
        return headdim <= self.headdim and (headdim_v or headdim) <= (self.values or self.headdim)


_TWO = HopperConfig(consumers=2, tile_kv=128, stages=3)
_SHORT = _TWO._replace(query_stages=2)
_SHORT_APART = _SHORT._replace(rows=True, early=True, apart=True)
_THREE = HopperConfig(consumers=3, tile_kv=128, stages=2, turns=True)
_128 = HopperConfig(consumers=2, tile_kv=128, stages=2, section=32)
_192 = _128._replace(halves=True, rows=True, early=True)
_256 = HopperConfig(consumers=2, tile_kv=64, stages=2, halves=True, section=32)

_EIGHT_TWO = HopperConfig(consumers=2, tile_kv=128, stages=4)
_EIGHT_TWO_APART = _EIGHT_TWO._replace(turns=True, apart=True)
_EIGHT_THREE = HopperConfig(consumers=3, tile_kv=128, stages=4, turns=True)
_EIGHT_256 = HopperConfig(consumers=2, tile_kv=128, stages=2)
_EIGHT_WIDE = (Row(128, None, _EIGHT_TWO), Row(256, None, _EIGHT_256))

_CUT = (
    Row(64, None, _TWO),
    Row(128, None, _128._replace(turns=True, rows=True, early=True)),
    Row(192, None, _192._replace(turns=True), values=128),
)

FORWARD: dict[str, tuple[Row, ...]] = {
    "full": (
        Row(64, 1024, _SHORT._replace(rows=True, early=True)),
        Row(64, None, _THREE._replace(rows=True, early=True)),
        Row(128, None, _128._replace(query_stages=2, rows=True, early=True)),
        Row(192, None, _192._replace(turns=True), values=128),
        Row(256, None, _256),
    ),
    "causal": (
        Row(64, 512, _SHORT),
        Row(64, 2048, _SHORT_APART),
        Row(64, None, _THREE._replace(rows=True, early=True, apart=True)),
    ),
    "packed_causal": (Row(64, None, _SHORT_APART),),
    "window": (
        Row(64, 2048, _SHORT),
        Row(64, None, _THREE),
        Row(128, None, _128._replace(rows=True, early=True, apart=True)),
        Row(192, None, _192._replace(apart=True), values=128),
        Row(256, None, _256._replace(rows=True, apart=True)),
    ),
    "scored_full": (Row(64, None, _THREE._replace(rows=True, early=True)),),
    "scored": (Row(64, None, _TWO._replace(rows=True, early=True)),),
    "called": (Row(64, None, _THREE._replace(rows=True)),),
    "listed": (*_CUT, Row(256, None, _256._replace(rows=True, apart=True))),
    "cut": (*_CUT, Row(256, None, _256._replace(rows=True))),
    "dropout": (
        Row(64, None, _TWO),
        Row(128, None, HopperConfig(consumers=2, tile_kv=64, stages=4, section=32)),
        Row(256, None, HopperConfig(consumers=2, tile_kv=32, stages=4, halves=True, section=32, rows=True)),
    ),
    "eight_full": (Row(64, None, _EIGHT_THREE), *_EIGHT_WIDE),
    "eight_causal": (
        Row(64, 2048, _EIGHT_TWO_APART),
        Row(64, None, _EIGHT_THREE._replace(apart=True)),
        Row(128, None, _EIGHT_TWO_APART),
        Row(256, None, _EIGHT_256._replace(turns=True, apart=True)),
    ),
    "eight_window": (Row(64, 4096, _EIGHT_TWO), Row(64, None, _EIGHT_THREE), *_EIGHT_WIDE),
    "eight_cut": (Row(128, None, _EIGHT_TWO), Row(256, None, HopperConfig(consumers=2, tile_kv=64, stages=4))),
}
"""By what the scores meet: nothing, a window that ends on the right alone, the same in packed sequences, a window;
changes without a mask, changes under a window that ends on the right alone and all by a bias, changes by a function
under such a window; lists of tiles, unchanged; anything; dropout, whose random numbers take registers, whatever else
there is; then those with 8-bit inputs, whose tiles of keys hold no more than the 128 that share a scale, packed ones as
if they met anything. The first row that fits counts. Those without a mask and with a window were timed on an H100, at
1k, 2k, 4k, 8k and 16k tokens, those with 8 bits at 1k, 4k and 16k; those of packed 8 bits were chosen by spills alone;
changes, lists and dropout, at 8k tokens or 4k, and where `turns`, `rows`, `early` and `apart` pay, were timed on an
H200 (docs/hopper.md). The row of changes without a mask spills much where a function reads a table, and took 0.84 of
the time of the one that does not."""

COARSER = {
    "causal": "window",
    "scored_full": "cut",
    "scored": "cut",
    "called": "cut",
    "packed_causal": "causal",
    "added": "modified",
    "modified_full": "modified",
}
"""Whose rows hold for heads that have none of their own in a kind, of `FORWARD` or `BACKWARD`."""


class QueryConfig(NamedTuple):
    """Of the kernel for dQ alone. stages, stages_v: tiles of keys, which are kept a step longer, and of values in
    flight; section, query_stages: as above."""

    tile_kv: int
    stages: int
    stages_v: int
    section: int = 16
    consumers: int = 2
    query_stages: int = 1

    @property
    def tile_q(self) -> int:
        return 64 * self.consumers


class BackwardConfig(NamedTuple):
    """tile_q: queries of a tile; stages: query tiles in flight; tile_kv: keys that two math warpgroups share, 64 each,
    or 64 in all, of which one computes dK and the other dV.

    queries: None, or the tiles of another kernel for dQ; otherwise dQ is added up here, in any order. apart: steps that
    need the mask have code of their own, in front of the others, unless a window ends on the left. ahead: a step's
    scores are multiplied at the end of the step before, unless several heads of queries share keys; then they are not
    taken apart either.
    """

    tile_q: int
    stages: int
    tile_kv: int = 128
    consumers: int = 2
    queries: QueryConfig | None = None
    apart: bool = False
    ahead: bool = False


class BiasConfig(NamedTuple):
    """Of the kernel of a bias's gradient, which a compiler pipelines. tile: queries and keys of a tile; stages: entries
    in flight; registers: of a thread at most, for two programs to run side by side."""

    tile: int
    warps: int
    stages: int
    registers: int = 255

    def options(self) -> dict[str, int]:
        """For the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


BIAS = (
    (64, BiasConfig(tile=64, warps=8, stages=3, registers=128)),
    (128, BiasConfig(tile=64, warps=8, stages=2)),
    (256, BiasConfig(tile=64, warps=8, stages=1)),
)
"""By head dimension, as many stages as shared memory holds; chosen by spills and by what runs side by side alone."""

Config = HopperConfig | BackwardConfig | QueryConfig


QUERIES = (
    Row(64, None, QueryConfig(tile_kv=128, stages=3, stages_v=2, query_stages=2)),
    Row(128, None, QueryConfig(tile_kv=64, stages=3, stages_v=2, query_stages=2)),
    Row(192, None, QueryConfig(tile_kv=64, stages=3, stages_v=2), values=128),
    Row(256, None, QueryConfig(tile_kv=32, stages=4, stages_v=2)),
)
"""Tiles of the kernel for dQ, by head dimension: where a call wants the same bits every time, for short sequences, and
for wide heads. Timed on an H100, plain and causal, `query_stages` on an H200."""

_ADDED_64 = BackwardConfig(tile_q=128, stages=2)
_ADDED_64_APART = _ADDED_64._replace(apart=True)
_ADDED_128 = BackwardConfig(tile_q=64, stages=2, ahead=True)
_ADDED_128_APART = _ADDED_128._replace(apart=True)
_SHARED = BackwardConfig(tile_q=64, stages=2, tile_kv=64)
_WIDE = (
    Row(192, None, _SHARED._replace(stages=3, queries=QUERIES[2].config), values=128),
    Row(256, None, _SHARED._replace(queries=QUERIES[3].config)),
)

_MODIFIED_64 = BackwardConfig(tile_q=64, stages=3)


def _query_config(headdim: int, headdim_v: int | None) -> QueryConfig:
    config: QueryConfig = next(row.config for row in QUERIES if row.fits(headdim, headdim_v))
    return config


def _short_and_long(headdim: int, short: int, config: BackwardConfig) -> tuple[Row, Row]:
    """Up to `short` rows dQ has its own kernel: what it takes to add dQ up would be much of so little."""
    return Row(headdim, short, config._replace(queries=_query_config(headdim, None))), Row(headdim, None, config)


BACKWARD: dict[str, tuple[Row, ...]] = {
    "full": (*_short_and_long(64, 256, _ADDED_64_APART), *_short_and_long(128, 512, _ADDED_128_APART), *_WIDE),
    "causal": (*_short_and_long(64, 512, _ADDED_64_APART), *_short_and_long(128, 768, _ADDED_128), *_WIDE),
    "plain": (Row(64, None, _ADDED_64), Row(128, None, _ADDED_128), *_WIDE),
    "packed_causal": (Row(64, None, _ADDED_64), Row(128, None, _ADDED_128_APART)),
    "alibi": (Row(64, None, _MODIFIED_64._replace(ahead=True, apart=True)), Row(128, None, _ADDED_128_APART), *_WIDE),
    "added": (Row(64, None, _MODIFIED_64._replace(ahead=True)),),
    "modified_full": (Row(64, None, _MODIFIED_64), Row(128, None, _ADDED_128)),
    "modified": (Row(64, None, _MODIFIED_64), Row(128, None, BackwardConfig(tile_q=64, stages=2)), *_WIDE),
}
"""By what the scores meet: nothing; a window that ends on the right alone, in batches; another mask; such a window in
packed sequences; then, under one of the first two masks, ALiBi alone, a function alone that only adds, and, without a
mask, any other change but functions and dropout; anything. The first row that fits counts. All but the last are timed;
that one has the registers that the way back through a function needs."""


CACHED = 32 << 20
"""Bytes that may be expected to stay in the L2 cache, of 50 MB, while tiles of the same heads read them again."""


def _by_length(
    table: Mapping[str, Iterable[Row]], kind: str, headdim: int, headdim_v: int | None
) -> dict[int | None, Any]:
    """Those for the narrowest heads that are wide enough, by `longest`, of the kind or the `COARSER` that has some."""
    fitting = [row for row in table.get(kind, ()) if row.fits(headdim, headdim_v)]
    if not fitting:
        return _by_length(table, COARSER[kind], headdim, headdim_v)
    return {row.longest: row.config for row in fitting if row.headdim == fitting[0].headdim}


def _first_long_enough(configs: dict[int | None, Any], length: float) -> Any:
    return next(config for longest, config in configs.items() if longest is None or length <= longest)


def backward_configs(
    headdim: int, kind: str, apart: bool = False, headdim_v: int | None = None
) -> dict[int | None, BackwardConfig]:
    """The tiles for heads of so many columns, their values of `headdim_v` or as many, and a kind of `BACKWARD`, by
    `longest`. apart: dQ is to have its own kernel."""
    found = _by_length(BACKWARD, kind, headdim, headdim_v)
    if apart:
        queries = _query_config(headdim, headdim_v)
        found = {longest: config._replace(queries=queries) for longest, config in found.items()}
    return found


def backward_config(
    headdim: int, kind: str, length: float, apart: bool = False, headdim_v: int | None = None
) -> BackwardConfig:
    """Those for this many queries and keys at most."""
    config: BackwardConfig = _first_long_enough(backward_configs(headdim, kind, apart, headdim_v), length)
    return config


def bias_config(headdim: int) -> BiasConfig:
    """That for heads of this many columns, the wider of keys and values."""
    return next(config for limit, config in BIAS if headdim <= limit)


def forward_configs(headdim: int, kind: str, headdim_v: int | None = None) -> dict[int | None, HopperConfig]:
    """The tiles for heads of so many columns, their values of `headdim_v` or as many, and a kind of `FORWARD`, by
    `longest`."""
    return _by_length(FORWARD, kind, headdim, headdim_v)


def forward_config(headdim: int, kind: str, queries: int, headdim_v: int | None = None) -> HopperConfig:
    """Those for this many queries."""
    config: HopperConfig = _first_long_enough(forward_configs(headdim, kind, headdim_v), queries)
    return config
