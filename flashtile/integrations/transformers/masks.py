"""What a model's attention mask becomes: nothing, a padding mask, document ids, or all (query, key) pairs.

transformers states a mask as a function of (batch, head, query, key), built from a handful of its own functions, and
asks the mask function of the attention implementation for a tensor, once per forward pass. Ours is small where the
mask is one that flashtile knows, and says what it is by its shape and dtype:

    None                            causal, or everything, and windows, as the attention module says
    (batch, keys) bool              the same, for the keys that are True; the others are padding, or not filled yet
    (batch, seqlen) integers        the same, within packed documents of equal id
    (batch, 1, 1, keys) bool        these keys, for every query
    (batch, 1, queries, keys) bool  exactly these pairs; nothing else applies

The last form is transformers' own, quadratic, and serves every mask that is not recognised (image blocks, chunks beside
a cache, the caller's own functions) and static caches in compiled graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from flashtile import sharding
from flashtile.check import guests as check


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **more: Any,
) -> Tensor | None:
    """The mask of a layer, in one of the forms of the module's documentation; arguments as transformers gives them.

    Args:
        attention_mask: bool (batch, tokens seen), False at padding.
        local_size: the size of a window or of chunks.
        allow_is_causal_skip: False if sequences are packed or the model goes on building with the tensor.
        allow_is_bidirectional_skip: given for masks that are not causal; False in the latter case.
        use_vmap: the caller brought functions of its own.
    """
    causal = allow_is_bidirectional_skip is None
    if sharding.current is not None and sharding.current.running():
        _check_shared(attention_mask, use_vmap, local_size is None or _is_window(local_size, config))
        return None
    alone = attention_mask is None and isinstance(q_offset, int) and q_offset == kv_offset == 0
    small: tuple[Tensor | None] | None = None
    if use_vmap:
        small = None
    elif causal and allow_is_causal_skip and (mask_function is causal_mask_function or _is_window(local_size, config)):
        small = _causal(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    elif causal and alone and q_length == kv_length > 1 and mask_function is not causal_mask_function:
        small = _documents(batch_size, q_length, mask_function, device)
    elif allow_is_bidirectional_skip and mask_function is bidirectional_mask_function:
        small = _bidirectional(kv_length, kv_offset, attention_mask)
    if small is not None:
        return small[0]
    offset: Any = q_offset
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=bool(allow_is_bidirectional_skip),
        use_vmap=use_vmap,
        device=device,
    )


def _check_shared(given: Tensor | None, use_vmap: bool, known: bool) -> None:
    """Inside of `context_parallel` the module's causality and window are all that is said of the whole; whether
    positions begin anew, which packs sequences, is asked with each call."""
    described = None
    if use_vmap:
        described = "a function of the caller"
    elif not known:
        described = "chunks"
    elif given is not None:
        described = "a tensor"
    check.mask_of_shares(described)


def _is_window(size: int | None, config: Any) -> bool:
    """A causal mask of a local size is a window or chunks; the attention module knows the window and not the chunks."""
    chunks = getattr(config, "attention_chunk_size", None)
    return size is not None and size == getattr(config, "sliding_window", None) and size != chunks


def _documents(batch: int, length: int, mask_function: Callable[..., Any], device: Any) -> tuple[Tensor] | None:
    """(ids,) of packed sequences, and of chunks, from whether each token sees the one before.

    A causal mask in which a query sees a stretch of keys that ends with itself, or a window of that, is told by this.
    One that lets a token see the next is something else: (None) here, an error inside a graph, which cannot choose.
    """
    rows, places = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    joined = mask_function(rows, head, places[:, 1:], places[:, :-1])
    ahead = mask_function(rows, head, places[:, :-1], places[:, 1:])
    if is_tracing(ahead):
        check.no_later_key(ahead)
    elif ahead.any():
        return None
    return (torch.nn.functional.pad((~joined).expand(batch, -1).cumsum(dim=-1), (1, 0)),)


def _causal(
    batch: int, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int, given: Tensor | None, device: Any
) -> tuple[Tensor | None] | None:
    """(the mask,); None where it must be written out: compiled graphs do not know how much of a cache is filled."""
    tracing = is_tracing(given)
    if isinstance(q_offset, Tensor):
        if tracing or is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    filled = q_offset + q_length - kv_offset
    keys = _local(given, kv_length, kv_offset)
    if filled == kv_length:
        return (keys if keys is None or tracing or not keys.all() else None,)
    if tracing or filled > kv_length:
        return None
    if keys is None:
        keys = torch.ones(batch, kv_length, dtype=torch.bool, device=device)
    return (keys[:, :filled],)


def _bidirectional(kv_length: int, kv_offset: int, given: Tensor | None) -> tuple[Tensor | None]:
    keys = _local(given, kv_length, kv_offset)
    if keys is None or not (is_tracing(keys) or not keys.all()):
        return (None,)
    return (keys[:, None, None, :],)


def _local(given: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The part of the padding mask that is about the keys that attention will see."""
    padded = prepare_padding_mask(given, kv_length, kv_offset)
    return None if padded is None else padded[:, kv_offset : kv_offset + kv_length]
