"""Parts of a problem: what a mask or a modifier says of local indices is what the whole says of global ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import cut, masks, trace
from flashtile.cut import Part
from flashtile.mask_nodes import At, parse
from flashtile.masks import Mask
from flashtile.predicates import token_of
from flashtile.spans import FULL, MASKED, Tiling

BATCH, HEADS, ROWS, KEYS = 2, 3, 30, 40
CPU = torch.device("cpu")
PARTS = {
    "low_low": Part(0, 10, 0, 10, ROWS, KEYS),
    "low_high": Part(0, 10, 30, 10, ROWS, KEYS),
    "high_low": Part(20, 10, 0, 10, ROWS, KEYS),
    "odd": Part(7, 11, 13, 9, ROWS, KEYS),
    "all_keys": Part(10, 10, 0, KEYS, ROWS, KEYS),
    "whole": Part(0, ROWS, 0, KEYS, ROWS, KEYS),
    "heads": Part(0, ROWS, 0, KEYS, ROWS, KEYS, head=1, heads=2),
    "odd_heads": Part(3, 13, 17, 20, ROWS, KEYS, head=2, heads=1),
}


def _random(*sizes: int) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(5))


def _dilated(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k) % 3 == h % 3) | (k < 2)


SEEN = _random(BATCH, ROWS, KEYS) > 0.4
IDS = (_random(BATCH, KEYS) * 4).long().sort(-1).values


def _table(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return SEEN[b, q, k] & (h >= 0)


STATE = (_random(BATCH, HEADS, 8, 7) * 3).to(torch.int8)
MASKS: dict[str, Mask] = {
    "full": masks.full(),
    "causal": masks.causal(),
    "causal_top_left": masks.causal("top_left"),
    "window": masks.window(5, 2),
    "window_far": masks.window(3, None),
    "window_top_left": masks.window(0, 4, "top_left"),
    "chunk": masks.chunk(7),
    "chunk_top_left": masks.chunk(9, "top_left"),
    "prefix": masks.prefix(18),
    "lengths": masks.prefix(torch.tensor([12, 33])),
    "document": masks.document(IDS[:, :ROWS], IDS),
    "document_shared": masks.document(IDS[0, :ROWS], IDS[1]),
    "dense": masks.dense(_random(BATCH, 1, ROWS, KEYS) > 0.5),
    "dense_keys": masks.dense(_random(HEADS, 1, KEYS) > 0.5),
    "block": masks.block(STATE, (4, 6), masks.causal("top_left") | masks.prefix(9)),
    "custom": masks.custom(_dilated),
    "custom_table": masks.custom(_table),
    "prefix_lm": masks.causal() | masks.prefix(6),
    "documents_causal": masks.causal("top_left") & masks.document(IDS[:, :ROWS], IDS) & masks.window(9, None),
    "everything": (masks.custom(_dilated) | masks.chunk(8)) & masks.dense(_random(1, KEYS) > 0.3) & masks.causal(),
}


def _allowed(mask: Mask, sizes: tuple[int, int, int, int]) -> Tensor:
    index = _indices(sizes)
    return parse(mask.token).allows(At(*index, sizes[3] - sizes[2]), mask.tensors).expand(sizes)


def _sizes(part: Part) -> tuple[int, int, int, int]:
    return BATCH, part.heads or HEADS, part.queries, part.keys


def _part_of(whole: Tensor, part: Part) -> Tensor:
    rows, keys = slice(part.query, part.query + part.queries), slice(part.key, part.key + part.keys)
    return whole[:, part.head : part.head + (part.heads or HEADS), rows, keys]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", MASKS)
def test_a_part_of_a_mask_allows_what_the_whole_allows_there(name: str, part: str) -> None:
    where = PARTS[part]
    wanted = _part_of(_allowed(MASKS[name], (BATCH, HEADS, ROWS, KEYS)), where)
    found = cut.mask(MASKS[name], where, CPU)
    if found is None:
        assert not wanted.any()
    else:
        assert torch.equal(_allowed(found, _sizes(where)), wanted)


@pytest.mark.parametrize(
    "limits", [(None, 3), (-2, None), (-4, 1), (2, 5), (-7, -3), (-40, -35), (30, None), (None, -30)]
)
def test_a_band_visits_all_that_it_allows(limits: tuple[int | None, int | None]) -> None:
    """Outside of the spans nothing is visible, in their full part everything."""
    mask = Mask(token_of(["band", *limits]))
    allowed = _allowed(mask, (1, 1, ROWS, KEYS))[0, 0]
    tiling = Tiling(ROWS, KEYS, 4, 8)
    state = parse(mask.token).lower(tiling, ()).to_layout(tiling).state[0, 0]
    for i, row in enumerate(state.tolist()):
        for j, found in enumerate(row):
            tile = allowed[4 * i : 4 * i + 4, 8 * j : 8 * j + 8]
            assert found != MASKED or not tile.any()
            assert found != FULL or tile.all()


def test_a_causal_square_is_causal_full_or_nothing() -> None:
    """So zig-zag rings run the kernels of plain and causal attention."""
    tokens = {}
    for query in (0, 10, 20):
        for key in (0, 10, 20):
            found = cut.mask(masks.causal(), Part(query, 10, key, 10, 30, 30), CPU)
            tokens[query, key] = found and found.token
    causal, full = '["causal","bottom_right"]', '["full"]'
    for (query, key), token in tokens.items():
        assert token == (causal if query == key else full if query > key else None)


def _relative(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * GAIN[h] + SEEN[b, q, k] * 0.5 + (q - k) * 0.01


GAIN = _random(HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alibi", [None, "heads", "batch"])
@pytest.mark.parametrize("part", ["low_high", "odd_heads"])
def test_a_part_of_a_score_function(part: str, alibi: str | None, dtype: torch.dtype) -> None:
    where = PARTS[part]
    lifted = trace.lift(_relative, "score")
    slopes = None if alibi is None else _random(*((BATCH, HEADS) if alibi == "batch" else (HEADS,)))
    key, tensors = cut.score(lifted.key, lifted.tensors, slopes, "bottom_right", where, CPU)
    scores = torch.randn(BATCH, HEADS, ROWS, KEYS, dtype=dtype)
    index = _indices((BATCH, HEADS, ROWS, KEYS))
    plain = scores
    if slopes is not None:
        distance = (index[2] + KEYS - ROWS - index[3]).abs()
        plain = scores - slopes.reshape(-1, HEADS, 1, 1).to(dtype) * distance
    wanted = _part_of(trace.graph(lifted.key).evaluate(plain, *index, lifted.tensors), where)
    found = trace.graph(key).evaluate(_part_of(scores, where), *_indices(_sizes(where)), tensors)
    torch.testing.assert_close(found, wanted)


def _indices(sizes: tuple[int, ...]) -> list[Tensor]:
    return [
        torch.arange(size).view([-1 if place == dim else 1 for place in range(4)]) for dim, size in enumerate(sizes)
    ]


def test_graphs_are_shared_by_the_parts_of_a_function() -> None:
    """One kernel serves all ranks and steps: the offsets are tensors."""
    found = [cut.mask(MASKS["custom"], PARTS[part], CPU) for part in ("low_low", "low_high", "high_low")]
    assert len({mask.token for mask in found if mask is not None}) == 1


def test_tables_say_where_packed_tokens_lie() -> None:
    offsets = torch.tensor([1, 4, 4, 9])
    where = cut.tables(offsets, offsets, (torch.tensor([2, 0, 5]), None), (11, 11))
    assert where.sequence_q.tolist() == [-1, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1]
    assert where.place_q.tolist() == [0, 0, 1, 0, 0, 1, 2, 3, 4, 0, 0]
    assert where.sequence_k.tolist() == [-2, 0, 0, 0, 2, 2, 2, 2, 2, -2, -2]
    assert where.shift.tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", ["full", "causal", "window", "chunk", "prefix", "lengths", "custom", "block", "dense"])
def test_a_part_of_packed_sequences(name: str) -> None:
    queries, keys = torch.tensor([0, 12, 30]), torch.tensor([0, 25, 40])
    where = cut.tables(queries, keys, (None, None), (30, 40))
    part = PARTS["odd_heads"]
    found = cut.packed_mask(MASKS[name], where, part, CPU)
    wanted = torch.zeros(1, HEADS, ROWS, KEYS, dtype=torch.bool)
    for i in range(2):
        rows, columns = slice(int(queries[i]), int(queries[i + 1])), slice(int(keys[i]), int(keys[i + 1]))
        sizes: Any = (2, HEADS, rows.stop - rows.start, columns.stop - columns.start)
        inner = MASKS[name]
        wanted[0, :, rows, columns] = _allowed(inner, sizes)[i] if name != "dense" else _dense(inner, i, sizes)
    assert torch.equal(_allowed(found, (1, 1, part.queries, part.keys)), _part_of(wanted, part))


def _dense(mask: Mask, index: int, sizes: tuple[int, ...]) -> Tensor:
    """Tables are shared: a sequence reads their first rows and columns."""
    return mask.tensors[0][index, :, : sizes[2], : sizes[3]].expand(sizes[1:])
