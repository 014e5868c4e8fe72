"""What the integrations refuse: the versions and arguments of other libraries' doors."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from flashtile.check.tensors import shape_of, tensor


def sdpa_device(value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"device: got {value!r}, need one of {', '.join(map(repr, known))}; try 'cuda'")


def has_flash_registry(attention: Any) -> None:
    """`attention`: the module torch.nn.attention."""
    if not hasattr(attention, "register_flash_attention_impl"):
        raise NotImplementedError(
            "activate_sdpa: got a PyTorch without torch.nn.attention.register_flash_attention_impl, need one that has "
            "it; try flashtile.replace_sdpa(), which needs nothing of the kind"
        )


def needs_cache_seqlens(k: Any) -> None:
    if k is not None:
        raise ValueError("cache_seqlens: got None beside k, need the place of the new keys; try 0 for an empty cache")


def rows_for_offsets(k: Any, offsets: Any) -> None:
    if k is None and offsets is not None:
        raise ValueError("k: got None beside cu_seqlens_k_new, need the new keys that it cuts; try leaving it out")


def rows_that_fit(ends: Sequence[int], counts: Sequence[int], room: int) -> None:
    """Keys that each sequence has and is to get, in a cache with so many rows for each."""
    for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
        if not 0 <= end <= room - count:
            raise ValueError(
                f"cache_seqlens: got {end} for sequence {i} and {count} new keys, need at most {room} rows in all; try "
                "a larger cache"
            )


def no_paged_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(f"dropout_p: got {dropout_p} beside block_table, need 0; try gathering the pages")


def no_left_padding(leftpad_k: Any) -> None:
    if leftpad_k is not None:
        raise NotImplementedError(
            f"leftpad_k: got {type(leftpad_k).__name__}, need None: flashtile takes no left-padded keys and values "
            "here; try gathering them into one tensor"
        )


def no_descales(descales: Mapping[str, Any]) -> None:
    for name, value in descales.items():
        if value is not None:
            raise NotImplementedError(
                f"{name}: got {type(value).__name__}, need None: flashtile takes scales of 8-bit queries, keys and "
                "values alone; try tensors that are multiplied by them"
            )


def absorbed_of_eight_bits(qv: Any) -> None:
    """Of FlashAttention-3's 8-bit tensors."""
    if qv is not None:
        raise NotImplementedError("qv: got one beside 8-bit tensors, need None; try bfloat16 tensors")


def packed_heads(qkv: Any, num_heads_q: int | None) -> None:
    """FlashAttention-3's qkv, of three or of joined heads."""
    if num_heads_q is None:
        if qkv.ndim < 3 or qkv.shape[-3] != 3:
            raise ValueError(
                f"qkv: got shape {tuple(qkv.shape)}, need (batch, seqlen, 3, heads, headdim); try num_heads_q=... for "
                "heads that are joined"
            )
    elif not (0 < num_heads_q < qkv.shape[-2] and (qkv.shape[-2] - num_heads_q) % 2 == 0):
        raise ValueError(
            f"num_heads_q: got {num_heads_q} of {qkv.shape[-2]} heads, need it to leave an even number of key and "
            "value heads; qkv is (batch, seqlen, heads + 2 * heads_kv, headdim)"
        )


def no_rng_state() -> NoReturn:
    raise ValueError("rng_state: got None with dropout, need what the forward function returned; try passing it on")


def flash_attn_modules(modules: Any, known: Sequence[str]) -> None:
    if isinstance(modules, str) or not set(modules) <= set(known) or not modules:
        raise ValueError(f"modules: got {modules!r}, need some of {tuple(known)!r}; try {tuple(known[:1])!r}")


def not_installed(module: str, distribution: str, version: str | None, found: bool) -> None:
    """`found`: the module can be imported; `version`: that of its distribution."""
    if version is not None and "+flashtile" in version:
        raise ImportError(f"{module}: got flashtile in its place already, need it once; try .uninstall() first")
    if version is not None or found:
        raise ImportError(
            f"{module}: got the real package installed ({distribution} {version or 'of unknown version'}), need it "
            "absent; try flashtile.integrations.flash_attn by its own name, or uninstall the other"
        )


def no_paged_batching(options: Mapping[str, Any]) -> None:
    """`options`: what transformers passes on beside the arguments of an attention function."""
    paged = type(options.get("cache")).__name__ == "PagedAttentionCache"
    for name in ("cache",) if paged else ("block_table", "k_cache"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{name}: got transformers' paged cache (continuous batching), need none under this name; "
                "try attn_implementation=use_flash_name(), which serves it"
            )


def mask_of_shares(description: str | None) -> None:
    """`description`: of a mask that transformers made from one process's tokens, which is not the whole's."""
    if description is not None:
        raise NotImplementedError(
            f"attention_mask: got {description} inside of context_parallel, where a process sees its own tokens alone; "
            "need none; try padding on the right, which causal models never look at, without a mask, or cu_seq_lens_q "
            "and cu_seq_lens_k of the whole for packed sequences"
        )


def positions_of_shares(as_one_sequence: bool) -> None:
    if not as_one_sequence:
        raise ValueError(
            "position_ids: got others than the places of a process's tokens in one sequence, need those inside of "
            "context_parallel; try giving position_ids = torch.arange(seqlen)[None] as one of its buffers, or "
            "cu_seq_lens_q and cu_seq_lens_k of the whole for packed sequences"
        )


def no_later_key(seen: Tensor) -> None:
    """`seen`: whether each token sees the next one. Becomes an operator of the graph that is being traced."""
    torch._assert_async(
        ~seen.any(),
        "attention_mask: got packed sequences with blocks that look ahead in a compiled graph, need one of the two; "
        "try handing over a mask of four dimensions",
    )


def transformers_tested(version: str, tested: Sequence[str], loader: Any) -> None:
    if loader is None or ".".join(version.split(".")[:2]) not in tested:
        raise NotImplementedError(
            f"use_flash_name: got transformers {version}, need {' or '.join(tested)}: it extends what others may lack; "
            "try attn_implementation='tile_attention', which asks for nothing private"
        )


def evoformer(q: Any, k: Any, v: Any, biases: Any) -> None:
    """What `evoformer_attention` takes; `attention` checks q, k and v against each other."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        tensor(name, value)
        if value.ndim < 4:
            raise ValueError(
                f"{name}: got shape {shape_of(value)}, need (..., rows, seqlen, heads, headdim); try .unsqueeze(0)"
            )
        if value.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"{name}: got shape {shape_of(value)}, need {shape_of(q)[:-3]} before the last three sizes, as q; "
                f"try {name}.expand(...)"
            )
    given = [bias for bias in biases if bias is not None]
    if len(given) > 2:
        raise ValueError(f"biases: got {len(given)}, need at most two; try adding those of one shape")
    lead, rows, heads = shape_of(q)[:-4], q.shape[-4], q.shape[-2]
    over_keys, over_pairs = (*lead, rows, 1, 1, k.shape[-3]), (*lead, 1, heads, q.shape[-3], k.shape[-3])
    kinds = []
    for index, bias in enumerate(given):
        tensor(f"biases[{index}]", bias)
        shape = shape_of(bias)
        kinds.append((shape == over_keys, shape == over_pairs))
        if shape not in (over_keys, over_pairs):
            raise ValueError(
                f"biases[{index}]: got shape {shape}, need (..., rows, 1, 1, seqlen_kv) = {over_keys} or "
                f"(..., 1, heads, seqlen_q, seqlen_kv) = {over_pairs}; try .expand(...) or .unsqueeze(...)"
            )
    if len(given) == 2 and kinds[0] == kinds[1] and not all(kinds[0]):
        raise ValueError(
            f"biases: got two of shape {shape_of(given[0])}, need one over keys and one over pairs; try their sum"
        )


def triangle(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> None:
    """What `triangle_attention` takes; `attention` checks the rest."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        tensor(name, value)
        if value.ndim != 5 or value.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name}: got shape {shape_of(value)}, need (batch, rows, heads, seqlen, headdim), batch and rows as "
                "q; try .unsqueeze(0)"
            )
    wanted = {
        "bias": (bias, (q.shape[0], 1, q.shape[2], q.shape[3], k.shape[3])),
        "mask": (mask, (*shape_of(q)[:2], 1, 1, k.shape[3])),
    }
    for name, (value, shape) in wanted.items():
        if value is None and name == "mask":
            continue
        tensor(name, value)
        if shape_of(value) != shape:
            raise ValueError(f"{name}: got shape {shape_of(value)}, need {shape}; try .expand(...) or .unsqueeze(...)")


def diffusers_tested(version: str, tested: Sequence[str], *needed: Any) -> None:
    """`needed`: what must be there of diffusers' dispatcher."""
    if None in needed or ".".join(version.split(".")[:2]) not in tested:
        raise NotImplementedError(
            f"diffusers: got version {version}, need {' or '.join(tested)}: its dispatcher has no official place for "
            "backends; try flashtile.replace_sdpa(), which asks for nothing private"
        )


def diffusers_options(return_lse: Any, parallel_config: Any) -> None:
    if return_lse:
        raise NotImplementedError(
            "return_lse: got True, need False in diffusers' backend 'flashtile'; try flashtile.attention"
        )
    if parallel_config is not None:
        raise NotImplementedError(
            "parallel_config: got diffusers' context parallelism, need None in its backend 'flashtile'; try the "
            "backend 'native'"
        )


def jax_pair(ids: tuple[Any, ...]) -> None:
    """segment_ids as two arrays."""
    if len(ids) != 2:
        raise ValueError(f"segment_ids: got a tuple of {len(ids)}, need the ids of queries and of keys; try one array")


def jax_arrays(arrays: Mapping[str, tuple[tuple[int, ...], str]], dtypes: Collection[str]) -> None:
    """The shapes and dtypes of JAX arrays by the names of arguments; `attention` checks the rest once they are flat."""
    for name, (_, dtype) in arrays.items():
        if dtype not in dtypes:
            raise TypeError(f"{name}: got dtype {dtype}, need one of {', '.join(dtypes)}; try .astype(...)")
    shape_q, shape_k = arrays["q"][0], arrays["k"][0]
    for name in "qkv":
        shape = arrays[name][0]
        if len(shape) < 3 or shape[:-3] != shape_q[:-3]:
            raise ValueError(
                f"{name}: got shape {shape}, need (..., seqlen, heads, headdim), leading dimensions as q's; "
                "try jnp.broadcast_to"
            )
    leading, heads, lengths = shape_q[:-3], shape_q[-2], (shape_q[-3], shape_k[-3])
    table = (*leading, heads, *lengths)
    wanted = {
        "bias": table,
        "mask": table,
        "query_ids": (*leading, lengths[0]),
        "key_ids": (*leading, lengths[1]),
        "alibi_slopes": (heads,),
        "sinks": (heads,),
    }
    for name, shape in wanted.items():
        got = arrays[name][0] if name in arrays else shape
        exact = name not in ("bias", "mask")
        ends = len(got) <= len(shape) and all(g in (w, 1) for g, w in zip(got[::-1], shape[::-1], strict=False))
        if not ends or (exact and got[-1:] != shape[-1:]):
            said = "segment_ids" if name.endswith("_ids") else name
            raise ValueError(f"{said}: got shape {got}, need one that broadcasts to {shape}; try .reshape(...)")


def jax_constants(names: Any) -> None:
    known = ("bias", "alibi_slopes", "sinks")
    if isinstance(names, str) or not set(names) <= set(known):
        raise ValueError(f"constant: got {names!r}, need some of {known}; try ('bias',)")


def page_size(size: int, smallest: int, way: str) -> None:
    if size % smallest:
        raise ValueError(f"page_size: got {size}, need a multiple of {smallest}; try {way}")


def engine_layer(kind: str, taken: bool) -> None:
    """`kind`: of a layer, or of how a model is served."""
    if not taken:
        raise NotImplementedError(
            f"attention: got {kind}, need decoder layers over a plain cache; try another backend of the engine for it"
        )


def causal_batch(causal: Any) -> None:
    if causal is not True:
        raise NotImplementedError("causal: got other than True, need a causal batch; try another backend of the engine")


def no_quantised_output(*scales: Any) -> None:
    if any(scale is not None for scale in scales):
        raise NotImplementedError(
            "output_scale: got one, need None: flashtile writes no FP8 outputs; try without fused quantisation"
        )
