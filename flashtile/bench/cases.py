"""What is asked of every peer: a shape, a dtype and one feature, with random inputs from a fixed seed.

A feature says what it asks for twice: in flashtile's words (`options`), and as what PyTorch's attention takes (`rule`,
a dense bool mask; `added`, a tensor that joins the scores). With `dense` False it cannot be put to PyTorch's attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import masks

WINDOW = 512
"""Keys to the left that the windowed feature sees."""

DOCUMENT = 700
"""Mean length of the packed documents; lengths are drawn from a fixed seed."""


@dataclass(frozen=True)
class Case:
    """One attention call."""

    feature: str = "plain"
    batch: int = 1
    seqlen: int = 1024
    heads: int = 8
    heads_kv: int = 8
    headdim: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.heads_kv

    @property
    def matrix_bytes(self) -> int:
        """Size of one matrix of scores of all heads."""
        return self.batch * self.heads * self.seqlen**2 * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.feature} {self.seqlen} {self.dtype}"


class Tensors(NamedTuple):
    """The inputs of a case and the gradient at its output: (batch, seqlen, heads, headdim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @property
    def size(self) -> int:
        """Bytes of inputs and outputs: q, k, v and the output's gradient; the output and three gradients."""
        return 2 * sum(tensor.numel() * tensor.element_size() for tensor in self)


@dataclass(frozen=True)
class Feature:
    """How to ask for it; see the module's description."""

    options: Callable[[Case], dict[str, Any]] = lambda case: {}
    rule: Callable[[Case, Tensor, Tensor], Tensor] | None = None
    added: Callable[[Case], Tensor] | None = None
    dense: bool = True


def tensors(case: Case) -> Tensors:
    """Normal inputs; the same on every device."""
    queries = (case.batch, case.seqlen, case.heads, case.headdim)
    keys = (case.batch, case.seqlen, case.heads_kv, case.headdim)
    generator = torch.Generator().manual_seed(case.seqlen)
    drawn = [torch.randn(shape, generator=generator) for shape in (queries, keys, keys, queries)]
    return Tensors(*(tensor.to(case.device, case.torch_dtype) for tensor in drawn))


@lru_cache(maxsize=16)
def document_ids(seqlen: int) -> Tensor:
    """Ids of packed documents whose lengths are drawn evenly between a fifth and nine fifths of `DOCUMENT`."""
    generator = torch.Generator().manual_seed(seqlen)
    mean = min(DOCUMENT, max(5, seqlen // 4))
    lengths = torch.randint(mean // 5, mean * 9 // 5 + 1, (seqlen,), generator=generator)
    return torch.repeat_interleave(torch.arange(seqlen), lengths)[:seqlen]


def _documents(case: Case) -> masks.Mask:
    return masks.document(document_ids(case.seqlen).to(case.device))


def _same_document(case: Case, query: Tensor, key: Tensor) -> Tensor:
    ids = document_ids(case.seqlen).to(case.device)
    return ids[query] == ids[key]


def slopes(case: Case) -> Tensor:
    """ALiBi's geometric sequence."""
    powers = torch.arange(1, case.heads + 1, dtype=torch.float32, device=case.device)
    return torch.exp2(-8.0 * powers / case.heads)


def _distances(case: Case) -> Tensor:
    index = torch.arange(case.seqlen, device=case.device)
    return -slopes(case)[None, :, None, None] * (index[:, None] - index).abs()


def _bias(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, case.heads, case.seqlen, case.seqlen, generator=generator).to(case.device, case.torch_dtype)


def _sinks(case: Case) -> Tensor:
    return torch.linspace(-1.0, 3.0, case.heads, device=case.device)


FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "causal": Feature(options=lambda case: {"causal": True}, rule=lambda case, query, key: key <= query),
    "window": Feature(
        options=lambda case: {"causal": True, "window": (WINDOW, 0)},
        rule=lambda case, query, key: (key <= query) & (key >= query - WINDOW),
    ),
    "document": Feature(options=lambda case: {"mask": _documents(case)}, rule=_same_document),
    "causal document": Feature(
        options=lambda case: {"causal": True, "mask": _documents(case)},
        rule=lambda case, query, key: _same_document(case, query, key) & (key <= query),
    ),
    "alibi": Feature(options=lambda case: {"alibi_slopes": slopes(case)}, added=_distances),
    "bias": Feature(options=lambda case: {"bias": _bias(case)}, added=_bias),
    "softcap": Feature(options=lambda case: {"softcap": 5.0}, dense=False),
    "sinks": Feature(options=lambda case: {"sinks": _sinks(case)}, dense=False),
}


def functions(case: Case) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """(mask_mod, score_mod) that say the feature in FlexAttention's way."""
    ids = document_ids(case.seqlen).to(case.device)
    steep = slopes(case)
    mask_mods: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        "window": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= q_idx - WINDOW),
        "document": lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx],
        "causal document": lambda b, h, q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]) & (kv_idx <= q_idx),
    }
    score_mods: dict[str, Callable[..., Any]] = {
        "alibi": lambda score, b, h, q_idx, kv_idx: score - steep[h] * (q_idx - kv_idx).abs(),
        "softcap": lambda score, b, h, q_idx, kv_idx: 5.0 * torch.tanh(score / 5.0),
    }
    return mask_mods.get(case.feature), score_mods.get(case.feature)


def options(case: Case) -> dict[str, Any]:
    """The keyword arguments of `flashtile.attention`."""
    return FEATURES[case.feature].options(case)


@lru_cache(maxsize=2)
def allowed(case: Case) -> Tensor | None:
    """The dense bool mask (seqlen, seqlen), True for "may attend"; None where every query sees every key."""
    rule = FEATURES[case.feature].rule
    if rule is None:
        return None
    index = torch.arange(case.seqlen, device=case.device)
    return rule(case, index[:, None], index[None, :])


def added(case: Case) -> Tensor | None:
    """What joins the scores, in the case's dtype, (1, heads, seqlen, seqlen)."""
    make = FEATURES[case.feature].added
    return None if make is None else make(case).to(case.torch_dtype)


def pairs(case: Case) -> int:
    """(query, key) pairs of one head that attend: what the work is proportional to."""
    lengths = torch.bincount(document_ids(case.seqlen)) if "document" in case.feature else torch.tensor([case.seqlen])
    if "causal" in case.feature:
        return int((lengths * (lengths + 1) // 2).sum())
    if case.feature == "window":
        return int(torch.arange(1, case.seqlen + 1).clamp(max=WINDOW + 1).sum())
    return int((lengths * lengths).sum())


def flops(case: Case, backward: bool) -> int:
    """Floating-point operations of the matrix products: two forward; five backward, where scores are made again."""
    return (10 if backward else 4) * case.batch * case.heads * case.headdim * pairs(case)
