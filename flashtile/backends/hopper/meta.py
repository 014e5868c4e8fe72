"""What the kernels are compiled for, beside types."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from flashtile import lower
from flashtile.kernels.arguments import exact, modified
from flashtile.problem import Problem
from flashtile.region import region
from flashtile.scaled import GROUP, KEYS
from flashtile.tuning.hopper import BackwardConfig, Config, HopperConfig, QueryConfig

LIFT = 8
"""Weights of 8 bits are at most 2^8: below 448, the largest number of e4m3, whose smallest are 2^-9."""


STRIP = 64
"""Columns of each of several strips."""


@dataclass(frozen=True)
class Meta:
    """What a kernel is compiled for, beside types and which fields are None: see the configs of `tuning.hopper`.

    strips, strip: how many queries and keys lie in, in shared memory, and the columns of one; see `strips`.
    masked: where the mask is evaluated: at the "edges" of a window's span, "always", or as "lists" of tiles say.
    exact, precision: for kernels that take float32 too, see `rules.capped`. left, right: whether the window ends there.
    sections: tiles of several heads are handed out together.
    dense: 1, or 0 where sequences are packed: what a batch entry's number is multiplied with to find its memory.
    halves: the columns of the output leave one half after the other. wide: they leave as float32. turns: warpgroups
    start their products one after the other. query_stages, rows, early: see `HopperConfig`. guarded: what a mask hides,
    or a function that does not only add, may hold NaN or have no finite gradient. careful: what lies beside what is
    seen may hold NaN. collects: this kernel adds gradients of captured tensors. slope_gradient: and this one gives
    those of ALiBi's slopes. apart, ahead: see the configs. lean: see `backward.walk_some`. adds: the kernel of keys
    adds up dQ. for_dq: this is the kernel of dQ alone. split: two warpgroups share 64 keys. stages_v: slots for values,
    where they are not as many as those for keys.
    eight: inputs have 8 bits; scaled: which rows of them share a scale, see `Problem`; lift: see `softmax`.
    parts: columns are never cut, see `kernels.tiles.dots`.
    """

    tile_q: int
    tile_kv: int
    consumers: int
    stages: int
    stages_v: int
    headdim: int
    headdim_v: int
    block_d: int
    block_dv: int
    strips: int
    strip: int
    group: int
    modified: bool
    exact: bool
    precision: str
    reversed: bool
    sections: bool
    window_top_left: bool
    alibi_top_left: bool
    masked: str
    left: bool
    right: bool
    dense: int
    packed: bool
    halves: bool
    wide: bool
    turns: bool
    query_stages: int
    rows: bool
    early: bool
    guarded: bool
    careful: bool
    collects: bool
    slope_gradient: bool
    apart: bool
    ahead: bool
    lean: bool
    adds: bool
    for_dq: bool
    split: bool
    eight: bool
    scaled: str
    lift: int
    parts: int = 1

    @property
    def depth(self) -> int:
        """Terms that one instruction sums up."""
        return 32 if self.eight else 16

    @property
    def keys_late(self) -> int:
        """Steps after their own at whose end keys are free: for dQ they are multiplied once more, with what the step
        after made of their scores."""
        return int(self.for_dq)

    @property
    def values_late(self) -> int:
        """Likewise of values, which are multiplied one step after their keys; `early` has a word for each of both."""
        return int(not self.for_dq and not self.early)

    @property
    def aligned(self) -> int:
        """What tiles of keys begin at multiples of, counted from the first row of all packed sequences; 1: they begin
        where their sequence does. Groups of values on their side and blocks of a scale know nothing of sequences."""
        if not (self.eight and self.packed):
            return 1
        return KEYS if self.scaled == "block" else GROUP

    @property
    def asked(self) -> str:
        """Where steps after the first evaluate the mask, see `rules.ruled`."""
        if self.masked == "always":
            return "always"
        some = self.left or self.right or self.masked == "lists" or self.aligned > 1
        return "edges" if some else "never"


@lru_cache(maxsize=4096)
def meta_of(problem: Problem, config: Config, listed: bool) -> Meta:
    left, right, top_left, rest = region(problem.mask)
    # Sums over what functions captured leave out what the mask hides, so the mask is asked everywhere.
    always = bool(rest) or any(problem.wanted.score)
    adds = isinstance(config, BackwardConfig) and config.queries is None
    for_dq = isinstance(config, QueryConfig)
    # Then the first tile of a sequence may begin in front of it.
    in_blocks = problem.packed_eight
    strips = _strips(problem)
    return Meta(
        tile_q=config.tile_q,
        tile_kv=config.tile_kv,
        consumers=config.consumers,
        stages=config.stages,
        stages_v=config.stages_v if isinstance(config, QueryConfig) else config.stages,
        headdim=problem.headdim,
        headdim_v=problem.headdim_v,
        block_d=block(problem.headdim),
        block_dv=block(problem.headdim_v),
        strips=strips,
        strip=block(problem.headdim) if strips == 1 else STRIP,
        group=problem.group,
        modified=modified(problem),
        exact=exact(problem),
        precision="ieee",
        reversed=right is not None and not listed,
        sections=right is not None or listed,
        window_top_left=top_left,
        alibi_top_left=problem.alignment == "top_left",
        masked="lists" if listed else "always" if always else "edges",
        left=left is not None,
        right=right is not None,
        dense=int(not problem.varlen),
        packed=problem.varlen,
        halves=isinstance(config, HopperConfig) and config.halves and block(problem.headdim_v) > 64,
        wide=isinstance(config, HopperConfig) and problem.out_dtype is torch.float32,
        turns=isinstance(config, HopperConfig) and config.turns,
        query_stages=1 if isinstance(config, BackwardConfig) else config.query_stages,
        rows=isinstance(config, HopperConfig) and config.rows,
        early=isinstance(config, HopperConfig) and config.early,
        guarded=bool(rest) or (bool(problem.score_mod) and not lower.only_adds(problem.score_mod)),
        careful=bool(rest) or problem.varlen,
        collects=any(problem.wanted.score) and (adds or for_dq),
        slope_gradient=problem.wanted.alibi_slopes and for_dq,
        apart=_apart(config, problem) and left is None and not in_blocks,
        ahead=isinstance(config, BackwardConfig) and config.ahead and problem.group == 1,
        lean=not problem.bias,
        adds=adds,
        for_dq=for_dq,
        split=isinstance(config, BackwardConfig) and config.tile_kv == 64,
        eight=bool(problem.scaled),
        scaled=problem.scaled,
        lift=LIFT if problem.scaled else 0,
    )


def _apart(config: Config, problem: Problem) -> bool:
    """As the table says; of rows that also multiply `ahead` this holds where that does."""
    if isinstance(config, BackwardConfig) and config.ahead and problem.group > 1:
        return False
    return isinstance(config, HopperConfig | BackwardConfig) and config.apart


def _strips(problem: Problem) -> int:
    """See `strips`; of 8 bits a strip would have half the bytes that the copy engine moves at a time."""
    return 3 if 2 * STRIP < problem.headdim <= 3 * STRIP and not problem.scaled else 1


def block(headdim: int) -> int:
    """Columns of a tile: a power of two; the copy engine fills what the tensor lacks with zeros."""
    return max(64, 1 << (headdim - 1).bit_length())
