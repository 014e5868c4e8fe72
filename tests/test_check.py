"""Every message of `flashtile.check`: the argument it names, what it says of it, and that none is left untested."""

import ast
import inspect
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flashtile
from flashtile import attention, attention_varlen, check, dropout_mask, explain, fp8, masks, merge, trace
from flashtile.check import sharding as sharded
from tests.raises import lines_run, raises

BATCH, SEQLEN_Q, SEQLEN_KV, HEADS, HEADS_KV, HEADDIM = 2, 6, 8, 4, 2, 16
META = torch.device("meta")
APART = {"caches.py", "pages.py", "scaled.py", "guests.py"}
"""Modules of checks with tables of their own (test_check_caches.py, test_check_guests.py)."""
ELSEWHERE = "need cpu as q; try .*to\\(q.device\\)"


class Refusal(NamedTuple):
    """A call, its error, the argument that the message starts with and a pattern of what follows `got`."""

    error: type[Exception]
    argument: str
    says: str
    call: Callable[[], Any]


def tensors(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(sizes, dtype=dtype)


Q = tensors(BATCH, SEQLEN_Q, HEADS, HEADDIM)
KV = tensors(BATCH, SEQLEN_KV, HEADS_KV, HEADDIM)
TOTAL_Q, TOTAL_KV = 9, 12
PACKED_Q, PACKED_KV = tensors(TOTAL_Q, HEADS, HEADDIM), tensors(TOTAL_KV, HEADS_KV, HEADDIM)
CU_Q, CU_KV = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)


def dense(q: Any = Q, k: Any = KV, v: Any = KV, **options: Any) -> Callable[[], Any]:
    return lambda: attention(q, k, v, **options)


def packed(
    q: Any = PACKED_Q, k: Any = PACKED_KV, v: Any = PACKED_KV, cu_q: Any = CU_Q, cu_k: Any = CU_KV, **options: Any
) -> Callable[[], Any]:
    return lambda: attention_varlen(q, k, v, cu_q, cu_k, **options)


def ids(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.int64)


def block_mask(*sizes: Any) -> BlockMask:
    return create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, *sizes, device="cpu")


def state(
    batch: int = 1, dtype: torch.dtype = torch.float32, lse_dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    return tensors(batch, 3, 2, 8, dtype=dtype), tensors(batch, 2, 3, dtype=lse_dtype)


TENSORS = [
    Refusal(TypeError, "q", "list, need a torch.Tensor", dense(q=[1.0])),
    Refusal(TypeError, "k", "NoneType, need a torch.Tensor", dense(k=None)),
    Refusal(TypeError, "v", "ndarray, need a torch.Tensor; try torch.as_tensor", dense(v=KV.numpy())),
    Refusal(TypeError, "q", "torch.sparse_coo tensor, need a strided", dense(q=Q.to_sparse())),
    Refusal(TypeError, "q", "torch.int64, need float16, bfloat16, float32 or float64", dense(q=Q.long())),
    Refusal(TypeError, "v", "torch.complex64, need float16", dense(v=KV.to(torch.complex64))),
    Refusal(TypeError, "k", "torch.float16, need torch.float32 as q; try k.to", dense(k=KV.half())),
    Refusal(TypeError, "v", "torch.float64, need torch.float32 as q", dense(v=KV.double())),
    Refusal(ValueError, "q", r"shape \(9, 4, 16\), need \(batch, .*try attention_varlen", dense(q=PACKED_Q)),
    Refusal(ValueError, "k", r"shape \(8, 2, 16\), need \(batch, seqlen, heads, headdim\)", dense(k=KV[0])),
    Refusal(ValueError, "v", r"shape \(2, 8, 2, 16\), need \(total, .*try attention$", packed(v=KV)),
    Refusal(ValueError, "k", f"a tensor on meta, {ELSEWHERE}", dense(k=KV.to(META))),
    Refusal(ValueError, "v", f"a tensor on meta, {ELSEWHERE}", dense(v=KV.to(META))),
    Refusal(ValueError, "k", "batch 1, need 2 as q; try k.expand", dense(k=KV[:1])),
    Refusal(ValueError, "v", "batch 1, need 2 as q; try v.expand", dense(v=KV[:1])),
    Refusal(ValueError, "v", "7 keys, need 8 as k", dense(v=KV[:, 1:])),
    Refusal(ValueError, "v", "11 keys, need 12 as k", packed(v=PACKED_KV[1:])),
    Refusal(ValueError, "v", "1 heads, need 2 as k", dense(v=KV[:, :, 1:])),
    Refusal(ValueError, "q", "0 heads, need at least 1", dense(q=Q[:, :, :0])),
    Refusal(ValueError, "k", "0 heads, need a divisor of q's 4", dense(k=KV[:, :, :0], v=KV[:, :, :0])),
    Refusal(ValueError, "k", "2 heads, need a divisor of q's 3 .*grouped-query.*transpose", dense(q=Q[:, :, :3])),
    Refusal(ValueError, "k", "headdim 8, need 16 as q; only v's may differ", dense(k=KV[..., :8])),
    Refusal(ValueError, "q", "headdim 0, need at least 1", dense(q=Q[..., :0], k=KV[..., :0])),
    Refusal(ValueError, "v", "headdim 0, need at least 1", dense(v=KV[..., :0])),
]

OPTIONS = [
    Refusal(TypeError, "causal", "1, need True or False", dense(causal=1)),
    Refusal(TypeError, "return_lse", "None, need True or False", dense(return_lse=None)),
    Refusal(TypeError, "deterministic", "0, need True, False or None", dense(deterministic=0)),
    Refusal(TypeError, "batch_invariant", "1, need True or False", dense(batch_invariant=1)),
    Refusal(TypeError, "alignment", "NoneType, need the string", dense(alignment=None)),
    Refusal(
        ValueError, "alignment", "'bottom-right', need 'bottom_right'", dense(causal=True, alignment="bottom-right")
    ),
    Refusal(ValueError, "alignment", "'lower', need .* or 'top_left'", packed(alignment="lower")),
    Refusal(TypeError, "window", r"int, need a pair \(left, right\) of key counts; try \(128, 0\)", dense(window=128)),
    Refusal(ValueError, "window", "3 numbers, need a pair", dense(window=(1, 2, 3))),
    Refusal(TypeError, r"window\[0\]", "1.5, need a count of keys", dense(window=(1.5, 0))),
    Refusal(TypeError, r"window\[1\]", "True, need a count of keys", dense(window=(1, True))),
    Refusal(ValueError, r"window\[0\]", "-1, need 0 or more; try None for no limit", dense(window=(-1, 0))),
    Refusal(ValueError, r"window\[0\]", r"\d+, need less than 2 \*\* 62; try None", dense(window=(2**62, 0))),
    Refusal(ValueError, r"window\[1\]", "-1, need 0 or more; try None for no limit", packed(window=(0, -1))),
    Refusal(TypeError, "mask", "a torch.float32 tensor, need bool .*try bias", dense(mask=tensors(6, 8))),
    Refusal(TypeError, "mask", "a torch.sparse_coo tensor", dense(mask=tensors(6, 8).bool().to_sparse())),
    Refusal(ValueError, "mask", r"shape \(1, 1, 1, 6, 8\), need one that", dense(mask=tensors(1, 1, 1, 6, 8).bool())),
    Refusal(TypeError, "mask", "a FlexAttention BlockMask.*try block_mask", dense(mask=block_mask(None, None, 6, 8))),
    Refusal(TypeError, "mask", "str, need a flashtile.masks value", dense(mask="causal")),
    Refusal(
        TypeError, "block_mask", "Mask, need a FlexAttention BlockMask; try mask", dense(block_mask=masks.causal())
    ),
    Refusal(
        ValueError, "block_mask", r"lengths \(6, 9\), need \(6, 8\)", dense(block_mask=block_mask(None, None, 6, 9))
    ),
    Refusal(ValueError, "block_mask", "batch 3 and 1 heads, need 1 or 2", dense(block_mask=block_mask(3, None, 6, 8))),
    Refusal(ValueError, "block_mask", "batch 1 and 2 heads.* 1 or 4;", dense(block_mask=block_mask(None, 2, 6, 8))),
    Refusal(ValueError, "block_mask", "on meta", lambda: dense(block_mask=block_mask(None, None, 6, 8).to("meta"))()),
    Refusal(
        NotImplementedError,
        "block_mask",
        "beside cu_seqlens_q, need none .*try mask=block_mask.mask_mod",
        packed(block_mask=block_mask(None, None, 9, 12)),
    ),
    Refusal(TypeError, "score_mod", "Tensor, need a function .* to the argument bias", dense(score_mod=tensors(6, 8))),
    Refusal(TypeError, "bias", "float, need a torch.Tensor", dense(bias=1.0)),
    Refusal(TypeError, "bias", "torch.bool, need a floating-point tensor; try", dense(bias=tensors(6, 8).bool())),
    Refusal(ValueError, "bias", f"a tensor on meta, {ELSEWHERE}", dense(bias=tensors(6, 8).to(META))),
    Refusal(ValueError, "bias", r"need at most 4", dense(bias=tensors(1, 1, 1, 1, 6, 8))),
    Refusal(ValueError, "bias", r"need at most 4", packed(bias=tensors(1, 1, 1, 6, 8))),
    Refusal(ValueError, "bias", r"\(1, 2, 1, 6, 8\), need .*divide", dense(bias=tensors(1, 2, 1, 6, 8))),
    Refusal(ValueError, "bias", r"\(3, 1, 1, 6, 8\), need .*= \(2, 4, 6, 8\)", dense(bias=tensors(3, 1, 1, 6, 8))),
    Refusal(ValueError, "bias", r"\(1, 1, 4, 6, 7\), need .*4, 6, 8", dense(bias=tensors(1, 1, 4, 6, 7))),
    Refusal(ValueError, "bias", r"shape \(6, 7\), need .* = \(2, 4, 6, 8\)", dense(bias=tensors(6, 7))),
    Refusal(ValueError, "bias", r"shape \(3, 1, 6, 8\), need .*broadcasts", dense(bias=tensors(3, 1, 6, 8))),
    Refusal(ValueError, "bias", r"shape \(2, 6, 8\), need .*broadcasts", dense(bias=tensors(2, 6, 8))),
    Refusal(ValueError, "bias", r"shape \(4, 7\), need .* = \(2, 4, 5, 7\)", packed(bias=tensors(4, 7))),
    Refusal(TypeError, "alibi_slopes", "list, need a torch.Tensor", dense(alibi_slopes=[0.5] * 4)),
    Refusal(TypeError, "alibi_slopes", "torch.int64, need a floating-point", dense(alibi_slopes=ids(4))),
    Refusal(ValueError, "alibi_slopes", f"a tensor on meta, {ELSEWHERE}", dense(alibi_slopes=tensors(4).to(META))),
    Refusal(ValueError, "alibi_slopes", r"shape \(2,\), need \(heads,\) = \(4,\)", dense(alibi_slopes=tensors(2))),
    Refusal(ValueError, "alibi_slopes", r"shape \(3, 4\), need .* = \(2, 4\)", packed(alibi_slopes=tensors(3, 4))),
    Refusal(TypeError, "softcap", "str, need a number or None", dense(softcap="30")),
    Refusal(TypeError, "softcap", "bool, need a number", dense(softcap=True)),
    Refusal(ValueError, "softcap", "-1.0, need 0 or a number from 1e-30 to ", dense(softcap=-1.0)),
    Refusal(ValueError, "softcap", "inf, need 0 or a number from", dense(softcap=float("inf"))),
    Refusal(ValueError, "softcap", "1e-320, need 0 or a number from", dense(softcap=1e-320)),
    Refusal(TypeError, "sinks", "float, need a torch.Tensor", dense(sinks=1.0)),
    Refusal(TypeError, "sinks", "torch.int64, need a floating-point tensor", dense(sinks=ids(4))),
    Refusal(ValueError, "sinks", f"a tensor on meta, {ELSEWHERE}", dense(sinks=tensors(4).to(META))),
    Refusal(ValueError, "sinks", r"shape \(2,\), need \(heads,\) = \(4,\)", dense(sinks=tensors(2))),
    Refusal(ValueError, "sinks", r"shape \(2, 4\), need \(heads,\) = \(4,\)", packed(sinks=tensors(2, 4))),
    Refusal(TypeError, "scale", r"Tensor, need a number or None; try float\(scale\)", dense(scale=tensors())),
    Refusal(ValueError, "scale", "nan, need a number from -1e", dense(scale=float("nan"))),
    Refusal(ValueError, "scale", "1e.300, need a number from -1e", dense(scale=1e300)),
    Refusal(TypeError, "dropout_p", r"NoneType, need a number in \[0, 1\)", dense(dropout_p=None)),
    Refusal(ValueError, "dropout_p", "1.0, need a probability", dense(dropout_p=1.0)),
    Refusal(ValueError, "dropout_p", "-0.1, need a probability", dense(dropout_p=-0.1)),
    Refusal(ValueError, "dropout_p", "nan, need a probability", dense(dropout_p=float("nan"))),
    Refusal(TypeError, "seed", "float, need an int, an int64 tensor of one", dense(dropout_p=0.1, seed=1.0)),
    Refusal(TypeError, "seed", r"a torch.int32 tensor of shape \(\)", dense(dropout_p=0.1, seed=ids().int())),
    Refusal(TypeError, "seed", r"a torch.int64 tensor of shape \(2,\)", dense(dropout_p=0.1, seed=ids(2))),
    Refusal(ValueError, "seed", f"a tensor on meta, {ELSEWHERE}", dense(dropout_p=0.1, seed=ids().to(META))),
    Refusal(ValueError, "seed", "9223372036854775808, need one that fits", dense(dropout_p=0.1, seed=2**63)),
    Refusal(TypeError, "out_dtype", "'float32', need a torch.dtype", dense(out_dtype="float32")),
    Refusal(
        ValueError, "out_dtype", "torch.float16, need q's dtype .*or torch.float32", dense(out_dtype=torch.float16)
    ),
    Refusal(TypeError, "backend", "int, need None", dense(backend=0)),
    Refusal(
        ValueError,
        "backend",
        r"'cuda', need None \(the fastest that fits\) or one of .*'pytorch'",
        dense(backend="cuda"),
    ),
]

PACKING = [
    Refusal(TypeError, "cu_seqlens_q", "list, need a torch.Tensor", packed(cu_q=[0, 4, 9])),
    Refusal(TypeError, "cu_seqlens_k", "NoneType, need a torch.Tensor", packed(cu_k=None)),
    Refusal(
        TypeError, "cu_seqlens_q", "torch.float32, need int32 or int64; try cu_seqlens_q.int", packed(cu_q=CU_Q.float())
    ),
    Refusal(ValueError, "cu_seqlens_k", r"shape \(1, 3\), need one dimension", packed(cu_k=CU_KV[None])),
    Refusal(ValueError, "cu_seqlens_k", f"a tensor on meta, {ELSEWHERE}", packed(cu_k=CU_KV.to(META))),
    Refusal(ValueError, "cu_seqlens_q", "an empty tensor, need", packed(cu_q=CU_Q[:0])),
    Refusal(ValueError, "cu_seqlens_k", "1 sequences, need 2 as cu_seqlens_q", packed(cu_k=CU_KV[:2])),
    Refusal(ValueError, "seqused_q", "3 sequences, need 2 as cu_seqlens_q", packed(seqused_q=CU_Q)),
    Refusal(
        TypeError, "seqused_k", "torch.int16, need int32 or int64", packed(seqused_k=torch.zeros(2, dtype=torch.int16))
    ),
    Refusal(TypeError, "seqused_k", "list, need a torch.Tensor", packed(seqused_k=[1, 2])),
    Refusal(TypeError, "max_seqlen_q", "float, need an int, an integer tensor or None", packed(max_seqlen_q=5.0)),
    Refusal(TypeError, "max_seqlen_k", r"a torch.int64 tensor of shape \(2,\)", packed(max_seqlen_k=ids(2))),
    Refusal(TypeError, "max_seqlen_q", r"a torch.float32 tensor of shape \(\)", packed(max_seqlen_q=tensors())),
    Refusal(ValueError, "max_seqlen_k", "-1, need 0 or more; try None", packed(max_seqlen_k=-1)),
    Refusal(ValueError, "max_seqlen_q", "4, need at least 5, the length of sequence 1", packed(max_seqlen_q=4)),
    Refusal(ValueError, "max_seqlen_k", "6, need at least 7, the length of sequence 1", packed(max_seqlen_k=6)),
    Refusal(ValueError, "cu_seqlens_q", "-1 as its start, need 0 or more", packed(cu_q=CU_Q - 1)),
    Refusal(ValueError, "cu_seqlens_k", "13 as its end, need at most the 12 tokens that k has", packed(cu_k=CU_KV + 1)),
    Refusal(ValueError, "cu_seqlens_q", "9 before 4, need offsets that never decrease", packed(cu_q=CU_Q[[0, 2, 1]])),
    Refusal(ValueError, "seqused_q", "6 for sequence 1, need 0 to 5", packed(seqused_q=torch.tensor([4, 6]))),
    Refusal(ValueError, "seqused_k", "-1 for sequence 0, need 0 to 5", packed(seqused_k=torch.tensor([-1, 6]))),
]

EXPLAIN = [
    Refusal(
        ValueError,
        "cu_seqlens_k",
        "None beside cu_seqlens_q, need it too",
        lambda: explain(PACKED_Q, PACKED_KV, PACKED_KV, cu_seqlens_q=CU_Q),
    ),
    Refusal(
        ValueError,
        "cu_seqlens_q",
        "None beside cu_seqlens_k",
        lambda: explain(PACKED_Q, PACKED_KV, PACKED_KV, cu_seqlens_k=CU_KV),
    ),
    Refusal(ValueError, "cu_seqlens_q", "None beside seqused_k", lambda: explain(Q, KV, KV, seqused_k=ids(2))),
    Refusal(ValueError, "cu_seqlens_q", "None beside max_seqlen_q", lambda: explain(Q, KV, KV, max_seqlen_q=6)),
    Refusal(ValueError, "k", "batch 1, need 2", lambda: explain(Q, KV[:1], KV[:1])),
    Refusal(
        ValueError, "mask", r"prefix lengths of shape \(3,\)", lambda: explain(Q, KV, KV, mask=masks.prefix(ids(3)))
    ),
]

CONSTRUCTORS = [
    Refusal(ValueError, "alignment", "'left', need", lambda: masks.causal("left")),
    Refusal(TypeError, "alignment", "int, need", lambda: masks.window(1, 1, 0)),
    Refusal(ValueError, "alignment", "'middle', need", lambda: masks.chunk(4, "middle")),
    Refusal(TypeError, "left", "2.0, need a count of keys", lambda: masks.window(2.0, 0)),
    Refusal(ValueError, "left", "-1, need 0 or more", lambda: masks.window(-1, 0)),
    Refusal(ValueError, "right", "-2, need 0 or more", lambda: masks.window(0, -2)),
    Refusal(TypeError, "right", "'1', need a count", lambda: masks.window(0, "1")),
    Refusal(TypeError, "size", "4.0, need an int", lambda: masks.chunk(4.0)),
    Refusal(ValueError, "size", "0, need 1 or more", lambda: masks.chunk(0)),
    Refusal(TypeError, "length", r"\[3, 4\], need an int or", lambda: masks.prefix([3, 4])),
    Refusal(ValueError, "length", "-1, need 0 or more", lambda: masks.prefix(-1)),
    Refusal(TypeError, "length", "torch.float32, need int32 or int64", lambda: masks.prefix(tensors(2))),
    Refusal(ValueError, "length", r"shape \(\), need \(batch,\)", lambda: masks.prefix(ids())),
    Refusal(TypeError, "length", "a torch.sparse_coo tensor", lambda: masks.prefix(ids(2).to_sparse())),
    Refusal(TypeError, "query_ids", "list, need a torch.Tensor", lambda: masks.document([0, 1])),
    Refusal(TypeError, "query_ids", "torch.float32, need int32 or int64", lambda: masks.document(tensors(6))),
    Refusal(TypeError, "key_ids", "torch.bool, need int32 or int64", lambda: masks.document(ids(6), ids(8).bool())),
    Refusal(ValueError, "key_ids", r"shape \(1, 1, 8\), need", lambda: masks.document(ids(6), ids(1, 1, 8))),
    Refusal(ValueError, "query_ids", r"shape \(\), need", lambda: masks.document(ids())),
    Refusal(ValueError, "key_ids", "on meta, need cpu as query_ids", lambda: masks.document(ids(6), ids(8).to(META))),
    Refusal(TypeError, "allowed", "function, need a torch.Tensor", lambda: masks.dense(tensors)),
    Refusal(TypeError, "allowed", "torch.float32, need bool .*bias", lambda: masks.dense(tensors(6, 8))),
    Refusal(ValueError, "allowed", r"shape \(1, 1, 1, 1, 1\)", lambda: masks.dense(tensors(1, 1, 1, 1, 1).bool())),
    Refusal(TypeError, "state", "list, need a torch.Tensor", lambda: masks.block([[1]], (4, 4))),
    Refusal(TypeError, "state", "torch.int64, need bool or int8", lambda: masks.block(ids(1, 1, 2, 2), (4, 4))),
    Refusal(ValueError, "state", r"shape \(2, 2\), need .*try state\[None", lambda: masks.block(blocks(2, 2), (4, 4))),
    Refusal(TypeError, "block_size", "4, need a pair", lambda: masks.block(blocks(1, 1, 2, 2), 4)),
    Refusal(TypeError, "block_size", r"\(4, 4, 4\), need", lambda: masks.block(blocks(1, 1, 2, 2), (4, 4, 4))),
    Refusal(TypeError, "block_size", r"\(4, 4.0\), need", lambda: masks.block(blocks(1, 1, 2, 2), (4, 4.0))),
    Refusal(ValueError, "block_size", r"\(4, 0\), need 1 or more", lambda: masks.block(blocks(1, 1, 2, 2), (4, 0))),
    Refusal(
        TypeError, "inner", "function, need .*masks.custom", lambda: masks.block(blocks(1, 1, 2, 2), (4, 4), tensors)
    ),
    Refusal(TypeError, "mask_mod", "a FlexAttention BlockMask", lambda: masks.custom(block_mask(None, None, 6, 8))),
    Refusal(TypeError, "mask_mod", "Mask, need a function", lambda: masks.custom(masks.causal())),
    Refusal(TypeError, "mask_mod", "Tensor, need a function", lambda: masks.custom(tensors(1))),
    Refusal(TypeError, "block_mask", "function, need a Flex", lambda: masks.from_block_mask(tensors)),
]


def blocks(*sizes: int) -> Tensor:
    return torch.ones(sizes, dtype=torch.int8)


MASKS = [
    Refusal(ValueError, "mask", "a tensor on meta, need cpu", dense(mask=masks.dense(tensors(6, 8).bool().to(META)))),
    Refusal(ValueError, "mask", r"prefix lengths of shape \(3,\), need .* = \(2,\)", dense(mask=masks.prefix(ids(3)))),
    Refusal(ValueError, "mask", r"prefix lengths of shape \(1,\), need .* = \(2,\)", packed(mask=masks.prefix(ids(1)))),
    Refusal(ValueError, "mask", r"document key ids of shape \(6,\), need .*\(8,\)", dense(mask=masks.document(ids(6)))),
    Refusal(ValueError, "mask", r"document query ids of shape \(3, 6\)", dense(mask=masks.document(ids(3, 6), ids(8)))),
    Refusal(ValueError, "mask", r"document query ids of shape \(3,\)", packed(mask=masks.document(ids(3), ids(9)))),
    Refusal(ValueError, "mask", r"shape \(6, 9\), need .* = \(2, 4, 6, 8\)", dense(mask=tensors(6, 9).bool())),
    Refusal(ValueError, "mask", r"shape \(3, 7\), need one", packed(mask=masks.dense(tensors(3, 7).bool()))),
    Refusal(
        ValueError,
        "mask",
        r"block state of shape \(1, 1, 2, 3\), need \(1 or 2, 1 or 4, 2, 2\)",
        dense(mask=masks.block(blocks(1, 1, 2, 3), (4, 4))),
    ),
    Refusal(ValueError, "mask", r"block state of shape \(3, ", dense(mask=masks.block(blocks(3, 1, 2, 2), (4, 4)))),
    Refusal(ValueError, "mask", r"block state of shape \(1, 2, ", dense(mask=masks.block(blocks(1, 2, 2, 2), (4, 4)))),
    Refusal(ValueError, "mask", "block state outside 0, 1, 2", dense(mask=masks.block(blocks(1, 1, 2, 2) * 3, (4, 4)))),
    Refusal(
        ValueError,
        "mask",
        "prefix lengths",
        dense(mask=masks.block(blocks(1, 1, 2, 2), (4, 4), masks.causal() & masks.prefix(ids(3)))),
    ),
]

HIDDEN = deque([torch.ones(100, dtype=torch.bool)])


def hidden(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Captures a tensor through a deque, where nobody looks."""
    return HIDDEN[0][kv_idx]


def overwriting(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Writes through a view."""
    twin = score.clone()
    twin.view(1).add_(1)
    return twin


def branching(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> bool:
    return bool(q_idx > kv_idx)


MODIFIERS = [
    Refusal(TypeError, "mask_mod", "'<lambda>' .*too many positional", dense(mask=lambda q_idx, kv_idx: True)),
    Refusal(
        TypeError,
        "score_mod",
        r"missing a required.*score_mod\(score, b, ",
        dense(score_mod=lambda s, b, h, q, k, x: s),
    ),
    Refusal(TypeError, "score_mod", "returned NoneType, need a tensor", dense(score_mod=lambda *at: None)),
    Refusal(
        ValueError, "score_mod", r"returned shape \(3,\), need one", dense(score_mod=lambda s, *at: s + tensors(3))
    ),
    Refusal(TypeError, "mask_mod", "returned torch.int64, need a boolean", dense(mask=lambda b, h, q, k: q - k)),
    Refusal(TypeError, "mask_mod", "returned int, need a boolean", lambda: masks.custom(lambda b, h, q, k: 1)),
    Refusal(TypeError, "score_mod", "returned torch.complex64", dense(score_mod=lambda s, *at: torch.complex(s, s))),
    Refusal(ValueError, "score_mod", "'overwriting' .*in place.*try x = x", dense(score_mod=overwriting)),
    Refusal(TypeError, "score_mod", "returned a boolean, need a score", dense(score_mod=lambda s, *at: s > 0)),
    Refusal(
        ValueError, "mask_mod", "'branching' .*test_check.py:.*cannot be traced.*torch.where", dense(mask=branching)
    ),
    Refusal(
        ValueError,
        "score_mod",
        "draws random numbers.*try dropout_p",
        dense(score_mod=lambda s, *at: s + torch.rand(())),
    ),
    Refusal(ValueError, "mask_mod", "'hidden' .*closure, global", lambda: trace._constant_route(hidden, "mask")),
    Refusal(ValueError, "score_mod or mask", "the key 'nothing'.*trace.lift", lambda: trace.graph("nothing")),
]

DROPOUT_MASK = [
    Refusal(TypeError, "seed", "NoneType, need the int or int64 tensor", lambda: dropout_mask(None, 0.1, 1, 1, 2, 2)),
    Refusal(
        TypeError, "seed", r"a torch.float32 tensor of shape \(\)", lambda: dropout_mask(tensors(), 0.1, 1, 1, 2, 2)
    ),
    Refusal(ValueError, "seed", "fits in 64 bits", lambda: dropout_mask(-(2**63) - 1, 0.1, 1, 1, 2, 2)),
    Refusal(TypeError, "dropout_p", "str, need a number", lambda: dropout_mask(1, "0.1", 1, 1, 2, 2)),
    Refusal(ValueError, "dropout_p", "1, need a probability", lambda: dropout_mask(1, 1, 1, 1, 2, 2)),
    Refusal(TypeError, "batch", "float, need an int", lambda: dropout_mask(1, 0.1, 1.0, 1, 2, 2)),
    Refusal(TypeError, "heads", "Tensor, need an int", lambda: dropout_mask(1, 0.1, 1, ids(), 2, 2)),
    Refusal(ValueError, "seqlen_q", "-2, need 0 or more", lambda: dropout_mask(1, 0.1, 1, 1, -2, 2)),
    Refusal(ValueError, "seqlen_kv", "-1, need 0 or more", lambda: dropout_mask(1, 0.1, 1, 1, 2, -1)),
]

MERGE = [
    Refusal(TypeError, "states", "generator, need a list", lambda: merge(s for s in [state()])),
    Refusal(ValueError, "states", "an empty list, need one or more", lambda: merge([])),
    Refusal(TypeError, r"states\[0\]", r"Tensor, need a pair .*try merge\(\[a, b\]\)", lambda: merge(state())),
    Refusal(TypeError, r"states\[1\]", "tuple, need a pair", lambda: merge([state(), (tensors(1), None)])),
    Refusal(TypeError, r"states\[1\]", "tuple, need a pair", lambda: merge([state(), (*state(), 0)])),
    Refusal(TypeError, r"states\[0\] out", "torch.int64, need a floating", lambda: merge([state(dtype=torch.int64)])),
    Refusal(TypeError, r"states\[0\] lse", "torch.bfloat16, need", lambda: merge([state(lse_dtype=torch.bfloat16)])),
    Refusal(
        ValueError,
        r"states\[0\]",
        r"out .* with lse \(1, 3, 2\), need",
        lambda: merge([(state()[0], tensors(1, 3, 2))]),
    ),
    Refusal(ValueError, r"states\[0\]", r"with lse \(\), need", lambda: merge([(tensors(1), tensors())])),
    Refusal(ValueError, r"states\[1\]", r"out \(2, 3, 2, 8\), need \(1, ", lambda: merge([state(), state(2)])),
    Refusal(
        ValueError,
        r"states\[1\] out",
        "on meta, need cpu as states\\[0\\].out",
        lambda: merge([state(), tuple(part.to(META) for part in state())]),
    ),
    Refusal(ValueError, r"states\[0\] lse", "on meta", lambda: merge([(state()[0], state()[1].to(META))])),
]

SHARDING = [
    Refusal(ValueError, "sharding", "'Ring', need one .*context_parallel", lambda: sharded.known_sharding("Ring", {})),
    Refusal(ValueError, "layout", "'striped', need 'zigzag'", lambda: sharded.layout("striped")),
    Refusal(ValueError, "scheme", "'star', need one of 'ring'", lambda: sharded.scheme("star")),
    Refusal(ValueError, "group", "no process group.*try torch.distributed", lambda: sharded.initialized(False)),
    Refusal(ValueError, "group", "not part of, need one", lambda: sharded.member(-1)),
    Refusal(ValueError, "group", "is no more, need it .*destroy_process_group", sharded.group_destroyed),
    Refusal(TypeError, "group", "str, need a torch ProcessGroup", lambda: sharded.group_kind("all")),
    Refusal(ValueError, "group", "a mesh of 2 dimensions, need 1", lambda: sharded.mesh_dimensions(2, 1, "ring")),
    Refusal(
        ValueError, "q", r"7, need a multiple of 4 .*try padding to 8", lambda: sharded.divisible("q", 7, 4, "zigzag")
    ),
    Refusal(ValueError, "dim", "3, need the place of the sequence", lambda: sharded.dimension(3, 2)),
    Refusal(ValueError, "q", "4 heads for 3 ranks.*try ring_attention", lambda: sharded.heads_over_ranks(4, 3)),
    Refusal(NotImplementedError, "dropout_p", "cu_seqlens_q.*need 0.*ulysses", lambda: sharded.no_packed_dropout(0.1)),
    Refusal(TypeError, "options", "'cauzal', need keyword", lambda: sharded.no_options(["cauzal"])),
    Refusal(ValueError, "k", r"placements .*need Shard\(1\)", lambda: sharded.sequence_sharded("k", [None], 1)),
    Refusal(
        NotImplementedError,
        "k",
        "fp8.Scaled, need a tensor where.*try the one",
        lambda: sharded.unrounded(Q, fp8.quantize(Q, KV, KV).k, KV),
    ),
    Refusal(TypeError, "q, k, v", "plain tensors, need all", lambda: sharded.all_distributed([True, False])),
    Refusal(
        NotImplementedError, "q", "cu_seqlens_q, need plain .*try flashtile", lambda: sharded.dtensors([True] * 3, True)
    ),
    Refusal(ValueError, "seed", "None beside dropout on DTensors", lambda: sharded.seed_of_all(0.1, None)),
    Refusal(ValueError, "buffer_seq_dims", "1 numbers for 0 buffers", lambda: sharded.buffers([], [1])),
    Refusal(TypeError, "buffers", "int at place 0, need tensors", lambda: sharded.buffers([3], [0])),
    Refusal(ValueError, "context_parallel", "inside of another, need one", sharded.inside_context),
    Refusal(
        sharded.RanksDisagree,
        "scale",
        "1 on rank 0, 2 on rank 1; need the same on every rank",
        lambda: sharded.ranks_disagree({0: {"q": "a", "scale": "1"}, 1: {"q": "a", "scale": "2"}}),
    ),
]

CONSTRUCTED = [
    masks.causal,
    masks.window,
    masks.chunk,
    masks.prefix,
    masks.document,
    masks.dense,
    masks.block,
    masks.custom,
    masks.from_block_mask,
]
MACHINE = [
    Refusal(
        RuntimeError,
        "kernel cache",
        r"/x, which Triton cannot use \(PermissionError: no\), need a folder .*try making it writable",
        lambda: check.kernel_cache(PermissionError("no"), "/x"),
    ),
    Refusal(
        RuntimeError,
        "kernel cache",
        "a damaged entry in /x .*try emptying the folder",
        lambda: check.kernel_cache(ValueError("no"), "/x"),
    ),
]

TABLE = [
    *MACHINE,
    *TENSORS,
    *OPTIONS,
    *PACKING,
    *EXPLAIN,
    *CONSTRUCTORS,
    *MASKS,
    *MODIFIERS,
    *DROPOUT_MASK,
    *MERGE,
    *SHARDING,
]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{n}-{row.argument}") for n, row in enumerate(TABLE)])
def test_message(row: Refusal) -> None:
    """The message starts with the argument's name, says what it got and what it needs."""
    with pytest.raises(row.error, match=f"^{row.argument}: got .*{row.says}") as caught:
        row.call()
    assert type(caught.value) is row.error
    assert re.search("[,;] need ", str(caught.value)), str(caught.value)


def test_every_message_is_in_the_table() -> None:
    """Each `raise` of the package `check` runs when the table does, but of those in `APART`."""
    folder = Path(check.__file__).parent
    wanted = raises(path for path in folder.glob("*.py") if path.name not in APART)
    assert len(wanted) > 50
    assert sorted(wanted - lines_run(folder, [(row.call, row.error) for row in TABLE])) == []


@pytest.mark.parametrize("function", [attention, attention_varlen, explain, merge, dropout_mask, *CONSTRUCTED])
def test_every_argument_is_in_the_table(function: Callable[..., Any]) -> None:
    """Each parameter of each public function has a wrong value that is refused under its name."""
    refused = {re.sub(r"\\\[.*| .*", "", row.argument) for row in TABLE}
    assert set(inspect.signature(function).parameters) <= refused


def test_masks_combine_with_masks_only() -> None:
    """`&` and `|` leave other operands to them, so that Python names both types."""
    for other in (True, 1, "causal", None, lambda b, h, q_idx, kv_idx: True):
        with pytest.raises(TypeError, match=r"unsupported operand type.*'Mask'"):
            masks.causal() & other
        with pytest.raises(TypeError, match=r"unsupported operand type.*'Mask'"):
            masks.causal() | other


def test_misspelt_options_are_refused() -> None:
    """No public function swallows keywords that it does not know (users' point 2)."""
    for call in (
        dense(dropout=0.1),
        dense(sliding_window=4),
        packed(max_seqlen=9),
        lambda: explain(Q, KV, KV, window_size=(1, 1)),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()


def test_no_assert_statement_in_the_package() -> None:
    """Users' mistakes are raised: asserts vanish under -O and say nothing."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted(Path(flashtile.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_valid_borders_pass() -> None:
    """What lies just inside the limits is taken: the checks refuse no more than they say."""
    attention(Q, KV, KV, window=(0, 0), softcap=0, scale=0, dropout_p=0, seed=-(2**63), out_dtype=torch.float32)
    attention(Q, KV, KV, window=[None, None], softcap=None, mask=tensors(1, 6, 1).bool(), bias=tensors())
    attention(Q, KV, KV, dropout_p=0.5, seed=torch.tensor([2**63 - 1]), deterministic=True, alignment="top_left")
    attention_varlen(PACKED_Q, PACKED_KV, PACKED_KV, CU_Q, CU_KV, max_seqlen_q=5, max_seqlen_k=torch.tensor([1]))
    attention_varlen(PACKED_Q, PACKED_KV, PACKED_KV, CU_Q.long(), CU_KV, bias=tensors(1, 4, 50, 70))
    masks.block(blocks(1, 1, 2, 2).bool(), (4, 4), masks.full())
    dropout_mask(0, 0.0, 0, 0, 0, 0)
    merge([state(), state(dtype=torch.bfloat16)])
