"""Random masks: nested tuples, such as ("and", ("causal", "top_left"), ("prefix", 9)), and what they say twice.

`value` is the library's Mask, `rule` a plain predicate on single indices; tables that both need are drawn once.
"""

import zlib
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from flashtile import masks
from flashtile.masks import Mask
from tests.problems import Draw, Feature, Rule, Shape, Tensors

Expression = tuple[Any, ...]

ALIGNMENTS = st.sampled_from(("bottom_right", "top_left"))
SIDE = st.none() | st.integers(0, 90)

FUNCTIONS: dict[str, Rule] = {
    "dilated": lambda b, h, q, kv: ((q - kv) % 3 == h % 3) | (kv < 2),
    "band": lambda b, h, q, kv: ((q - kv).abs() < 20 + 10 * h) & ((kv + b) % 4 != 1),
    "products": lambda b, h, q, kv: (q * kv) % 7 < 3,
    "halves": lambda b, h, q, kv: torch.where(h % 2 == 0, q >= kv, kv - q <= 12),
    "nothing": lambda b, h, q, kv: q < 0,
    "grid": lambda b, h, q, kv: ((q // 8 - kv // 8).abs() <= 1) & ((q % 8 - kv % 8).abs() <= 2),
}
"""Functions of the kind that users write."""


def expressions(packed: bool) -> st.SearchStrategy[Expression]:
    """Masks of up to a few parts."""
    simple = [
        st.tuples(st.just("causal"), ALIGNMENTS),
        st.tuples(st.just("window"), SIDE, SIDE, ALIGNMENTS),
        st.tuples(st.just("chunk"), st.integers(1, 40), ALIGNMENTS),
        st.tuples(st.just("prefix"), st.integers(0, 100)),
        st.just(("padding",)),
        st.tuples(st.just("document"), st.booleans(), st.integers(1, 5)),
        st.tuples(st.just("dense"), st.sampled_from((0.1, 0.5, 0.9)), st.booleans(), st.booleans()),
        st.tuples(st.just("function"), st.sampled_from(sorted(FUNCTIONS))),
    ]
    leaf: st.SearchStrategy[Any] = st.one_of(*simple)

    def wider(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        block = st.tuples(st.just("block"), st.integers(1, 40), st.integers(1, 40), st.none() | parts)
        both = st.tuples(st.sampled_from(("and", "or")), parts, parts)
        return both if packed else both | block

    return st.recursive(leaf, wider, max_leaves=3)


def feature(expression: Expression) -> Feature:
    """The mask as the argument `mask`, and as the reference's rule."""
    return Feature(
        lambda tensors, shape: {"mask": value(expression, tensors)},
        lambda tensors, shape: {"rule": rule(expression, tensors)},
        fixed=lambda shape, draw: tables(expression, shape, draw),
    )


def block_mask(name: str, block: tuple[int, int]) -> Feature:
    """A FlexAttention BlockMask."""
    function = FUNCTIONS[name]

    def options(tensors: Tensors, shape: Shape) -> dict[str, Any]:
        made = create_block_mask(function, *shape.scores, device=str(tensors["q"].device), BLOCK_SIZE=block)
        return {"block_mask": made}

    return Feature(options, lambda tensors, shape: {"rule": function})


def _key(expression: Expression) -> str:
    return f"mask{zlib.crc32(repr(expression).encode())}"


def tables(expression: Expression, shape: Shape, draw: Draw) -> Tensors:
    """What the expression reads, by name; equal parts read equal tables."""
    kind, *rest = expression
    if kind in ("and", "or"):
        return {**tables(rest[0], shape, draw), **tables(rest[1], shape, draw)}
    key, batch = _key(expression), shape.batch
    made: Tensors = {"shift": _shifts(shape, draw.device)}
    if kind == "padding":
        made[key] = draw.integers(shape.seqlen_kv + 1, batch)
    elif kind == "document":
        ids = draw.integers(rest[1], batch, max(shape.seqlen_q, shape.seqlen_kv))
        ids = ids.sort(-1).values if rest[0] else ids
        made |= {f"{key}q": ids[:, : shape.seqlen_q], f"{key}k": ids[:, : shape.seqlen_kv]}
    elif kind == "dense":
        density, heads, queries = rest
        sizes = (batch, shape.heads if heads else 1, shape.seqlen_q if queries else 1, shape.seqlen_kv)
        made[key] = draw.integers(1000, *sizes) < density * 1000
    elif kind == "block":
        sizes = (batch, shape.heads, -(-shape.seqlen_q // rest[0]), -(-shape.seqlen_kv // rest[1]))
        made[key] = draw.integers(3, *sizes).to(torch.int8)
        made |= {} if rest[2] is None else tables(rest[2], shape, draw)
    return made


def _shifts(shape: Shape, device: str) -> Tensor:
    """Where the diagonal of each batch entry lies, bottom right."""
    if shape.lengths_q is None or shape.lengths_kv is None:
        return torch.full((shape.batch,), shape.seqlen_kv - shape.seqlen_q, device=device)
    queries, keys = shape.used_q or shape.lengths_q, shape.used_kv or shape.lengths_kv
    return torch.tensor([k - q for q, k in zip(queries, keys, strict=True)], dtype=torch.int64, device=device)


def value(expression: Expression, tensors: Tensors) -> Mask:
    kind, *rest = expression
    if kind in ("and", "or"):
        left, right = (value(part, tensors) for part in rest)
        return left & right if kind == "and" else left | right
    key = _key(expression)
    if kind == "padding":
        return masks.prefix(tensors[key])
    if kind == "document":
        return masks.document(tensors[f"{key}q"], tensors[f"{key}k"])
    if kind == "dense":
        return masks.dense(tensors[key])
    if kind == "block":
        return masks.block(tensors[key], tuple(rest[:2]), None if rest[2] is None else value(rest[2], tensors))
    if kind == "function":
        return masks.custom(FUNCTIONS[rest[0]])
    plain: Mask = getattr(masks, kind)(*rest)
    return plain


def rule(expression: Expression, tensors: Tensors) -> Rule:
    kind, *rest = expression
    if kind in ("and", "or"):
        left, right = (rule(part, tensors) for part in rest)
        if kind == "and":
            return lambda b, h, q, kv: left(b, h, q, kv) & right(b, h, q, kv)
        return lambda b, h, q, kv: left(b, h, q, kv) | right(b, h, q, kv)
    return _leaf_rule(kind, rest, _key(expression), tensors)


def _leaf_rule(kind: str, rest: list[Any], key: str, tensors: Tensors) -> Rule:
    if kind == "function":
        return FUNCTIONS[rest[0]]
    if kind == "prefix":
        return lambda b, h, q, kv: kv < rest[0]
    if kind == "padding":
        return lambda b, h, q, kv: kv < tensors[key][b]
    if kind == "document":
        return lambda b, h, q, kv: tensors[f"{key}q"][b, q] == tensors[f"{key}k"][b, kv]
    if kind == "dense":
        _, heads, queries = rest
        return lambda b, h, q, kv: tensors[key][b, h if heads else 0, q if queries else 0, kv]
    if kind == "block":
        return _block_rule(rest, key, tensors)
    shift = tensors["shift"] * (rest[-1] == "bottom_right")
    if kind == "causal":
        return lambda b, h, q, kv: kv <= q + shift[b]
    if kind == "chunk":
        return lambda b, h, q, kv: (q + shift[b]) // rest[0] == kv // rest[0]
    left, right = (10**6 if side is None else side for side in rest[:2])
    return lambda b, h, q, kv: (kv >= q + shift[b] - left) & (kv <= q + shift[b] + right)


def _block_rule(rest: list[Any], key: str, tensors: Tensors) -> Rule:
    rows, columns, inner = rest
    inside = None if inner is None else rule(inner, tensors)

    def allowed(b: Any, h: Any, q: Any, kv: Any) -> Any:
        state = tensors[key][b, h, q // rows, kv // columns]
        return state > 0 if inside is None else (state == 2) | ((state == 1) & inside(b, h, q, kv))

    return allowed
