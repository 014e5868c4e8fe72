"""What the integrations refuse: the versions and arguments of other libraries' doors."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


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


def no_caches(function: str) -> NoReturn:
    raise NotImplementedError(
        f"{function}: got a call, need key-value caches, which flashtile does not have yet; try flash_attn_func "
        "over the part of the cache that is filled"
    )


def no_paging(value: Any, name: str) -> None:
    if value is not None:
        raise NotImplementedError(
            f"{name}: got {type(value).__name__}, need None: flashtile has no paged or left-padded keys and values "
            "yet; try gathering them into one tensor"
        )


def no_descales(descales: Mapping[str, Any]) -> None:
    for name, value in descales.items():
        if value is not None:
            raise NotImplementedError(
                f"{name}: got {type(value).__name__}, need None: flashtile takes no FP8 tensors yet; try bfloat16 ones"
            )


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


def needs_rng_state(state: Any) -> None:
    if state is None:
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
    for name in ("cache", "block_table", "k_cache"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{name}: got transformers' paged cache (continuous batching), need none: flashtile has no paged "
                "attention yet; try attn_implementation='sdpa' for it"
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
