"""What the kernels are compiled for, beside types."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from flashtile.kernels.arguments import exact, modified
from flashtile.kernels.words import Rows
from flashtile.problem import INT4, Problem
from flashtile.region import region
from flashtile.scaled import KEYS
from flashtile.tuning.portable import Tiles


@dataclass(frozen=True)
class Meta:
    """What a kernel is compiled for, beside types and which fields are None.

    masked: where the mask is evaluated: at the "edges" of a window's span, "always", or as "lists" of tiles say.
    tma: tiles come through NVIDIA's tensor memory accelerator.
    gives: what the kernel of key tiles computes, "dk", "dv" or "both".
    repeats: a tile whose sums hold NaN is done again with care: it may come from what the mask hides.
    exact: what is cheap for half precision is too coarse, mostly because the inputs are float32.
    packed: sequences lie side by side, so that another one's numbers follow the end of one.
    page: rows of a page of the cache that keys lie in, 0: they lie in one piece; whole: every tile lies in one page.
    quantized: keys and values are of fewer bits than queries, and have scales.
    held: numbers that an element of the cache holds: 2 of four bits.
    rest: columns of queries and keys behind the first `headdim`, a tile of their own (`block_rest`); 0: none.
    latent: values are the first `headdim` columns of the keys.
    aside: rows that a product takes as columns are loaded that way round (`load_aside`), see `Tiles`.
    parts: into which the columns of queries and keys are cut, for warps to share (see `dots`); direct: each loads its
    own of what stays (see `load_kept`).
    eight: what becomes of 8-bit inputs: "products" of them, or "halves", of 16 bits, before; "": they have more.
    scaled: which rows of them share a scale, see `Problem`; turned: values lie on their side; lowered: one over what
    weights of 8 bits are multiplied by, as there are few small numbers of 8 bits.
    lean: what loops would compute alike each time is computed each time, and waits in no register for the next.
    """

    tile_q: int
    tile_kv: int
    headdim: int
    headdim_v: int
    block_d: int
    block_dv: int
    group: int
    precision: str
    modified: bool
    exact: bool
    reversed: bool
    window_top_left: bool
    alibi_top_left: bool
    masked: str
    repeats: bool
    tma: bool
    slope_gradient: bool
    gives: str
    packed: bool
    page: int
    whole: bool
    quantized: bool
    held: int
    rest: int
    block_rest: int
    latent: bool
    aside: bool
    parts: int
    direct: bool
    eight: str
    scaled: str
    turned: bool
    lowered: float
    lean: bool

    @property
    def mixed(self) -> bool:
        """Whether 8-bit keys of a tile may have several scales: only packed sequences begin within a block of them."""
        return self.scaled == "block" and (self.packed or KEYS % self.tile_kv != 0)


@lru_cache(maxsize=4096)
def meta_of(
    problem: Problem,
    tiles: Tiles,
    listed: bool,
    keys: bool,
    tma: bool,
    gives: str = "both",
    latent: bool = False,
    eight: str = "",
) -> Meta:
    """`listed`: tiles come from lists; `keys`: the kernel walks the queries of a key tile; the rest: see `Meta`."""
    place = region(problem.mask)
    main, rest = cut(problem)
    # Sums over what functions captured leave out what the mask hides, so the mask is asked everywhere.
    always = bool(place.rest) or any(problem.wanted.score)
    held = 2 if problem.cached is not None and problem.cached.stored is INT4 else 1
    # Triton 3.6 puts numbers taken out of 8 bytes a row into wrong places.
    narrowest = 16 * held
    return Meta(
        tile_q=tiles.tile_q,
        tile_kv=tiles.tile_kv,
        headdim=main,
        headdim_v=problem.headdim_v,
        block_d=block(main, narrowest),
        block_dv=block(problem.headdim_v, narrowest),
        group=problem.group,
        precision="ieee",  # for float32; AMD's compiler refuses others whatever the dtype
        modified=modified(problem),
        exact=exact(problem),
        reversed=place.right is not None and not keys and not listed,
        window_top_left=place.top_left,
        alibi_top_left=problem.alignment == "top_left",
        masked="lists" if listed else "always" if always else "edges",
        # A function's derivative may be infinite under the mask.
        repeats=bool(place.rest) or (problem.backward and bool(problem.score_mod)),
        tma=tma,
        slope_gradient=problem.wanted.alibi_slopes,
        gives=gives,
        packed=problem.varlen,
        page=problem.cached.page if problem.cached is not None else 0,
        whole=_whole(problem, tiles),
        quantized=problem.cached is not None and problem.cached.stored is not None,
        held=held,
        rest=rest,
        block_rest=block(rest, narrowest) if rest else 0,
        latent=latent,
        aside=tiles.aside and not tma and problem.cached is None,
        parts=tiles.parts,
        direct=tiles.direct,
        eight=eight,
        scaled=problem.scaled,
        turned=bool(problem.scaled) and not problem.varlen,
        lowered=2.0**-LIFT if eight == "products" else 1.0,
        lean=tiles.lean,
    )


def _whole(problem: Problem, tiles: Tiles) -> bool:
    """Not with scales by page, which rows of a tile have one by one."""
    cached = problem.cached
    if cached is None or not cached.page or cached.padded or cached.by_page:
        return False
    return cached.page % tiles.tile_kv == 0


LIFT = 7
"""Weights of 8 bits are at most 2^7: below 240, the largest number of e4m3fnuz."""

WIDEST = 512
"""Columns of a tile at most."""


def cut(problem: Problem) -> tuple[int, int]:
    """(columns of the first tile of a key, of the second): over a KV cache keys may be wider than one."""
    wide = problem.cached is not None and problem.headdim > WIDEST
    return (WIDEST, problem.headdim - WIDEST) if wide else (problem.headdim, 0)


def by_copy_engine(loaded: Sequence[Rows], there: bool | None) -> bool:
    """Whether the tensor memory accelerator is there (None: ask the device) and can read all of these tensors."""
    there = copy_engine(loaded[0].pointer.device) if there is None else there
    return there and all(map(_described, loaded))


def _described(rows: Rows) -> bool:
    """Whether the copy engine can read its tiles: 16-byte aligned rows."""
    size = rows.pointer.element_size()
    aligned = all(stride * size % 16 == 0 for stride in (rows.batch, rows.row, rows.head))
    return bool(aligned and rows.pointer.data_ptr() % 16 == 0)


@lru_cache
def copy_engine(device: torch.device) -> bool:
    """Whether the device has NVIDIA's tensor memory accelerator."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def block(headdim: int, least: int = 16) -> int:
    """Columns of a tile: a power of two, as Triton wants, and at least 16, as matrix instructions want."""
    return max(least, 1 << (headdim - 1).bit_length())
