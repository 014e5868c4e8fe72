"""Which calls are compiled: shapes, dtypes and variants."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtile import decoding, fp8
from flashtile.decoding import CacheArguments
from flashtile.problem import Inputs, Options
from flashtile.request import Arguments, Packing, build

SEQLEN = 256
HEADDIMS = (64, 128, 256)
_TABLE = torch.linspace(-1.0, 1.0, 64)


@dataclass(frozen=True)
class Entry:
    """One call, compiled forward and backward for one target."""

    target: str
    headdim: int
    dtype: str
    variant: str


def _documents(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx // 100 == kv_idx // 100) & (kv_idx <= q_idx)


def _capped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return 20.0 * torch.tanh(score / 20.0)


def _relative(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + _TABLE[(q_idx - kv_idx) % 64]


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (64, 0)},
    "dropout": lambda: {"causal": True, "dropout_p": 0.1, "seed": 1},
    "bias": lambda: {"bias": torch.zeros(2, SEQLEN, SEQLEN, requires_grad=True)},
    "softcap": lambda: {"causal": True, "softcap": 20.0},
    "score_mod": lambda: {"causal": True, "score_mod": _capped},
    "table": lambda: {"score_mod": _relative},
    "mask_mod": lambda: {"mask": _documents},
    "varlen": lambda: {"causal": True},
    "deterministic": lambda: {"causal": True, "deterministic": True},
    "heads": lambda: {"causal": True},
    "heads_plain": dict,
    "heads_alibi": lambda: {"causal": True, "alibi_slopes": torch.zeros(2)},
    "heads_values": lambda: {"causal": True},
    "out_float32": lambda: {"causal": True, "out_dtype": torch.float32},
}
"""Name -> the options of a call; `varlen` is a packed one, and where a name begins with `heads` each head
of queries has keys of its own; `heads_values`: values have no more columns than `VALUES`."""

OWN_KERNELS = dict.fromkeys(
    (
        *("deterministic", "heads", "heads_plain", "heads_alibi", "heads_values", "out_float32"),
        *("decode_some", "decode_some_fp8", "fp8_varlen", "fp8_varlen_heads"),
    ),
    "sm_90a",
)
"""Variants that have kernels of their own on one target alone."""

FORWARD_ALONE = ("out_float32",)
"""Variants whose backward kernels are those of others."""


PAGE = 64

CACHED: dict[str, tuple[int, dict[str, Any]]] = {
    "decode": (1, {}),
    "decode_paged": (1, {"paged": True}),
    "decode_fp8": (1, {"paged": True, "stored": torch.float8_e4m3fn}),
    "decode_int8": (1, {"paged": True, "stored": torch.int8}),
    "decode_int4": (1, {"paged": True, "stored": torch.uint8}),
    "decode_some": (8, {"paged": True}),
    "decode_some_fp8": (8, {"stored": torch.float8_e4m3fn}),
    "decode_many": (64, {"paged": True, "softcap": 20.0, "window": (100, 0), "rotary": True}),
}
"""Name -> queries of a sequence and options of a call over a KV cache."""

EIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("block", {}),
    "fp8_causal": ("block", {"causal": True}),
    "fp8_heads": ("head", {"causal": True}),
    "fp8_softcap": ("block", {"causal": True, "softcap": 20.0}),
    "fp8_mask_mod": ("block", {"mask": _documents}),
    "fp8_varlen": ("block", {"causal": True}),
    "fp8_varlen_heads": ("head", {"causal": True}),
}
"""Name -> what shares a scale, and options of a forward pass with 8-bit inputs; `varlen`: packed ones."""

NAMES = (*VARIANTS, *CACHED, *EIGHT)


VALUES = 128
"""Columns of values, at most, that Hopper's tables have rows for beside wider keys."""

LATENT = 576
"""The head dimension of multi-head latent attention, whose values are the first 512 columns of the one key head."""


def cached_call(entry: Entry) -> decoding.Call:
    """The same of an entry over a KV cache, whose keys are cut into two parts. Four query heads share a key head, with
    headdim `LATENT` sixteen."""
    queries, given = CACHED[entry.variant]
    options = dict(given)
    dtype = getattr(torch, entry.dtype)
    heads, heads_kv = (16, 1) if entry.headdim == LATENT else (8, 2)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, entry.headdim, dtype=dtype)

    shape = (2, SEQLEN, heads_kv)
    if options.pop("paged", False):
        options["block_table"] = torch.arange(2 * SEQLEN // PAGE, dtype=torch.int32).view(2, -1)
        shape = (2 * SEQLEN // PAGE, PAGE, heads_kv)
    stored = options.pop("stored", None)
    k, k_cache = zeros(2, queries, heads_kv), zeros(*shape).to(stored or dtype)
    pairs = 2 if stored is torch.uint8 else 1
    k_cache = k_cache[..., : entry.headdim // pairs].contiguous()
    latent = (k[..., :512], k_cache[..., : 512 // pairs])
    v, v_cache = latent if entry.headdim == LATENT else (k, torch.zeros_like(k_cache))
    if stored is not None:
        counts = (shape[0], heads_kv) if "block_table" in options else (heads_kv,)
        options["k_scale"] = options["v_scale"] = torch.ones(counts)
    if options.pop("rotary", False):
        options["rotary_cos"] = options["rotary_sin"] = torch.zeros(SEQLEN, entry.headdim // 2, dtype=dtype)
    lengths = torch.full((2,), 100, dtype=torch.int32)
    arguments = CacheArguments(cache_seqlens=lengths, k=k, v=v, num_splits=2, **options)
    return decoding.build(zeros(2, queries, heads), k_cache, v_cache, arguments)


def call(entry: Entry) -> tuple[Inputs, Options]:
    """The inputs, on the CPU, and options of an entry; two query heads share a key head, but for a bias and some."""
    heads = 2 if entry.variant == "bias" or entry.variant.startswith("heads") else 4
    packing, shape = _packed("varlen" in entry.variant)
    q, k, v = (torch.zeros(*shape, n, entry.headdim, dtype=getattr(torch, entry.dtype)) for n in (heads, 2, 2))
    if entry.variant == "heads_values":
        v = v[..., :VALUES].contiguous()
    return build(q, k, v, Arguments(**VARIANTS[entry.variant]()), packing)


def eight_call(entry: Entry, dtype: torch.dtype) -> tuple[Inputs, Options]:
    """The same of an entry with 8-bit inputs."""
    granularity, options = EIGHT[entry.variant]
    packing, shape = _packed("varlen" in entry.variant)
    q, k, v = (torch.zeros(*shape, n, entry.headdim, dtype=getattr(torch, entry.dtype)) for n in (4, 2, 2))
    parts = fp8.quantize(q, k, v, granularity, dtype=dtype)
    return build(parts.q, parts.k, parts.v, Arguments(**options), packing)


def _packed(wanted: bool) -> tuple[Packing | None, tuple[int, ...]]:
    """(where sequences lie, the sizes of tensors in front of their heads)."""
    if not wanted:
        return None, (1, SEQLEN)
    offsets = torch.tensor([0, 100, SEQLEN], dtype=torch.int32)
    return Packing(offsets, offsets, None, None, None, None), (SEQLEN,)


def entries(targets: list[str], headdims: list[int], dtypes: list[str], variants: list[str]) -> Iterator[Entry]:
    for target in targets:
        for dtype in dtypes:
            for headdim in headdims:
                for variant in variants:
                    if OWN_KERNELS.get(variant, target) == target:
                        yield Entry(target, headdim, dtype, variant)
