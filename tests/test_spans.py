"""Spans: on random masks and tilings, outside the spans all is masked, and in their full part nothing is."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtile import masks, spans
from flashtile.mask_nodes import At, parse
from flashtile.masks import Mask
from flashtile.spans import FULL, MASKED, PARTIAL, Tiling

Build = Callable[[int, int, int, int, torch.Generator], Mask]
ALIGNMENTS = st.sampled_from(["bottom_right", "top_left"])
LIMIT = st.one_of(st.none(), st.integers(0, 40))


def _ids(count: int, rows: int, length: int, ascending: bool, generator: torch.Generator) -> Tensor:
    ids = torch.randint(count, (rows, length), generator=generator)
    return ids.sort(-1).values if ascending else ids


def _document(ascending: bool, per_batch: bool) -> Build:
    def build(batch: int, heads: int, seqlen_q: int, seqlen_kv: int, generator: torch.Generator) -> Mask:
        rows = batch if per_batch else 1
        queries = _ids(4, rows, seqlen_q, ascending, generator)
        return masks.document(queries, _ids(4, rows, seqlen_kv, ascending, generator))

    return build


def _padding(batch: int, heads: int, seqlen_q: int, seqlen_kv: int, generator: torch.Generator) -> Mask:
    return masks.prefix(torch.randint(seqlen_kv + 1, (batch,), generator=generator))


def _dense(rows: bool, columns: bool, per_head: bool, share: float) -> Build:
    def build(batch: int, heads: int, seqlen_q: int, seqlen_kv: int, generator: torch.Generator) -> Mask:
        sizes = (batch, heads if per_head else 1, seqlen_q if rows else 1, seqlen_kv if columns else 1)
        # Coarse noise, so that whole tiles come out masked and full.
        coarse = torch.rand(sizes[0], sizes[1], -(-sizes[2] // 9), -(-sizes[3] // 9), generator=generator) < share
        fine = coarse.repeat_interleave(9, 2).repeat_interleave(9, 3)
        return masks.dense(fine[:, :, : sizes[2], : sizes[3]])

    return build


def _block(block_q: int, block_kv: int, inner: Build | None, per_head: bool) -> Build:
    def build(batch: int, heads: int, seqlen_q: int, seqlen_kv: int, generator: torch.Generator) -> Mask:
        sizes = (batch, heads if per_head else 1, -(-seqlen_q // block_q), -(-seqlen_kv // block_kv))
        state = torch.randint(3, sizes, generator=generator).to(torch.int8)
        nested = inner(batch, heads, seqlen_q, seqlen_kv, generator) if inner else None
        return masks.block(state, (block_q, block_kv), nested)

    return build


def _fixed(mask: Mask) -> Build:
    return lambda batch, heads, seqlen_q, seqlen_kv, generator: mask


def _stripes(period: int) -> Build:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ((q_idx // period - kv_idx // period) % 3 == h % 2) & (kv_idx + b >= 3)

    return _fixed(masks.custom(mask_mod))


def _band(width: int) -> Build:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ((q_idx - kv_idx).abs() <= width + h) | (kv_idx < 2 + b)

    return _fixed(masks.custom(mask_mod))


def _joined(left: Build, right: Build, conjunction: bool) -> Build:
    def build(*sizes: Any) -> Mask:
        return left(*sizes) & right(*sizes) if conjunction else left(*sizes) | right(*sizes)

    return build


SIMPLE: st.SearchStrategy[Build] = st.one_of(
    st.just(_fixed(masks.full())),
    st.builds(lambda alignment: _fixed(masks.causal(alignment)), ALIGNMENTS),
    st.builds(lambda left, right, alignment: _fixed(masks.window(left, right, alignment)), LIMIT, LIMIT, ALIGNMENTS),
    st.builds(lambda size, alignment: _fixed(masks.chunk(size, alignment)), st.integers(1, 40), ALIGNMENTS),
    st.builds(lambda length: _fixed(masks.prefix(length)), st.integers(0, 80)),
    st.just(_padding),
    st.builds(_document, st.booleans(), st.booleans()),
    st.builds(_dense, st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1)),
    st.builds(_stripes, st.integers(1, 12)),
    st.builds(_band, st.integers(0, 20)),
)
BLOCKED = st.builds(_block, st.integers(1, 30), st.integers(1, 30), st.one_of(st.none(), SIMPLE), st.booleans())
MASKS = st.recursive(
    st.one_of(SIMPLE, BLOCKED), lambda inner: st.builds(_joined, inner, inner, st.booleans()), max_leaves=5
)
TILINGS = st.builds(
    Tiling,
    seqlen_q=st.integers(1, 70),
    seqlen_kv=st.integers(1, 70),
    tile_q=st.integers(1, 33),
    tile_kv=st.integers(1, 33),
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
)


def _sizes(tiling: Tiling) -> tuple[int, int, int, int]:
    return tiling.batch, tiling.heads, tiling.seqlen_q, tiling.seqlen_kv


def _allowed(mask: Mask, tiling: Tiling) -> Tensor:
    """The predicate on the whole matrix; test_masks.py holds it to plain Python."""
    shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    index = [torch.arange(size).view(shape) for size, shape in zip(_sizes(tiling), shapes, strict=True)]
    at = At(*index, tiling.seqlen_kv - tiling.seqlen_q)
    return parse(mask.token).allows(at, mask.tensors).expand(_sizes(tiling))


def _painted(mask: Mask, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """(visited, full) per entry, painted run by run; asserts that runs are in order, disjoint and cut at tiles."""
    visited, full = torch.zeros(2, *_sizes(tiling), dtype=torch.bool).unbind(0)
    runs = parse(mask.token).lower(tiling, mask.tensors).runs(tiling)
    assert len(runs) in (1, tiling.batch)
    for b in range(tiling.batch):
        per_head = runs[b if len(runs) > 1 else 0]
        assert len(per_head) in (1, tiling.heads)
        for h in range(tiling.heads):
            per_tile = per_head[h if len(per_head) > 1 else 0]
            assert len(per_tile) == tiling.query_tiles
            for index, row in enumerate(per_tile):
                rows = slice(index * tiling.tile_q, (index + 1) * tiling.tile_q)
                _check_row(row, tiling)
                for run in row:
                    visited[b, h, rows, run.begin : run.end] = True
                    full[b, h, rows, run.begin : run.end] = not run.masked
    return visited, full


def _check_row(row: list[spans.Run], tiling: Tiling) -> None:
    position = 0
    for run in row:
        assert position <= run.begin < run.end <= tiling.seqlen_kv
        assert run.begin % tiling.tile_kv == 0
        assert run.end % tiling.tile_kv == 0 or run.end == tiling.seqlen_kv
        position = run.end


def _check_laws(mask: Mask, tiling: Tiling) -> None:
    visited, full = _painted(mask, tiling)
    allowed = _allowed(mask, tiling)
    assert not bool((allowed & ~visited).any()), "a visible entry is not visited"
    assert not bool((full & ~allowed).any()), "a masked entry lies in the full part"


@settings(max_examples=3 * settings.default.max_examples)
@given(MASKS, TILINGS, st.integers(0, 2**31))
def test_laws(build: Build, tiling: Tiling, seed: int) -> None:
    _check_laws(build(*_sizes(tiling), torch.Generator().manual_seed(seed)), tiling)


@given(st.one_of(SIMPLE, BLOCKED), TILINGS, st.integers(0, 2**31))
def test_laws_of_single_masks(build: Build, tiling: Tiling, seed: int) -> None:
    _check_laws(build(*_sizes(tiling), torch.Generator().manual_seed(seed)), tiling)


@given(st.one_of(SIMPLE, BLOCKED), TILINGS, st.integers(0, 2**31))
def test_layout_says_the_same(build: Build, tiling: Tiling, seed: int) -> None:
    """A mask's Spans turned into a Layout obey the laws too: that is how they meet masks that are no intervals."""
    mask = build(*_sizes(tiling), torch.Generator().manual_seed(seed))
    state = parse(mask.token).lower(tiling, mask.tensors).to_layout(tiling).state
    state = state.expand(tiling.batch, tiling.heads, -1, -1)
    entries = state.repeat_interleave(tiling.tile_q, 2).repeat_interleave(tiling.tile_kv, 3)
    entries, allowed = entries[:, :, : tiling.seqlen_q, : tiling.seqlen_kv], _allowed(mask, tiling)
    assert not bool((allowed & (entries == MASKED)).any())
    assert not bool((~allowed & (entries == FULL)).any())
    assert bool(((state == MASKED) | (state == PARTIAL) | (state == FULL)).all())


EXACT = {
    "causal": masks.causal(),
    "causal_top_left": masks.causal("top_left"),
    "window": masks.window(9, 4),
    "prefix": masks.prefix(31),
    "chunk": masks.chunk(16),
    "prefix_lm": masks.causal() | masks.prefix(20),
    "streaming": masks.causal() & (masks.window(12, None) | masks.prefix(4)),
    "documents": masks.causal() & masks.document(torch.tensor([0] * 17 + [1] * 30 + [2] * 17)),
}


@pytest.mark.parametrize("name", EXACT)
def test_masked_tiles_are_not_visited(name: str) -> None:
    """The laws would hold for a span of everything; these common masks must be tight: no tile is visited in vain."""
    tiling = Tiling(64, 64, 16, 8)
    visited, full = _painted(EXACT[name], tiling)
    tiles = _allowed(EXACT[name], tiling).unflatten(3, (-1, 8)).unflatten(2, (-1, 16))[0, 0]
    seen, whole = (table[0, 0].unflatten(1, (-1, 8)).unflatten(0, (-1, 16))[:, 0, :, 0] for table in (visited, full))
    assert torch.equal(seen, tiles.any(3).any(1))
    assert torch.equal(whole, tiles.all(3).all(1))


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(3, 3), masks.chunk(4), masks.prefix(0), masks.full()])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(mask: Mask, lengths: tuple[int, int]) -> None:
    tiling = Tiling(*lengths, 16, 16)
    ((per_tile,),) = parse(mask.token).lower(tiling, mask.tensors).runs(tiling)
    assert all(row == [] for row in per_tile)


def test_far_apart_union_is_a_visit_list() -> None:
    """A window far from the prefix: the hull of both would visit everything between them."""
    tiling = Tiling(1024, 1024, 32, 32)
    visited, _ = _painted(masks.window(8, 0) | masks.prefix(8), tiling)
    assert int(visited[0, 0, -1].sum()) <= 3 * 32


def test_tables_may_be_longer_than_a_packed_sequence() -> None:
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 9])
    for mask in (masks.document(ids), masks.dense(ids[:, None] == ids)):
        _check_laws(mask, Tiling(5, 6, 4, 4))


@pytest.mark.parametrize("tile", [128, 64])
def test_a_long_causal_document_mask_is_cheap(tile: int) -> None:
    """131072 tokens, causal documents: lowered to tiles in milliseconds, and never as a matrix."""
    ids = (torch.arange(131072) // 1000).int()
    mask = masks.causal() & masks.document(ids)
    times = []
    for _ in range(40):
        start = time.perf_counter()
        lowered = parse(mask.token).lower(Tiling(131072, 131072, tile, tile), mask.tensors)
        times.append(time.perf_counter() - start)
    assert isinstance(lowered, spans.Spans)
    assert min(times) < 5e-3
