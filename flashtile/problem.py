"""Problem and Inputs: one attention call, as the planner and the backends see it.

`Problem` is the frozen, hashable description (shapes, dtypes, mask, scores, gradients wanted): what a plan may depend
on. `Inputs` holds the call's tensors. Both describe dense and packed (varlen) calls.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of one call; an absent feature is None or an empty tuple."""

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


class Wanted(NamedTuple):
    """Which gradients the backward pass must produce; q, k and v come together."""

    bias: bool = False
    alibi_slopes: bool = False
    sinks: bool = False
    score: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What a plan may depend on. Two calls with equal Problems run the same kernel with the same configuration.

    described: rows of q, k and v begin at multiples of 16 bytes, no two of them at one, as copy engines ask.
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
    backward: bool = False
    wanted: Wanted = field(default_factory=Wanted)

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
        """The dense Problem of one packed sequence."""
        return replace(self, batch=1, varlen=False, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)


@dataclass(frozen=True)
class Options:
    """The static options of a call, as they travel through the operator. `max_seqlen_*`: promises of packed calls.

    sharding: "" or a name that `flashtile.sharding` knows: q, k and v are this process's share of longer sequences.
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
        headdim_v=v.shape[-1],
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
        backward=backward,
        wanted=wanted or Wanted(),
    )


def described(tensor: Tensor) -> bool:
    """Whether the first element and every row lie at multiples of 16 bytes, no two at one, columns side by side."""
    size = tensor.element_size()
    rows = all(stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    return rows and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
