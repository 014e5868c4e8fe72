"""What is asked of every peer: a shape, a dtype and one feature, with random inputs from a fixed seed.

A feature says what it asks for twice: in flashtile's words (`options`), and as what PyTorch's attention takes (`rule`,
a dense bool mask; `added`, a tensor that joins the scores). With `dense` False it cannot be put to PyTorch's attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import masks

WINDOW = 512
"""Keys to the left that the windowed feature sees."""

SOFTCAP = 5.0

DOCUMENT = 700
"""Mean length of the packed documents; lengths are drawn from a fixed seed."""


@dataclass(frozen=True)
class Case:
    """One attention call. inputs: "normal", or with "outliers". headdim_v: of values, 0: as many as of keys."""

    feature: str = "plain"
    batch: int = 1
    seqlen: int = 1024
    heads: int = 8
    heads_kv: int = 8
    headdim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    inputs: str = "normal"
    headdim_v: int = 0

    @property
    def columns(self) -> int:
        """Of values and outputs."""
        return self.headdim_v or self.headdim

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
    """How to ask for it; see the module's description. `common`: errors are measured of it too."""

    options: Callable[[Case], dict[str, Any]] = lambda case: {}
    rule: Callable[[Case, Tensor, Tensor], Tensor] | None = None
    added: Callable[[Case], Tensor] | None = None
    dense: bool = True
    common: bool = True


def tensors(case: Case) -> Tensors:
    """Inputs as the case asks for, and a normal gradient; the same on every device."""
    queries = (case.batch, case.seqlen, case.heads, case.headdim)
    keys = (case.batch, case.seqlen, case.heads_kv, case.headdim)
    values, outputs = (*keys[:-1], case.columns), (*queries[:-1], case.columns)
    generator = torch.Generator().manual_seed(case.seqlen)
    draw = with_outliers if case.inputs == "outliers" else normal
    drawn = [draw(queries, generator), draw(keys, generator), draw(values, generator), normal(outputs, generator)]
    return Tensors(*(tensor.to(case.device, case.torch_dtype) for tensor in drawn))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def with_outliers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 1) + N(0, 100) Bernoulli(0.001): section 4.3 of the FlashAttention-3 paper."""
    usual, large = torch.randn(2, *shape, generator=generator)
    rare = torch.rand(shape, generator=generator) < 0.001
    return usual + 10.0 * large * rare


@lru_cache(maxsize=16)
def document_lengths(seqlen: int) -> Tensor:
    """Lengths of packed documents, drawn evenly between a fifth and nine fifths of `DOCUMENT`."""
    generator = torch.Generator().manual_seed(seqlen)
    mean = min(DOCUMENT, max(5, seqlen // 4))
    return _cut(torch.randint(mean // 5, mean * 9 // 5 + 1, (seqlen,), generator=generator), seqlen)


@lru_cache(maxsize=16)
def packed_lengths(seqlen: int) -> Tensor:
    """Long-tailed lengths of sequences that share a batch: log-normal, the longest several times the mean."""
    generator = torch.Generator().manual_seed(seqlen)
    drawn = torch.exp(torch.randn(seqlen, generator=generator)) * max(1, seqlen // 32)
    return _cut(drawn.long().clamp(min=1, max=max(1, seqlen // 4)), seqlen)


def _cut(lengths: Tensor, seqlen: int) -> Tensor:
    """The first of these lengths, the last one cut, so that they add up to seqlen."""
    begins = lengths.cumsum(0) - lengths
    kept = begins < seqlen
    return torch.minimum(lengths[kept], seqlen - begins[kept])


def lengths(case: Case) -> Tensor:
    """Of the documents or sequences that the feature packs; one for all others."""
    if "packed" in case.feature:
        return packed_lengths(case.seqlen)
    return document_lengths(case.seqlen) if "document" in case.feature else torch.tensor([case.seqlen])


def document_ids(case: Case) -> Tensor:
    """The document of each token."""
    found = lengths(case)
    return torch.repeat_interleave(torch.arange(len(found)), found).to(case.device)


def _documents(case: Case) -> masks.Mask:
    return masks.document(document_ids(case))


def _same_document(case: Case, query: Tensor, key: Tensor) -> Tensor:
    ids = document_ids(case)
    return ids[query] == ids[key]


def _causal_document(case: Case, query: Tensor, key: Tensor) -> Tensor:
    return _same_document(case, query, key) & (key <= query)


BLOCK = 128


def block_table(case: Case) -> Tensor:
    """bool (blocks, blocks): the diagonal, and of the others a share, such as the 1/8 in `blocks 1/8`, at random."""
    count = -(-case.seqlen // BLOCK)
    share = 1 / int(case.feature.partition("/")[2])
    generator = torch.Generator().manual_seed(case.seqlen)
    chosen = (torch.rand(count, count, generator=generator) < share) | torch.eye(count, dtype=torch.bool)
    return chosen.to(case.device)


def _in_blocks(case: Case, query: Tensor, key: Tensor) -> Tensor:
    return block_table(case)[query // BLOCK, key // BLOCK]


def _blocks(case: Case) -> dict[str, Any]:
    return {"mask": masks.block(block_table(case)[None, None], (BLOCK, BLOCK))}


def reach_of(case: Case) -> int:
    """Keys that a window sees to the left: `window 2048`, or the usual `window`."""
    return int(case.feature.removeprefix("window") or WINDOW)


def _in_window(case: Case, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key >= query - reach_of(case))


def _window(case: Case) -> dict[str, Any]:
    return {"causal": True, "window": (reach_of(case), 0)}


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
    "window": Feature(options=_window, rule=_in_window),
    "document": Feature(options=lambda case: {"mask": _documents(case)}, rule=_same_document),
    "causal document": Feature(options=lambda case: {"causal": True, "mask": _documents(case)}, rule=_causal_document),
    "alibi": Feature(options=lambda case: {"alibi_slopes": slopes(case)}, added=_distances),
    "bias": Feature(options=lambda case: {"bias": _bias(case)}, added=_bias),
    "softcap": Feature(options=lambda case: {"softcap": SOFTCAP}, dense=False),
    "sinks": Feature(options=lambda case: {"sinks": _sinks(case)}, dense=False),
    "causal document softcap": Feature(
        options=lambda case: {"causal": True, "mask": _documents(case), "softcap": SOFTCAP}, dense=False, common=False
    ),
    "packed causal": Feature(
        options=lambda case: {"causal": True, "mask": _documents(case)}, rule=_causal_document, common=False
    ),
    **{f"window {size}": Feature(options=_window, rule=_in_window, common=False) for size in (1024, 2048, 4096)},
    **{f"blocks 1/{n}": Feature(options=_blocks, rule=_in_blocks, common=False) for n in (2, 4, 8, 16)},
}


SPARSE = (
    *("plain", "causal", "window 4096", "window 2048", "window 1024", "window"),
    *("document", "causal document", "blocks 1/2", "blocks 1/4", "blocks 1/8", "blocks 1/16"),
)
"""Features by which a mask leaves less and less of the keys."""


def functions(case: Case) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """(mask_mod, score_mod) that say the feature in FlexAttention's way."""
    ids = document_ids(case)
    steep = slopes(case)
    # "window", "window 1024" and so on have one name here.
    name = "window" if case.feature.startswith("window") else case.feature
    reach = reach_of(case) if name == "window" else 0

    def same(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & (kv_idx <= q_idx)

    def capped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    mask_mods: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        "window": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= q_idx - reach),
        "document": lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx],
        "causal document": same,
        "causal document softcap": same,
    }
    score_mods: dict[str, Callable[..., Any]] = {
        "alibi": lambda score, b, h, q_idx, kv_idx: score - steep[h] * (q_idx - kv_idx).abs(),
        "softcap": capped,
        "causal document softcap": capped,
    }
    return mask_mods.get(name), score_mods.get(name)


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
    if case.feature.startswith("window"):
        return int(torch.arange(1, case.seqlen + 1).clamp(max=reach_of(case) + 1).sum())
    if case.feature.startswith("blocks"):
        sizes = torch.full((-(-case.seqlen // BLOCK),), BLOCK)
        sizes[-1] -= int(sizes.sum()) - case.seqlen
        return int(sizes @ block_table(replace(case, device="cpu")).long() @ sizes)
    found = lengths(case)
    return int((found * (found + 1) // 2 if "causal" in case.feature else found * found).sum())


def flops(case: Case, backward: bool) -> int:
    """Floating-point operations of the matrix products: two forward; five backward, where scores are made again."""
    columns = 3 * case.headdim + 2 * case.columns if backward else case.headdim + case.columns
    return 2 * case.batch * case.heads * columns * pairs(case)
