"""Golden problems: named attention calls, each one a shape and a tuple of features.

A feature states twice what it asks for: in the library's words (`options`) and as a plain rule that the reference
understands (`spec`), so that a mask or a modifier that the library misreads cannot be misread the same way by the
oracle. Tests, the benchmark's correctness gate and the GPU suite draw from the same table.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from flashtile import masks

Tensors = dict[str, Tensor]
EXACT_ANYWAY = ("out_dtype", "deterministic", "batch_invariant")
"""Options that the reference has no word for: they do not change what is exact."""
Rule = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; `lengths_*` make it a packed one, and `used_*` say how much of each sequence is in use."""

    batch: int = 2
    seqlen_q: int = 70
    seqlen_kv: int = 90
    heads: int = 4
    heads_kv: int = 4
    headdim: int = 32
    headdim_v: int = 32
    lengths_q: tuple[int, ...] | None = None
    lengths_kv: tuple[int, ...] | None = None
    used_q: tuple[int, ...] | None = None
    used_kv: tuple[int, ...] | None = None

    @property
    def packed(self) -> bool:
        return self.lengths_q is not None

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.seqlen_q, self.seqlen_kv


def dense(batch: int, seqlen_q: int, seqlen_kv: int, heads: int, heads_kv: int, headdim: int, dv: int = 0) -> Shape:
    return Shape(batch, seqlen_q, seqlen_kv, heads, heads_kv, headdim, dv or headdim)


def packed(
    lengths_q: tuple[int, ...],
    lengths_kv: tuple[int, ...],
    heads: int = 4,
    heads_kv: int = 2,
    headdim: int = 32,
    used_q: tuple[int, ...] | None = None,
    used_kv: tuple[int, ...] | None = None,
) -> Shape:
    longest = max(lengths_q, default=0), max(lengths_kv, default=0)
    sizes = (len(lengths_q), *longest, heads, heads_kv, headdim, headdim)
    return Shape(*sizes, lengths_q, lengths_kv, used_q, used_kv)


class Draw:
    """Random tensors from a fixed seed, the same on every device."""

    def __init__(self, name: str, device: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.device = device

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator).to(self.device)

    def integers(self, high: int, *sizes: int) -> Tensor:
        return torch.randint(high, sizes, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Feature:
    """One option. All that is not differentiable is made in `fixed`, so that every precision sees the same.

    leaves: differentiable tensors beside q, k and v.
    fixed: anything else that both statements need (ids, tables of bools).
    options: keyword arguments of `flashtile.attention`, from (leaves and fixed) and the shape.
    spec: keyword arguments of `reference.attention`, where they differ; "rule" is a mask predicate.
    """

    options: Callable[[Tensors, Shape], dict[str, Any]] = lambda tensors, shape: {}
    spec: Callable[[Tensors, Shape], dict[str, Any]] | None = None
    leaves: Callable[[Shape, Draw], Tensors] = lambda shape, draw: {}
    fixed: Callable[[Shape, Draw], Tensors] = lambda shape, draw: {}
    reshape: Callable[[Shape], Shape] = lambda shape: shape


@dataclass(frozen=True)
class Case:
    """A golden problem.

    kernels: backend -> the kernel that must run; a backend that is not named may choose.
    lse_grad: a gradient arrives at the log-sum-exp too.
    shift: added to the logits through one more pair of q and k columns.
    """

    name: str
    shape: Shape
    features: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    kernels: Mapping[str, str] = field(default_factory=lambda: {"pytorch": "tiled"})
    lse_grad: bool = True
    shift: float = 0.0

    def __str__(self) -> str:
        return self.name

    def call(self, dtype: torch.dtype, device: str = "cpu") -> "Call":
        return make(self.name, self.shape, self.features, dtype, device, self.lse_grad, self.shift)


@dataclass(frozen=True)
class Call:
    """A Case's tensors in one dtype on one device."""

    shape: Shape
    features: tuple[Feature, ...]
    leaves: Tensors
    fixed: Tensors
    grads: Tensors

    @property
    def half(self) -> bool:
        return self.leaves["q"].dtype in (torch.float16, torch.bfloat16)

    def arguments(self, leaves: Tensors | None = None) -> dict[str, Any]:
        """Keyword arguments of `flashtile.attention`, built on `leaves` (default: the call's own)."""
        merged: dict[str, Any] = {}
        for feature in self.features:
            for key, value in feature.options({**self.fixed, **(leaves or self.leaves)}, self.shape).items():
                merged[key] = merged[key] & value if key == "mask" and key in merged else value
        return merged

    def specification(self, leaves: Tensors) -> dict[str, Any]:
        """Keyword arguments of `reference.attention`; rules are joined to one mask function."""
        merged: dict[str, Any] = {}
        rules: list[Rule] = []
        for feature in self.features:
            stated = (feature.spec or feature.options)({**self.fixed, **leaves}, self.shape)
            rules += [stated.pop("rule")] if "rule" in stated else []
            merged.update(stated)
        if rules:
            merged["mask"] = partial(_all_of, tuple(rules))
        return {key: value for key, value in merged.items() if key not in EXACT_ANYWAY}

    def packing(self) -> dict[str, Tensor]:
        """cu_seqlens_* and seqused_*; empty for a dense call."""
        if self.shape.lengths_q is None or self.shape.lengths_kv is None:
            return {}
        device = self.leaves["q"].device
        named = {"cu_seqlens_q": offsets(self.shape.lengths_q), "cu_seqlens_k": offsets(self.shape.lengths_kv)}
        used = {"seqused_q": self.shape.used_q, "seqused_k": self.shape.used_kv}
        named |= {name: torch.tensor(value, dtype=torch.int32) for name, value in used.items() if value is not None}
        return {name: tensor.to(device) for name, tensor in named.items()}


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _all_of(rules: tuple[Rule, ...], b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    allowed = rules[0](b, h, q_idx, kv_idx)
    for rule in rules[1:]:
        allowed = allowed & rule(b, h, q_idx, kv_idx)
    return allowed


def make(
    name: str,
    shape: Shape,
    features: tuple[str, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    lse_grad: bool = True,
    shift: float = 0.0,
) -> Call:
    """Draws the tensors of a call: standard normal, from a seed that depends on the name only."""
    return compose(name, shape, tuple(FEATURES[feature] for feature in features), dtype, device, lse_grad, shift)


def compose(
    name: str,
    shape: Shape,
    chosen: tuple[Feature, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    lse_grad: bool = True,
    shift: float = 0.0,
) -> Call:
    """`make` of features that no table names."""
    for feature in chosen:
        shape = feature.reshape(shape)
    draw = Draw(name, device)
    q, k, v, grad_out = (draw.normal(*sizes) for sizes in _sizes(shape))
    if shift:
        q[..., 0], k[..., 0] = math.copysign(1.0, shift), abs(shift) * shape.headdim**0.5
    grads = {"out": grad_out.to(dtype)}
    if lse_grad:
        grads["lse"] = draw.normal(*_lse_size(shape))
    leaves = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    fixed: Tensors = {}
    for feature in chosen:
        leaves |= feature.leaves(shape, draw)
        fixed |= feature.fixed(shape, draw)
    return Call(shape, chosen, leaves, fixed, grads)


def _sizes(shape: Shape) -> tuple[tuple[int, ...], ...]:
    rows_q, rows_kv = (shape.batch, shape.seqlen_q), (shape.batch, shape.seqlen_kv)
    if shape.lengths_q is not None and shape.lengths_kv is not None:
        rows_q, rows_kv = (sum(shape.lengths_q),), (sum(shape.lengths_kv),)  # type: ignore[assignment]
    return (
        (*rows_q, shape.heads, shape.headdim),
        (*rows_kv, shape.heads_kv, shape.headdim),
        (*rows_kv, shape.heads_kv, shape.headdim_v),
        (*rows_q, shape.heads, shape.headdim_v),
    )


def _lse_size(shape: Shape) -> tuple[int, ...]:
    if shape.lengths_q is not None:
        return shape.heads, sum(shape.lengths_q)
    return shape.batch, shape.heads, shape.seqlen_q


def _ids(shape: Shape, draw: Draw, ascending: bool) -> Tensors:
    ids = draw.integers(3, shape.batch, max(shape.seqlen_q, shape.seqlen_kv))
    return {"ids": ids.sort(-1).values if ascending else ids}


def _documents(tensors: Tensors, shape: Shape) -> dict[str, Any]:
    query_ids, key_ids = tensors["ids"][:, : shape.seqlen_q], tensors["ids"][:, : shape.seqlen_kv]
    return {"mask": masks.document(query_ids, key_ids)}


def _same_document(tensors: Tensors, shape: Shape) -> dict[str, Any]:
    ids = tensors["ids"]
    return {"rule": lambda b, h, q_idx, kv_idx: ids[b, q_idx] == ids[b, kv_idx]}


def _dilated(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return ((q_idx - kv_idx) % 3 == h % 3) | (kv_idx < 2)


def _flex_blocks(tensors: Tensors, shape: Shape) -> dict[str, Any]:
    sizes = shape.scores
    device = str(tensors["q"].device)
    return {"block_mask": create_block_mask(_dilated_band, *sizes, device=device, BLOCK_SIZE=(32, 16))}


def _dilated_band(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return ((q_idx - kv_idx).abs() < 20 + 10 * h) & ((kv_idx + b) % 4 != 1)


def _block_state(shape: Shape, draw: Draw) -> Tensors:
    rows, columns = -(-shape.seqlen_q // 16), -(-shape.seqlen_kv // 24)
    return {"blocks": draw.integers(3, shape.batch, shape.heads, rows, columns).to(torch.int8)}


def _in_block(tensors: Tensors, shape: Shape) -> dict[str, Any]:
    state = tensors["blocks"]

    def rule(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        block = state[b, h, q_idx // 16, kv_idx // 24]
        return (block == 2) | ((block == 1) & (kv_idx < 40))

    return {"rule": rule}


def _relative(tensors: Tensors, shape: Shape) -> dict[str, Any]:
    table, gain = tensors["table"], tensors["gain"]

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = (q_idx - kv_idx).clamp(-8, 8) + 8
        return score * gain[h] + table[h, distance]

    return {"score_mod": score_mod}


def _bias(*present: int) -> Feature:
    """`present`: 1 where the bias has the full size, 0 where it broadcasts."""

    def leaves(shape: Shape, draw: Draw) -> Tensors:
        return {"bias": draw.normal(*(size if full else 1 for size, full in zip(shape.scores, present, strict=True)))}

    return Feature(lambda tensors, shape: {"bias": tensors["bias"]}, leaves=leaves)


def _shared_bias(*present: int) -> Feature:
    """Of five dimensions: two entries of twice the batch share one of the bias."""

    def leaves(shape: Shape, draw: Draw) -> Tensors:
        sizes = (size if full else 1 for size, full in zip(shape.scores[1:], present, strict=True))
        return {"bias": draw.normal(shape.batch // 2, 1, *sizes)}

    return Feature(
        lambda tensors, shape: {"bias": tensors["bias"]},
        leaves=leaves,
        reshape=lambda shape: replace(shape, batch=2 * shape.batch),
    )


def _leaf(option: str, scale: float, per_batch: bool = False) -> Feature:
    def leaves(shape: Shape, draw: Draw) -> Tensors:
        sizes = (shape.batch, shape.heads) if per_batch else (shape.heads,)
        return {option: draw.normal(*sizes).abs() * scale}

    return Feature(lambda tensors, shape: {option: tensors[option]}, leaves=leaves)


def _plain(**options: Any) -> Feature:
    return Feature(lambda tensors, shape: dict(options))


def _masked(mask: Callable[[Tensors, Shape], masks.Mask], rule: Rule) -> Feature:
    return Feature(lambda t, s: {"mask": mask(t, s)}, lambda t, s: {"rule": rule})


def _prefix_rule(tensors: Tensors, shape: Shape) -> dict[str, Any]:
    lengths = tensors["lengths"]
    return {"rule": lambda b, h, q_idx, kv_idx: kv_idx < lengths[b]}


def _pack(shape: Shape) -> Shape:
    """The shape's batch as packed sequences of falling lengths, one of them without keys."""
    lengths_q = (shape.seqlen_q, *(max(1, shape.seqlen_q // (i + 2)) for i in range(shape.batch - 1)), 3)
    lengths_kv = (shape.seqlen_kv, *(max(1, shape.seqlen_kv // (i + 2)) for i in range(shape.batch - 1)), 0)
    return replace(shape, batch=shape.batch + 1, lengths_q=lengths_q, lengths_kv=lengths_kv)


SEED = 0x1234_5678_9ABC

FEATURES: dict[str, Feature] = {
    "causal": _plain(causal=True),
    "causal_top_left": _plain(causal=True, alignment="top_left"),
    "window": _plain(window=(17, 5)),
    "window_left": _plain(window=(9, None)),
    "window_top_left": _plain(window=(20, 3), alignment="top_left"),
    "scale": _plain(scale=0.3),
    "softcap": _plain(softcap=3.0),
    "dropout": _plain(dropout_p=0.3, seed=SEED),
    "out_float32": _plain(out_dtype=torch.float32),
    "deterministic": _plain(deterministic=True),
    "bias": _bias(1, 1, 1, 1),
    "bias_heads": _bias(0, 1, 1, 1),
    "bias_keys": _bias(1, 0, 0, 1),
    "bias_queries": _bias(0, 1, 1, 0),
    "bias_shared": _shared_bias(1, 1, 1),
    "bias_shared_keys": _shared_bias(1, 0, 1),
    "alibi": _leaf("alibi_slopes", 0.2),
    "alibi_batch": _leaf("alibi_slopes", 0.2, per_batch=True),
    "sinks": _leaf("sinks", 2.0),
    "score_mod": Feature(
        _relative, leaves=lambda shape, draw: {"table": draw.normal(shape.heads, 17), "gain": draw.normal(shape.heads)}
    ),
    "chunk": _masked(lambda t, s: masks.chunk(24, "top_left"), lambda b, h, q, kv: q // 24 == kv // 24),
    "prefix": _masked(lambda t, s: masks.prefix(33), lambda b, h, q, kv: kv < 33),
    "prefix_none": _masked(lambda t, s: masks.prefix(0), lambda b, h, q, kv: kv < 0),
    "padding": Feature(
        lambda tensors, shape: {"mask": masks.prefix(tensors["lengths"])},
        _prefix_rule,
        fixed=lambda shape, draw: {"lengths": draw.integers(shape.seqlen_kv + 1, shape.batch)},
    ),
    "prefix_lm": _masked(
        lambda t, s: masks.causal("top_left") | masks.prefix(20), lambda b, h, q, kv: (kv <= q) | (kv < 20)
    ),
    "band": _masked(lambda t, s: masks.Mask('["band",-40,-5]'), lambda b, h, q, kv: (kv - q >= -40) & (kv - q <= -5)),
    "far_apart": _masked(
        lambda t, s: masks.window(4, 4, "top_left") | masks.prefix(5),
        lambda b, h, q, kv: ((q - kv).abs() <= 4) | (kv < 5),
    ),
    "document": Feature(_documents, _same_document, fixed=partial(_ids, ascending=True)),
    "document_unsorted": Feature(_documents, _same_document, fixed=partial(_ids, ascending=False)),
    "dense_mask": Feature(
        lambda tensors, shape: {"mask": masks.dense(tensors["allowed"])},
        lambda tensors, shape: {"rule": lambda b, h, q, kv: tensors["allowed"][b, 0, q, kv]},
        fixed=lambda shape, draw: {"allowed": draw.normal(shape.batch, 1, shape.seqlen_q, shape.seqlen_kv) > 0.5},
    ),
    "block": Feature(
        lambda tensors, shape: {"mask": masks.block(tensors["blocks"], (16, 24), masks.prefix(40))},
        _in_block,
        fixed=_block_state,
    ),
    "mask_mod": _masked(lambda t, s: masks.custom(_dilated), _dilated),
    "block_mask": Feature(_flex_blocks, lambda tensors, shape: {"rule": _dilated_band}),
    "gqa": Feature(reshape=lambda shape: replace(shape, heads_kv=shape.heads // 2)),
    "mqa": Feature(reshape=lambda shape: replace(shape, heads_kv=1)),
    "headdim_v": Feature(reshape=lambda shape: replace(shape, headdim_v=shape.headdim + 8)),
    "varlen": Feature(reshape=_pack),
}

_ATEN, _TILED = {"pytorch": "aten_flash"}, {"pytorch": "tiled"}
_USUAL = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
_ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SMALL = dense(2, 70, 90, 4, 4, 32)
_SQUARE = dense(2, 96, 96, 4, 4, 32)
_PACKED = packed((40, 1, 0, 70), (40, 65, 9, 0))
_UNEVEN = packed((24, 50), (60, 30), used_q=(20, 50), used_kv=(47, 11))
KITCHEN_SINK = ("causal", "window", "document", "bias_heads", "alibi", "softcap", "sinks", "score_mod", "dropout")


def _one_feature_each() -> list[Case]:
    """Every feature that changes no sizes, by itself, on a problem with a ragged edge on both sides."""
    named = [name for name in FEATURES if FEATURES[name].reshape(_SMALL) == _SMALL]
    native = {"scale", "deterministic"}
    dtypes = {"out_float32": _HALVES}
    return [
        Case(name, _SMALL, (name,), dtypes.get(name, _USUAL), _ATEN if name in native else _TILED) for name in named
    ]


CASES: tuple[Case, ...] = (
    Case("plain", _SMALL, dtypes=_ALL, kernels=_ATEN, lse_grad=False),
    Case("plain_lse", _SMALL, kernels=_ATEN),
    Case("causal_square", _SQUARE, ("causal",), _ALL, _ATEN, lse_grad=False),
    Case("causal_top_left_more_queries", dense(2, 90, 70, 4, 4, 32), ("causal_top_left",), kernels=_ATEN),
    Case("causal_more_queries", dense(1, 90, 40, 2, 2, 16), ("causal",)),
    Case("causal_long", dense(1, 300, 600, 2, 1, 64), ("causal",)),
    Case("window_long", dense(1, 330, 700, 2, 2, 32), ("window",)),
    Case("rows_without_keys", dense(1, 200, 100, 2, 1, 32), ("window_top_left",)),
    Case("keys_without_rows", dense(1, 110, 154, 2, 1, 32), ("window_top_left",)),
    *_one_feature_each(),
    Case("gqa", _SMALL, ("gqa", "causal")),
    Case("gqa_plain", _SMALL, ("gqa",), kernels=_ATEN, lse_grad=False),
    Case("mqa", _SMALL, ("mqa", "bias")),
    Case("bias_shared", dense(2, 40, 70, 2, 1, 16), ("bias_shared", "causal")),
    Case("bias_shared_keys", dense(2, 40, 70, 2, 2, 16), ("bias_shared_keys", "score_mod")),
    Case("group_of_seven", dense(1, 33, 65, 7, 1, 24), ("alibi", "sinks")),
    Case("decode", dense(3, 1, 257, 8, 2, 64), ("causal",), (torch.float32, *_HALVES)),
    Case("one_key", dense(2, 5, 1, 2, 2, 8), ("causal",)),
    Case("headdim_1", dense(1, 40, 50, 2, 2, 1), ("causal",)),
    Case("headdim_3_v_5", dense(1, 40, 50, 2, 2, 3, 5)),
    Case("headdim_80", dense(1, 65, 65, 2, 2, 80), ("causal", "bias")),
    Case("headdim_96", dense(1, 65, 65, 2, 1, 96), ("causal", "softcap")),
    Case("headdim_160", dense(1, 65, 65, 2, 2, 160), ("sinks",)),
    Case("headdim_192_v_128", dense(1, 65, 80, 2, 2, 192, 128), ("causal",)),
    Case("headdim_512", dense(1, 40, 70, 2, 1, 512), ("causal",)),
    Case("headdim_576_v_512", dense(1, 40, 70, 4, 1, 576, 512), ("causal",)),
    Case("headdim_v_larger", dense(1, 40, 70, 2, 2, 16, 48), ("window",)),
    Case("logits_up", _SMALL, ("causal", "mask_mod", "bias_heads"), shift=120.0),
    Case("logits_down", _SMALL, ("causal", "mask_mod", "bias_heads"), shift=-120.0),
    Case("no_queries", dense(2, 0, 40, 2, 2, 16), ("causal", "bias_heads")),
    Case("no_keys", dense(2, 40, 0, 2, 2, 16), ("causal", "alibi")),
    Case("no_keys_sinks", dense(2, 40, 0, 2, 2, 16), ("sinks",)),
    Case("no_batch", dense(0, 40, 40, 2, 2, 16), ("causal", "sinks")),
    Case("no_batch_plain", dense(0, 40, 40, 2, 2, 16), (), kernels=_ATEN, lse_grad=False),
    Case("nothing_visible", dense(1, 40, 40, 2, 2, 16), ("prefix_none", "bias_heads", "score_mod")),
    Case("varlen", _PACKED, kernels=_ATEN),
    Case("varlen_causal", _PACKED, ("causal",), _ALL, kernels=_ATEN, lse_grad=False),
    Case("varlen_window", _PACKED, ("window", "softcap")),
    Case("varlen_alibi_batch", _PACKED, ("alibi_batch", "causal")),
    Case("varlen_bias", _PACKED, ("bias_heads", "sinks")),
    Case("varlen_dropout", _PACKED, ("dropout", "causal")),
    Case("varlen_document", _PACKED, ("document", "causal")),
    Case("varlen_padding", _PACKED, ("padding",)),
    Case("varlen_mods", _PACKED, ("score_mod", "mask_mod")),
    Case("varlen_used", _UNEVEN, ("causal", "bias", "dropout")),
    Case("varlen_used_plain", _UNEVEN, (), kernels=_ATEN),
    Case("varlen_no_sequences", packed((), ()), ("causal",), kernels=_ATEN),
    Case("varlen_fewer_tokens_than_sequences", packed((0, 1, 0, 0), (0, 0, 3, 0)), ("causal", "sinks")),
    Case("all_in_one", _SQUARE, (*KITCHEN_SINK, "mask_mod", "gqa", "headdim_v", "out_float32")),
    Case("all_in_one_varlen", _SMALL, (*KITCHEN_SINK, "gqa", "headdim_v", "out_float32", "varlen")),
)
