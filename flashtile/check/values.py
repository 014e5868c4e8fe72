"""What the constructors of masks, `dropout_mask` and `merge` take, and a mask's tensors against a problem."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile import mask_nodes, masks
from flashtile.check.tensors import beside, broadcasts, floating, integers, is_integer, shape_of, tensor
from flashtile.problem import Inputs, Problem


def window_side(name: str, value: Any) -> None:
    if value is not None and not is_integer(value):
        raise TypeError(f"{name}: got {value!r}, need a count of keys, or None for no limit; try (128, 0)")
    if value is not None and value < 0:
        raise ValueError(f"{name}: got {value}, need 0 or more; try None for no limit")
    if value is not None and value >= 2**62:
        raise ValueError(f"{name}: got {value}, need less than 2 ** 62; try None for no limit")


def chunk_size(value: Any) -> None:
    if not is_integer(value):
        raise TypeError(f"size: got {value!r}, need an int, the keys of a chunk; try 1024")
    if value < 1:
        raise ValueError(f"size: got {value}, need 1 or more; try masks.full() for one chunk of everything")


def prefix_length(value: Any) -> None:
    if isinstance(value, Tensor):
        tensor("length", value)
        integers("length", value)
        if value.ndim != 1:
            raise ValueError(f"length: got shape {shape_of(value)}, need (batch,); try length.reshape(-1)")
    elif not is_integer(value):
        raise TypeError(f"length: got {value!r}, need an int or an integer tensor (batch,); try torch.tensor(lengths)")
    elif value < 0:
        raise ValueError(f"length: got {value}, need 0 or more; try masks.full() for all keys")


def document_value(query_ids: Any, key_ids: Any) -> None:
    named = (("query_ids", query_ids),) if key_ids is None else (("query_ids", query_ids), ("key_ids", key_ids))
    for name, ids in named:
        tensor(name, ids)
        integers(name, ids)
        if ids.ndim not in (1, 2):
            raise ValueError(f"{name}: got shape {shape_of(ids)}, need (seqlen,) or (batch, seqlen); try .reshape")
        beside(name, ids, query_ids, "query_ids")


def dense_value(value: Any) -> None:
    tensor("allowed", value)
    if value.dtype is not torch.bool:
        raise TypeError(
            f"allowed: got {value.dtype}, need bool (True: may attend); try attention's bias for additive ones"
        )
    if value.ndim > 4:
        raise ValueError(
            f"allowed: got shape {shape_of(value)}, need one that broadcasts to (batch, heads, seqlen_q, seqlen_kv)"
        )


def block_value(state: Any, block_size: Any, inner: Any) -> None:
    tensor("state", state)
    if state.dtype not in (torch.bool, torch.int8):
        raise TypeError(f"state: got {state.dtype}, need bool or int8; try state.to(torch.int8)")
    if state.ndim != 4:
        raise ValueError(
            f"state: got shape {shape_of(state)}, need (batch or 1, heads or 1, query blocks, key blocks); "
            "try state[None, None]"
        )
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2 or not all(map(is_integer, block_size)):
        raise TypeError(f"block_size: got {block_size!r}, need a pair of ints (queries, keys); try (128, 128)")
    if block_size[0] < 1 or block_size[1] < 1:
        raise ValueError(f"block_size: got {tuple(block_size)}, need 1 or more of each; try (128, 128)")
    if not (inner is None or isinstance(inner, masks.Mask)):
        raise TypeError(
            f"inner: got {type(inner).__name__}, need a flashtile.masks value or None; try masks.custom(inner) for a "
            "function"
        )


def custom_value(value: Any) -> None:
    if hasattr(value, "kv_num_blocks"):
        raise TypeError("mask_mod: got a FlexAttention BlockMask, need a function; try masks.from_block_mask")
    if not callable(value) or isinstance(value, masks.Mask):
        raise TypeError(f"mask_mod: got {type(value).__name__}, need a function mask_mod(b, h, q_idx, kv_idx) -> bool")


def block_mask_value(value: Any) -> None:
    if not hasattr(value, "kv_num_blocks") or not hasattr(value, "mask_mod"):
        raise TypeError(
            f"block_mask: got {type(value).__name__}, need a FlexAttention BlockMask; try mask for other masks"
        )


def dropout_p(value: Any) -> None:
    if not isinstance(value, float) and not is_integer(value):
        raise TypeError(f"dropout_p: got {type(value).__name__}, need a number in [0, 1); try float(dropout_p)")
    if not 0 <= value < 1:
        raise ValueError(f"dropout_p: got {value!r}, need a probability in [0, 1); try 0.1")


def seed_value(value: Any, allowed: str) -> None:
    """A seed that is there: an int of 64 bits or one int64 number in a tensor."""
    if isinstance(value, Tensor):
        if value.dtype is not torch.int64 or value.numel() != 1:
            raise TypeError(
                f"seed: got a {value.dtype} tensor of shape {shape_of(value)}, need {allowed}; try torch.tensor(7)"
            )
    elif not is_integer(value):
        raise TypeError(f"seed: got {type(value).__name__}, need {allowed}")
    elif not -(2**63) <= value < 2**63:
        raise ValueError(f"seed: got {value}, need one that fits in 64 bits; try seed % 2**63")


def dropout_mask(seed: Any, probability: Any, sizes: dict[str, Any]) -> None:
    """What `dropout_mask` takes; `sizes` are its last four arguments."""
    seed_value(seed, "the int or int64 tensor of one number that attention got")
    dropout_p(probability)
    for name, value in sizes.items():
        if not is_integer(value):
            raise TypeError(f"{name}: got {type(value).__name__}, need an int; try int({name})")
        if value < 0:
            raise ValueError(f"{name}: got {value}, need 0 or more; give it as attention's tensors have it")


def states(values: Any) -> None:
    """What `merge` takes."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"states: got {type(values).__name__}, need a list of (out, lse) pairs; try [a, b]")
    if len(values) == 0:
        raise ValueError("states: got an empty list, need one or more (out, lse) pairs")
    for index, pair in enumerate(values):
        _state(f"states[{index}]", pair, values[0])


def _state(name: str, pair: Any, first: Any) -> None:
    if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise TypeError(f"{name}: got {type(pair).__name__}, need a pair (out, lse) of tensors; try merge([a, b])")
    out, lse = pair
    floating(f"{name} out", out)
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} lse: got {lse.dtype}, need float32 or float64; try the lse that attention returned")
    rows = shape_of(lse.transpose(-1, -2)) if lse.ndim in (2, 3) else None
    if rows != shape_of(out)[:-1]:
        raise ValueError(
            f"{name}: got out {shape_of(out)} with lse {shape_of(lse)}, need (batch, seqlen, heads, headdim) with "
            "(batch, heads, seqlen), or (total, heads, headdim) with (heads, total)"
        )
    if shape_of(out) != shape_of(first[0]):
        raise ValueError(
            f"{name}: got out {shape_of(out)}, need {shape_of(first[0])} as states[0]; merge joins keys only"
        )
    beside(f"{name} out", out, first[0], "states[0].out")
    beside(f"{name} lse", lse, first[0], "states[0].out")


def mask(inputs: Inputs, problem: Problem) -> None:
    """The tensors of a Mask against the sizes of the problem; runs inside the operator, where sizes are known."""
    _mask_node(mask_nodes.parse(problem.mask), list(inputs.mask), inputs.q, problem)


def _mask_node(node: mask_nodes.Node, held: Sequence[Tensor], q: Tensor, problem: Problem) -> None:
    for part in held:
        beside("mask", part, q)
    if isinstance(node, mask_nodes.Both):
        split = node.left.arity
        _mask_node(node.left, held[:split], q, problem)
        _mask_node(node.right, held[split:], q, problem)
    elif isinstance(node, mask_nodes.Prefix) and held:
        if shape_of(held[0]) != (problem.batch,):
            raise ValueError(
                f"mask: got prefix lengths of shape {shape_of(held[0])}, need (batch,) = ({problem.batch},); "
                "try masks.prefix(n) for one length for all"
            )
    elif isinstance(node, mask_nodes.Document):
        for name, ids, length in zip(("query", "key"), held, (problem.seqlen_q, problem.seqlen_kv), strict=True):
            _document_ids(name, ids, length, problem)
    elif isinstance(node, mask_nodes.Dense):
        sizes = (problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_kv)
        broadcasts("mask", held[0], sizes, at_least=problem.varlen)
    elif isinstance(node, mask_nodes.Block):
        _block_state(node, held[0], problem)
        _mask_node(node.inner, held[1:], q, problem)


def _document_ids(name: str, ids: Tensor, length: int, problem: Problem) -> None:
    rows = ids.shape[0] if ids.ndim == 2 else 1
    fits = ids.shape[-1] >= length if problem.varlen else ids.shape[-1] == length
    if not fits or rows not in (1, problem.batch):
        raise ValueError(
            f"mask: got document {name} ids of shape {shape_of(ids)}, need (seqlen,) = ({length},) or "
            f"(batch, seqlen) = ({problem.batch}, {length}); try masks.document(query_ids, key_ids) where they differ"
        )


def _block_state(node: mask_nodes.Block, state: Tensor, problem: Problem) -> None:
    blocks = (-(-problem.seqlen_q // node.block_q), -(-problem.seqlen_kv // node.block_kv))
    batch, heads, *found = shape_of(state)
    if batch not in (1, problem.batch) or heads not in (1, problem.heads) or tuple(found) != blocks:
        raise ValueError(
            f"mask: got block state of shape {shape_of(state)}, need (1 or {problem.batch}, 1 or {problem.heads}, "
            f"{blocks[0]}, {blocks[1]}); try one entry for each {node.block_q} queries and {node.block_kv} keys"
        )
    if state.device.type == "cpu" and bool(((state < 0) | (state > 2)).any()):
        raise ValueError("mask: got block state outside 0, 1, 2; need 0: masked, 1: inner decides, 2: all visible")
