"""Parts of a problem: the mask and the modifiers of a rectangle of scores, in the rectangle's own indices.

Attention over a rectangle, some queries against some keys, is an attention problem of its own if what its mask and
modifiers say of local indices is what the whole's say of global ones. Windows stay windows, tables are sliced, and
functions of indices are composed with the shift, so that every backend takes a part as it takes any other problem.

Packed sequences become one dense sequence: token i of the packing is row i, and tables say which sequence it belongs
to and where in it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashtile import mask_nodes, trace
from flashtile.masks import Mask
from flashtile.predicates import Expression, predicate, read, token_of
from flashtile.queues import apart
from flashtile.scores import four_dimensions

ALL = '["full"]'
_FARTHEST = 2**28
"""Beyond all offsets of parts that fit into memory."""


@dataclass(frozen=True)
class Part:
    """Queries [query, query + queries) of heads [head, head + heads) against keys [key, key + keys).

    seqlen_q, seqlen_kv: those of the whole, which decide where its diagonal lies.
    """

    query: int
    queries: int
    key: int
    keys: int
    seqlen_q: int
    seqlen_kv: int
    head: int = 0
    heads: int | None = None

    @property
    def all_tokens(self) -> bool:
        """Whether queries and keys are those of the whole; perhaps not its heads."""
        return (self.queries, self.keys) == (self.seqlen_q, self.seqlen_kv)

    @property
    def whole(self) -> bool:
        """Whether every index is what it is in the whole."""
        return self.all_tokens and self.heads is None

    def diagonal(self, alignment: str) -> int:
        """The local key that lies on local query 0's diagonal."""
        shift = self.seqlen_kv - self.seqlen_q if alignment == "bottom_right" else 0
        return shift + self.query - self.key


@dataclass(frozen=True, eq=False)
class Tables:
    """Where packed tokens lie: int64 (tokens,) sequence and place in it, of queries and of keys; those of no sequence
    have the sequences -1 and -2, which differ. shift (sequences,): keys minus queries of each."""

    sequence_q: Tensor
    place_q: Tensor
    sequence_k: Tensor
    place_k: Tensor
    shift: Tensor


def tables(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, used: Sequence[Tensor | None], totals: tuple[int, int]
) -> Tables:
    """Of packed sequences; `used`: seqused_q and seqused_k; `totals`: tokens of each side."""
    found, lengths = [], []
    for side, (offsets, count, total) in enumerate(zip((cu_seqlens_q, cu_seqlens_k), used, totals, strict=True)):
        offsets = offsets.long().contiguous()
        length = offsets.diff() if count is None else count.long()
        token = torch.arange(total, device=offsets.device)
        # Packings of no sequence have nothing to look up: one of length 0 stands in.
        length = length if len(length) else length.new_zeros(1)
        begins = offsets[:-1] if len(offsets) > 1 else offsets.new_zeros(1)
        ends = offsets[1:].contiguous() if len(offsets) > 1 else offsets.new_zeros(1)
        sequence = torch.searchsorted(ends, token, right=True).clamp(max=len(length) - 1)
        place = token - begins[sequence]
        inside = (place >= 0) & (place < length[sequence])
        found += [torch.where(inside, sequence, -1 - side), torch.where(inside, place, 0)]
        lengths.append(length)
    return Tables(found[0], found[1], found[2], found[3], lengths[1] - lengths[0])


def mask(mask: Mask, part: Part, device: torch.device) -> Mask | None:
    """What the mask says of a part; None: nothing of it is visible, whatever its tensors hold."""
    if part.whole:
        return mask
    return _cut(json.loads(mask.token), mask.tensors, part, device)


@lru_cache(maxsize=256)
def same_for_all_heads(token: str) -> bool:
    """Whether a mask never asks which head it is for."""
    kind, *rest = json.loads(token)
    if kind in ("and", "or"):
        return all(same_for_all_heads(token_of(each)) for each in rest)
    return kind in ("full", "causal", "window", "band", "chunk", "prefix", "document")


def _cut(expression: Expression, tensors: Sequence[Tensor], part: Part, device: torch.device) -> Mask | None:
    kind, *rest = expression
    if kind in ("and", "or"):
        return _cut_pair(kind, rest, tensors, part, device)
    if kind == "full" or (part.all_tokens and kind in ("causal", "window", "chunk", "prefix", "document")):
        return Mask(token_of(expression), tuple(tensors))
    if kind in ("causal", "window"):
        left, right, alignment = (-1, 0, rest[0]) if kind == "causal" else rest
        return _cut_window(left, right, part, part.diagonal(alignment))
    if kind == "chunk":
        return _cut_chunk(rest[0], part, part.diagonal(rest[1]), device)
    if kind == "prefix":
        return _cut_prefix(rest[0], tensors, part, device)
    if kind == "document":
        query_ids, key_ids = tensors
        return Mask(
            '["document"]', (_columns(query_ids, part.query, part.queries), _columns(key_ids, part.key, part.keys))
        )
    if kind == "dense":
        return Mask('["dense"]', (sliced(tensors[0], part),))
    if kind == "block" and part.all_tokens:
        inner = _cut(rest[2], tensors[1:], part, device) or Mask(ALL)
        return Mask(f'["block",{rest[0]},{rest[1]},{inner.token}]', (sliced(tensors[0], part), *inner.tensors))
    return _composed_mask(expression, tensors, part, device)


def _cut_pair(
    kind: str, pair: Sequence[Expression], tensors: Sequence[Tensor], part: Part, device: torch.device
) -> Mask | None:
    split = mask_nodes.parse(token_of(pair[0])).arity
    left = _cut(pair[0], tensors[:split], part, device)
    right = _cut(pair[1], tensors[split:], part, device)
    if kind == "and":
        if left is None or right is None:
            return None
        return right if left.token == ALL else left if right.token == ALL else left & right
    if left is None or right is None:
        return left or right
    return Mask(ALL) if ALL in (left.token, right.token) else left | right


def _columns(ids: Tensor, first: int, count: int) -> Tensor:
    return ids[..., first : first + count]


def _cut_window(left: int, right: int, part: Part, diagonal: int) -> Mask | None:
    """`left`, `right`: -1 for no limit; `diagonal`: see `Part.diagonal`."""
    lowest, highest = 1 - part.queries, part.keys - 1
    low = diagonal - left if left >= 0 else None
    high = diagonal + right if right >= 0 else None
    if (low is not None and low > highest) or (high is not None and high < lowest):
        return None
    low = None if low is None or low <= lowest else low
    high = None if high is None or high >= highest else high
    if low is None and high is None:
        return Mask(ALL)
    if low is None and high in (part.keys - part.queries, 0):
        return Mask('["causal","bottom_right"]' if high == part.keys - part.queries else '["causal","top_left"]')
    return Mask(token_of(["band", low, high]))


def _cut_chunk(size: int, part: Part, diagonal: int, device: torch.device) -> Mask | None:
    """Chunks are documents: query i is in that of its diagonal."""
    query_ids, key_ids = _chunk_ids(size, part.queries, part.keys, diagonal + part.key, part.key, device)
    first, last = (diagonal + part.key) // size, (diagonal + part.key + part.queries - 1) // size
    if last < part.key // size or first > (part.key + part.keys - 1) // size:
        return None
    return Mask('["document"]', (query_ids, key_ids))


@lru_cache(maxsize=256)
def _chunk_ids(size: int, queries: int, keys: int, query: int, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    def made() -> tuple[Tensor, Tensor]:
        rows, columns = torch.arange(queries, device=device), torch.arange(keys, device=device)
        return (rows + query) // size, (columns + key) // size

    return apart(made)


def _cut_prefix(length: int, tensors: Sequence[Tensor], part: Part, device: torch.device) -> Mask | None:
    if length < 0:
        return Mask('["prefix",-1]', ((tensors[0].long() - part.key).clamp(min=0),))
    if length <= part.key:
        return None
    return Mask(ALL) if length >= part.key + part.keys else Mask(f'["prefix",{length - part.key}]')


def sliced(table: Tensor, part: Part) -> Tensor:
    """The part of a table that broadcasts to (batch, heads, seqlen_q, seqlen_kv), four dimensions, a view."""
    return four_dimensions(table)[table_slices(table, part)]


def table_slices(table: Tensor, part: Part) -> tuple[slice, ...]:
    """Where in `four_dimensions(table)` a part lies."""
    spans = ((0, None), (part.head, part.heads), (part.query, part.queries), (part.key, part.keys))
    return tuple(
        slice(None) if size == 1 or count is None else slice(first, first + count)
        for size, (first, count) in zip(four_dimensions(table).shape, spans, strict=True)
    )


@lru_cache(maxsize=1024)
def numbers(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Kept, so that lists of tiles that were made of them are found again."""
    return apart(lambda: torch.tensor(values, dtype=torch.int64, device=device)).unbind()


def _origin(part: Part, device: torch.device) -> tuple[Tensor, ...]:
    """(first head, first query, first key, keys minus queries of the whole)."""
    return numbers((part.head, part.query, part.key, part.seqlen_kv - part.seqlen_q), device)


def _bounded(origin: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, of which kernels then know that 32 bits hold them: indices stay as narrow as they are."""
    head, query, key, shift = origin
    return [
        head.clamp(0, _FARTHEST),
        query.clamp(0, _FARTHEST),
        key.clamp(0, _FARTHEST),
        shift.clamp(-_FARTHEST, _FARTHEST),
    ]


def _composed_mask(expression: Expression, tensors: Sequence[Tensor], part: Part, device: torch.device) -> Mask:
    """Any mask as a function of shifted indices."""
    origin = _origin(part, device)

    def allowed(given: Sequence[Tensor], b: Any, h: Any, q: Any, k: Any) -> Any:
        head, query, key, shift = _bounded(given[:4])
        return predicate(expression, given[4:], b, h + head, q + query, k + key, shift)

    lifted = trace.compose(f"part {token_of(expression)}", "mask", allowed, (*origin, *tensors))
    return Mask(f'["custom","{lifted.key}",{len(lifted.tensors)}]', lifted.tensors)


def packed_mask(mask: Mask, where: Tables, part: Part, device: torch.device) -> Mask:
    """The mask of a part of packed sequences, as one of tokens."""
    expression, origin = json.loads(mask.token), _origin(part, device)
    listed = (where.sequence_q, where.place_q, where.sequence_k, where.place_k, where.shift)

    def allowed(given: Sequence[Tensor], b: Any, h: Any, q: Any, k: Any) -> Any:
        sequence_q, place_q, sequence_k, place_k, shift, *rest = given[4:]
        head, query, key, _ = _bounded(given[:4])
        q, k = q + query, k + key
        sequence = sequence_q[q]
        inside = sequence == sequence_k[k]
        at = sequence.clamp(min=0)
        seen = predicate(expression, rest, at, h + head, place_q[q], place_k[k], shift[at])
        return inside & seen

    lifted = trace.compose(f"packed {mask.token}", "mask", allowed, (*origin, *listed, *mask.tensors))
    return Mask(f'["custom","{lifted.key}",{len(lifted.tensors)}]', lifted.tensors)


Score = tuple[str, tuple[Tensor, ...]]
"""The key of a traced score_mod, "" for none, and the tensors that it reads."""


def score(
    key: str, tensors: Sequence[Tensor], slopes: Tensor | None, alignment: str, part: Part, device: torch.device
) -> Score:
    """score_mod, and ALiBi before it, as one function of local indices."""
    top_left = alignment == "top_left"

    def changed(given: Sequence[Tensor], score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        (head, query, key_, shift), rest = _bounded(given[:4]), list(given[4:])
        h, q, k = h + head, q + query, k + key_
        if slopes is not None:
            diagonal = q if top_left else q + shift
            score = score - _slope(rest.pop(0), b, h, score) * (diagonal - k).abs().to(score.dtype)
        return _apply(key, score, b, h, q, k, rest)

    given = (*_origin(part, device), *(() if slopes is None else (slopes,)), *tensors)
    lifted = trace.compose(f"part {key} {alignment} {slopes is not None}", "score", changed, given)
    return lifted.key, lifted.tensors


def packed_score(
    key: str,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    alignment: str,
    where: Tables,
    part: Part,
    device: torch.device,
) -> Score:
    """Bias, ALiBi and score_mod of packed sequences, as one function of tokens."""
    top_left = alignment == "top_left"
    present = [tensor for tensor in (bias, slopes) if tensor is not None]
    listed = (where.sequence_q, where.place_q, where.place_k, where.shift)

    def changed(given: Sequence[Tensor], score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        sequence_q, place_q, place_k, shift, *rest = given[4:]
        head, query, key_, _ = _bounded(given[:4])
        h, at = h + head, sequence_q[q + query].clamp(min=0)
        q, k = place_q[q + query], place_k[k + key_]
        if bias is not None:
            score = score + read(rest.pop(0), at, h, q, k).to(score.dtype)
        if slopes is not None:
            diagonal = q if top_left else q + shift[at]
            score = score - _slope(rest.pop(0), at, h, score) * (diagonal - k).abs().to(score.dtype)
        return _apply(key, score, at, h, q, k, rest)

    name = f"packed {key} {alignment} {bias is not None} {slopes is not None}"
    lifted = trace.compose(name, "score", changed, (*_origin(part, device), *listed, *present, *tensors))
    return lifted.key, lifted.tensors


def _slope(slopes: Tensor, b: Any, h: Any, score: Any) -> Any:
    return read(slopes, b, h).to(score.dtype)


def _apply(key: str, score: Any, b: Any, h: Any, q: Any, k: Any, tensors: Sequence[Tensor]) -> Any:
    """A traced score_mod inside of another function."""
    if not key:
        return score
    traced = trace.graph(key)
    if traced.double is not None and score.dtype is torch.float64:
        traced = traced.double
    return traced.forward.forward(score, b, h, q, k, *tensors)


def windows_only(token: str) -> bool:
    """Whether a mask is a conjunction of windows, or everything."""
    kind, *rest = json.loads(token)
    if kind == "and":
        return all(windows_only(token_of(part)) for part in rest)
    return kind in ("full", "causal", "window")
