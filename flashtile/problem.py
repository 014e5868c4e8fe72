"""Problem and Inputs: one attention call, as the planner and the backends see it.

`Problem` is the frozen, hashable description (shapes, dtypes, mask, scores, gradients wanted): what a plan may depend
on. `Inputs` holds the call's tensors. Both describe dense and packed (varlen) calls.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import facts
from flashtile.region import region


class Inputs(NamedTuple):
    """The tensors of one call; an absent feature is None or an empty tuple.

    scaled: the scales of 8-bit q, k and v, whose values then are `turned` unless packed (see `flashtile.scaled`); and
    behind them the tensors that those were rounded from, where gradients are wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    mask: tuple[Tensor, ...] = ()
    score: tuple[Tensor, ...] = ()
    scaled: tuple[Tensor, ...] = ()

    @property
    def headdim_v(self) -> int:
        """Columns of a value."""
        return self.v.shape[-2 if self.scaled and self.cu_seqlens_q is None else -1]

    def exact(self) -> "Inputs":
        """The call in the precision that gradients are computed in."""
        if len(self.scaled) <= 3:
            return self
        q, k, v = self.scaled[3:]
        return self._replace(q=q, k=k, v=v, scaled=())


class CacheTensors(NamedTuple):
    """The tensors of a call over a KV cache beside its `Inputs`, whose k and v are the cache itself.

    seqlens (batch,): rows of each sequence that are in the cache before the call. k, v: rows to append, (batch,
    seqlen_new, heads_kv, d). batch_idx, leftpad (batch,); block_table (rows, pages of a sequence). All int32 or int64.
    k_scale, v_scale: float32, what a quantised cache's numbers are multiplied by, (heads_kv,) or (pages, heads_kv).
    """

    seqlens: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    batch_idx: Tensor | None = None
    leftpad: Tensor | None = None
    block_table: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


INT4 = torch.uint8
"""How a cache holds four-bit integers: byte j of a row has column 2j in its low bits and column 2j + 1 in its high
ones, each from -8 to 7 in two's complement."""


def columns(cache: Tensor) -> int:
    """Of a row of a cache, as queries see it."""
    return cache.shape[-1] * (2 if cache.dtype is INT4 else 1)


class Wanted(NamedTuple):
    """Which gradients the backward pass must produce; q, k and v come together."""

    bias: bool = False
    alibi_slopes: bool = False
    sinks: bool = False
    score: tuple[bool, ...] = ()

    @property
    def more(self) -> bool:
        """Whether anything has a gradient beside q, k and v."""
        return self.bias or self.alibi_slopes or self.sinks or any(self.score)


@dataclass(frozen=True)
class Cached:
    """What a plan may depend on of a KV cache, whose capacity is the Problem's seqlen_kv.

    page: rows of a page, 0: sequences lie in one piece. appended: rows that the call adds to each sequence. rotary:
    columns that are turned, in pairs side by side (`interleaved`) or half of them apart. splits: parts that the keys
    are cut into, None: the plan's choice. stored: the dtype of a quantised cache, None: the queries'. by_page: it has
    scales for each page. padded: sequences may begin behind the first row. latent: values are the first columns of the
    keys, in the same memory.
    """

    page: int = 0
    appended: int = 0
    rotary: int = 0
    interleaved: bool = True
    splits: int | None = None
    stored: torch.dtype | None = None
    by_page: bool = False
    padded: bool = False
    latent: bool = False


@dataclass(frozen=True)
class Problem:
    """What a plan may depend on. Two calls with equal Problems run the same kernel with the same configuration.

    described: rows of q, k and v begin at multiples of 16 bytes, no two of them at one, as copy engines ask.
    arch: of the GPU that the tensors lie on (see `facts.arch`): a machine may have several kinds.
    scaled: of 8-bit inputs, the rows that share a scale: those of a "head", or of a "block"; "": there are no scales.
    """

    batch: int
    seqlen_q: int
    seqlen_kv: int
    heads: int
    heads_kv: int
    headdim: int
    headdim_v: int
    dtype: torch.dtype
    device: str
    varlen: bool = False
    mask: str = '["full"]'
    score_mod: str = ""
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    bias: bool = False
    alibi: bool = False
    sinks: bool = False
    alignment: str = "bottom_right"
    out_dtype: torch.dtype = torch.float32
    deterministic: bool = False
    batch_invariant: bool = False
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    described: bool = True
    scaled: str = ""
    backward: bool = False
    wanted: Wanted = field(default_factory=Wanted)
    cached: Cached | None = None
    arch: str = ""

    @property
    def packed_eight(self) -> bool:
        """Packed sequences of 8 bits, whose blocks of a scale and groups of values begin anywhere in a sequence."""
        return self.varlen and bool(self.scaled)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.heads_kv

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of scores, sums and log-sum-exps."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def modified(self) -> tuple[str, ...]:
        """The names of the score features in use."""
        names = {
            "softcap": self.softcap > 0,
            "bias": self.bias,
            "alibi_slopes": self.alibi,
            "score_mod": bool(self.score_mod),
            "sinks": self.sinks,
            "dropout_p": self.dropout_p > 0,
        }
        return tuple(name for name, used in names.items() if used)

    def one_sequence(self, seqlen_q: int, seqlen_kv: int) -> "Problem":
        """The dense Problem of one sequence, packed or cached."""
        return replace(self, batch=1, varlen=False, cached=None, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)


@dataclass(frozen=True)
class Options:
    """The static options of a call, as they travel through the operator. `max_seqlen_*`: promises of packed calls.

    sharding: "" or a name that `flashtile.sharding` knows: q, k and v are this process's share of longer sequences.
    scaled: see `Problem`.
    """

    mask: str = '["full"]'
    score_mod: str = ""
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    alignment: str = "bottom_right"
    out_dtype: torch.dtype = torch.float32
    deterministic: bool = False
    batch_invariant: bool = False
    backend: str | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    sharding: str = ""
    scaled: str = ""


def describe(inputs: Inputs, options: Options, backward: bool = False, wanted: Wanted | None = None) -> Problem:
    """The Problem that these inputs and options pose. Packed lengths are upper bounds (no tensor is read)."""
    q, k, v = inputs.q, inputs.k, inputs.v
    varlen = inputs.cu_seqlens_q is not None
    return Problem(
        batch=len(inputs.cu_seqlens_q) - 1 if inputs.cu_seqlens_q is not None else q.shape[0],
        seqlen_q=q.shape[-3],
        seqlen_kv=k.shape[-3],
        heads=q.shape[-2],
        heads_kv=k.shape[-2],
        headdim=q.shape[-1],
        headdim_v=inputs.headdim_v,
        dtype=q.dtype,
        device=q.device.type,
        varlen=varlen,
        mask=options.mask,
        score_mod=options.score_mod,
        scale=options.scale,
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        bias=inputs.bias is not None,
        alibi=inputs.alibi_slopes is not None,
        sinks=inputs.sinks is not None,
        alignment=options.alignment,
        out_dtype=options.out_dtype,
        deterministic=options.deterministic,
        batch_invariant=options.batch_invariant,
        max_seqlen_q=options.max_seqlen_q,
        max_seqlen_k=options.max_seqlen_k,
        described=all(map(described, (q, k, v))),
        scaled=options.scaled if inputs.scaled else "",
        backward=backward,
        wanted=wanted or Wanted(),
        arch=facts.arch(q.device),
    )


def describe_cached(
    inputs: Inputs, cache: CacheTensors, options: Options, interleaved: bool = True, splits: int | None = None
) -> Problem:
    """The Problem of a call over a KV cache. Lengths are on the device: the cache's capacity stands for them."""
    table = cache.block_table
    cached = Cached(
        page=0 if table is None else inputs.k.shape[1],
        appended=0 if cache.k is None else cache.k.shape[1],
        rotary=0 if cache.rotary_cos is None else 2 * cache.rotary_cos.shape[1],
        interleaved=interleaved,
        splits=splits,
        stored=inputs.k.dtype if inputs.k.dtype is not inputs.q.dtype else None,
        by_page=cache.k_scale is not None and cache.k_scale.ndim == 2,
        padded=cache.leftpad is not None,
        latent=shares_memory(inputs.k, inputs.v),
    )
    problem = describe(inputs, options)
    window = region(options.mask)
    counted = window.left is not None or window.right is not None
    room = capacity(inputs.k, table, cache.rotary_cos, ahead(inputs.q, cached.appended, counted))
    described = cached.latent and problem.described
    return replace(problem, seqlen_kv=room, headdim_v=columns(inputs.v), described=described, cached=cached)


def shares_memory(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether values are the first columns of the keys: multi-head latent attention (DeepSeek-V2, section 2.1)."""
    return k_cache.data_ptr() == v_cache.data_ptr() and k_cache.stride() == v_cache.stride()


def capacity(k_cache: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None = None, ahead: int = 0) -> int:
    """Rows that a sequence may have: those of the cache for which, and for queries so far `ahead`, there are angles."""
    rows = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return rows if rotary_cos is None else min(rows, rotary_cos.shape[0] - ahead)


def ahead(q: Tensor, appended: int, counted: bool) -> int:
    """How far past the last new row queries are turned to: of more queries than new rows, where places are counted."""
    return max(0, q.shape[1] - appended) if counted else 0


def described(tensor: Tensor) -> bool:
    """Whether the first element and every row lie at multiples of 16 bytes, no two at one, columns side by side."""
    *rows, column = tensor.stride()
    size = tensor.element_size()
    elsewhere = [stride for stride in rows if stride <= 0 or stride * size % 16]
    return column == 1 and not elsewhere and tensor.data_ptr() % 16 == 0
