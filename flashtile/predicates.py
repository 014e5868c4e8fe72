"""Masks as functions of indices that can be traced: `cut` composes them with shifts and tables of packed sequences."""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flashtile import mask_nodes, trace
from flashtile.mask_nodes import At
from flashtile.spans import FULL, PARTIAL

Expression = list[Any]


def token_of(expression: Expression) -> str:
    """The token of `masks.Mask` that was read as this expression."""
    return json.dumps(expression, separators=(",", ":"))


def predicate(expression: Expression, tensors: Sequence[Tensor], b: Any, h: Any, q: Any, k: Any, shift: Any) -> Any:
    """What a mask says of one (query, key), in steps that can be traced."""
    kind, *rest = expression
    if kind in ("and", "or"):
        split = mask_nodes.parse(token_of(rest[0])).arity
        left = predicate(rest[0], tensors[:split], b, h, q, k, shift)
        right = predicate(rest[1], tensors[split:], b, h, q, k, shift)
        return left & right if kind == "and" else left | right
    if kind == "full":
        return k == k
    if kind in ("document", "dense", "prefix"):
        return _looked_up(kind, rest, tensors, b, h, q, k)
    if kind == "block":
        block_q, block_kv, inner = rest
        state = read(tensors[0], b, h, q // block_q, k // block_kv)
        return (state == FULL) | ((state == PARTIAL) & predicate(inner, tensors[1:], b, h, q, k, shift))
    if kind == "custom":
        return trace.graph(rest[0]).forward.forward(b, h, q, k, *tensors)
    return mask_nodes.parse(token_of(expression)).allows(At(b, h, q, k, shift), tensors)


def _looked_up(kind: str, rest: Sequence[Any], tensors: Sequence[Tensor], b: Any, h: Any, q: Any, k: Any) -> Any:
    if kind == "document":
        return read(tensors[0], b, q) == read(tensors[1], b, k)
    if kind == "dense":
        return read(tensors[0], b, h, q, k) != 0
    return k < (read(tensors[0], b) if rest[0] < 0 else rest[0])


def read(table: Tensor, *at: Any) -> Any:
    """One element, `at` its last indices; dimensions of size 1 are read at 0."""
    places = at[len(at) - table.ndim :]
    return table[tuple(0 * place if size == 1 else place for place, size in zip(places, table.shape, strict=True))]
