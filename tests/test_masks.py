"""Masks: which keys attention really visits, against definitions written in plain Python.

`_visible` runs attention with equal scores and unit vectors as values, so that the output is the attention map. Rules
are called with Python integers, functions with single indices, one pair at a time: nothing of the library takes part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, or_masks

import flashtile
from flashtile import masks
from flashtile.mask_nodes import At, parse
from flashtile.masks import Mask
from tests import oracle
from tests.fuzz.problems import Problem
from tests.oracle import dense_mask
from tests.problems import packed

Sizes = tuple[int, int, int, int]
SIZES: Sizes = (2, 2, 39, 50)
Rule = Callable[[int, int, int, int], bool]


def _visible(sizes: Sizes, **options: Any) -> Tensor:
    """What attention attends to: bool (batch, heads, seqlen_q, seqlen_kv); also asserts that weights are equal."""
    batch, heads, seqlen_q, seqlen_kv = sizes
    q = torch.zeros(batch, seqlen_q, heads, 4)
    k = torch.zeros(batch, seqlen_kv, heads, 4)
    v = torch.eye(seqlen_kv)[None, :, None].expand(batch, -1, heads, -1)
    weights = flashtile.attention(q, k, v, **options).transpose(1, 2)  # type: ignore[union-attr]
    seen = weights > 0
    torch.testing.assert_close(weights, seen / seen.sum(-1, keepdim=True).clamp(min=1))
    return seen


@dataclass(frozen=True)
class Kind:
    """A mask and its rule (b, h, query, key) -> bool."""

    name: str
    mask: Callable[[], Mask]
    rule: Rule
    sizes: Sizes = SIZES

    def __str__(self) -> str:
        return self.name


SHIFT = SIZES[3] - SIZES[2]
SORTED = torch.tensor([[0] * 10 + [1] * 25 + [5] * 15, [2] * 30 + [3] * 1 + [4] * 19])
MIXED = (torch.arange(100).view(2, 50) * 7) % 4
KEY_IDS = torch.tensor([3, 1, 0, 2] * 12 + [9, 9])
LENGTHS = torch.tensor([0, 37])
ALLOWED = torch.rand(2, 1, 39, 50, generator=torch.Generator().manual_seed(1)) > 0.6
BLOCKS = torch.randint(3, (2, 2, 5, 3), generator=torch.Generator().manual_seed(2)).to(torch.int8)

KINDS = [
    Kind("full", masks.full, lambda b, h, i, j: True),
    Kind("causal", masks.causal, lambda b, h, i, j: j <= i + SHIFT),
    Kind("causal_top_left", lambda: masks.causal("top_left"), lambda b, h, i, j: j <= i),
    Kind("causal_few_keys", masks.causal, lambda b, h, i, j: j <= i - 20, (1, 1, 50, 30)),
    Kind("window", lambda: masks.window(5, 2), lambda b, h, i, j: i + SHIFT - 5 <= j <= i + SHIFT + 2),
    Kind("window_diagonal", lambda: masks.window(0, 0), lambda b, h, i, j: j == i + SHIFT),
    Kind("window_no_left", lambda: masks.window(None, 3), lambda b, h, i, j: j <= i + SHIFT + 3),
    Kind("window_no_right", lambda: masks.window(3, None), lambda b, h, i, j: j >= i + SHIFT - 3),
    Kind("window_no_limit", lambda: masks.window(None, None), lambda b, h, i, j: True),
    Kind("window_top_left", lambda: masks.window(4, 9, "top_left"), lambda b, h, i, j: i - 4 <= j <= i + 9),
    Kind("window_past_the_end", lambda: masks.window(10**6, 10**6), lambda b, h, i, j: True),
    Kind("window_without_end", lambda: masks.window(2**31, 2**61), lambda b, h, i, j: True),
    Kind("window_few_keys", lambda: masks.window(2, 1), lambda b, h, i, j: i - 22 <= j <= i - 19, (1, 1, 50, 30)),
    Kind("chunk", lambda: masks.chunk(8), lambda b, h, i, j: (i + SHIFT) // 8 == j // 8),
    Kind("chunk_one", lambda: masks.chunk(1), lambda b, h, i, j: i + SHIFT == j),
    Kind("chunk_top_left", lambda: masks.chunk(7, "top_left"), lambda b, h, i, j: i // 7 == j // 7),
    Kind("chunk_few_keys", lambda: masks.chunk(8), lambda b, h, i, j: (i - 20) // 8 == j // 8, (1, 1, 50, 30)),
    Kind("prefix", lambda: masks.prefix(13), lambda b, h, i, j: j < 13),
    Kind("prefix_none", lambda: masks.prefix(0), lambda b, h, i, j: False),
    Kind("prefix_past_the_end", lambda: masks.prefix(99), lambda b, h, i, j: True),
    Kind("prefix_per_sequence", lambda: masks.prefix(LENGTHS), lambda b, h, i, j: j < LENGTHS[b]),
    Kind("prefix_int32", lambda: masks.prefix(LENGTHS.int()), lambda b, h, i, j: j < LENGTHS[b]),
    Kind("document", lambda: masks.document(SORTED[:, :39], SORTED), lambda b, h, i, j: SORTED[b, i] == SORTED[b, j]),
    Kind("document_shared", lambda: masks.document(SORTED[1]), lambda b, h, i, j: SORTED[1, i] == SORTED[1, j],
         (2, 2, 50, 50)),
    Kind("document_mixed", lambda: masks.document(MIXED[:, :39], MIXED), lambda b, h, i, j: MIXED[b, i] == MIXED[b, j]),
    Kind("document_two_tables", lambda: masks.document(MIXED[:, :39].int(), KEY_IDS.int()),
         lambda b, h, i, j: MIXED[b, i] == KEY_IDS[j]),
    Kind("dense", lambda: masks.dense(ALLOWED), lambda b, h, i, j: ALLOWED[b, 0, i, j]),
    Kind("dense_matrix", lambda: masks.dense(ALLOWED[0, 0]), lambda b, h, i, j: ALLOWED[0, 0, i, j]),
    Kind("dense_row", lambda: masks.dense(ALLOWED[:, :, :1]), lambda b, h, i, j: ALLOWED[b, 0, 0, j]),
    Kind("dense_column", lambda: masks.dense(ALLOWED[..., 3:4]), lambda b, h, i, j: ALLOWED[b, 0, i, 3]),
    Kind("block", lambda: masks.block(BLOCKS, (8, 20)), lambda b, h, i, j: BLOCKS[b, h, i // 8, j // 20] > 0),
    Kind("block_bool", lambda: masks.block(BLOCKS[:1, :1] > 1, (8, 20)),
         lambda b, h, i, j: BLOCKS[0, 0, i // 8, j // 20] > 1),
    Kind("block_inner", lambda: masks.block(BLOCKS, (8, 20), masks.causal("top_left") & masks.prefix(21)),
         lambda b, h, i, j: BLOCKS[b, h, i // 8, j // 20] > (0 if j <= i and j < 21 else 1)),
    Kind("prefix_lm", lambda: masks.causal() | masks.prefix(30), lambda b, h, i, j: j <= i + SHIFT or j < 30),
    Kind("streaming", lambda: masks.causal() & (masks.window(6, None) | masks.prefix(4)),
         lambda b, h, i, j: j <= i + SHIFT and (j >= i + SHIFT - 6 or j < 4)),
    Kind("causal_documents", lambda: masks.causal() & masks.document(SORTED[:, :39], SORTED),
         lambda b, h, i, j: j <= i + SHIFT and SORTED[b, i] == SORTED[b, j]),
    Kind("nested", lambda: (masks.chunk(9) | masks.prefix(LENGTHS)) & (masks.window(20, 20) | masks.dense(ALLOWED)),
         lambda b, h, i, j: ((i + SHIFT) // 9 == j // 9 or j < LENGTHS[b])
         and (abs(i + SHIFT - j) <= 20 or ALLOWED[b, 0, i, j])),
]  # fmt: skip


def _expected(kind: Kind) -> Tensor:
    return dense_mask(kind.rule, kind.sizes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_predicate(kind: Kind) -> None:
    """The node's own predicate, on the whole matrix at once."""
    mask = kind.mask()
    shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    index = [torch.arange(size).view(shape) for size, shape in zip(kind.sizes, shapes, strict=True)]
    allowed = parse(mask.token).allows(At(*index, kind.sizes[3] - kind.sizes[2]), mask.tensors)
    assert torch.equal(allowed.expand(kind.sizes), _expected(kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention_sees_the_rule(kind: Kind, small_tiles: None) -> None:
    assert torch.equal(_visible(kind.sizes, mask=kind.mask()), _expected(kind))


@pytest.mark.parametrize("joined", ["and", "or"])
@pytest.mark.parametrize("table", [("padding",), ("document", True, 3), ("dense", 0.5, True, True)], ids=str)
def test_tables_beside_functions_of_packed_sequences(joined: str, table: tuple[Any, ...], small_tiles: None) -> None:
    """A function of the batch index has a layout for each sequence up to the one at hand, a table for all of them."""
    shape = packed((40, 7, 33), (50, 20, 33))
    oracle.check(Problem(shape, torch.float32, mask=(joined, table, ("function", "band"))).call("cpu"))


# Masks as users of FlexAttention write them. Each works on Python integers and on tensors alike.

GRID, KERNEL, TILE = 7, 3, 3


def natten(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Neighbourhood attention on a 7 x 7 image: Hassani et al. 2023, window 3 x 3 shifted to stay inside."""
    q_row, q_column, row, column = q_idx // GRID, q_idx % GRID, kv_idx // GRID, kv_idx % GRID
    centre_row, centre_column = _clamp(q_row, 1, GRID - 2), _clamp(q_column, 1, GRID - 2)
    return (abs(centre_row - row) <= KERNEL // 2) & (abs(centre_column - column) <= KERNEL // 2)


def _clamp(value: Any, low: int, high: int) -> Any:
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def sliding_tile(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Sliding tile attention (Zhang et al. 2025) on a 6 x 8 image stored tile by tile: 2 x 2 tiles, window 3 x 3."""
    tiles_across = 4
    q_tile, tile = q_idx // 4, kv_idx // 4
    near_row = abs(q_tile // tiles_across - tile // tiles_across) <= 1
    return near_row & (abs(q_tile % tiles_across - tile % tiles_across) <= 1)


def dilated_window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    distance = q_idx - kv_idx
    return (distance >= 0) & (distance < 20) & (distance % 4 == 0)


def block_diffusion(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Arriola et al. 2025: 24 noised then 24 clean tokens, blocks of 6."""
    half, size = 24, 6
    q_clean, clean = q_idx >= half, kv_idx >= half
    q_block, block = (q_idx % half) // size, (kv_idx % half) // size
    diagonal = (q_block == block) & (q_clean == clean)
    offset = (q_block > block) & clean & (q_clean == (q_idx < 0))
    causal = (q_block >= block) & clean & q_clean
    return diagonal | offset | causal


def shared_prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """12 prompt tokens, then answers of 9 tokens that see the prompt and themselves only."""
    prompt = 12
    same = ((q_idx - prompt) // 9 == (kv_idx - prompt) // 9) & (q_idx >= prompt)
    return (kv_idx <= q_idx) & ((kv_idx < prompt) | same)


def longformer(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (abs(q_idx - kv_idx) <= 3) | (kv_idx < 2) | (q_idx < 2)


def strided(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Sparse Transformer (Child et al. 2019): the last 7 keys and every seventh."""
    return (kv_idx <= q_idx) & ((q_idx - kv_idx < 7) | ((q_idx - kv_idx) % 7 == 0))


def per_head(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 5 * (h + 1) + 3 * b)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def everything(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= 0


def nothing(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx < 0


def sliding_window(size: int) -> Callable[..., Any]:
    def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx <= size) & (q_idx - kv_idx >= 0)

    return window


def documents(ids: Tensor) -> Callable[..., Any]:
    def document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ids[b, q_idx] == ids[b, kv_idx]

    return document


def document_local(ids: Tensor, starts: Tensor, inner: Callable[..., Any]) -> Callable[..., Any]:
    """attention-gym's transformer: `inner` sees positions counted from the start of the document."""

    def local(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same = ids[b, q_idx] == ids[b, kv_idx]
        return same & inner(b, h, q_idx - starts[ids[b, q_idx]], kv_idx - starts[ids[b, kv_idx]])

    return local


def tree(ancestors: Tensor) -> Callable[..., Any]:
    """Speculative decoding: node i sees node j where the table says that j is an ancestor."""

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ancestors[q_idx, kv_idx]

    return sees


def bigbird(chosen: Tensor) -> Callable[..., Any]:
    """Random blocks of 8 (Zaheer et al. 2020), from a table per head."""

    def random_blocks(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (chosen[h, q_idx // 8, kv_idx // 8] > 0) | (abs(q_idx - kv_idx) < 8)

    return random_blocks


def transfusion(spans: Tensor) -> Callable[..., Any]:
    """Zhou et al. 2024: causal text, full attention within each image [begin, end) of the table."""

    def modalities(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = q_idx >= kv_idx
        for begin, end in (spans[b, 0], spans[b, 1]):
            allowed = allowed | ((q_idx >= begin) & (q_idx < end) & (kv_idx >= begin) & (kv_idx < end))
        return allowed

    return modalities


def prefix_lm(lengths: Tensor) -> Callable[..., Any]:
    def prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < lengths[b]

    return or_masks(prefix, causal)


SQUARE: Sizes = (2, 2, 48, 48)
_GENERATOR = torch.Generator().manual_seed(3)
_IDS = torch.tensor([[0] * 20 + [1] * 15 + [2] * 13, [0] * 20 + [1] * 15 + [2] * 13])
_STARTS = torch.tensor([0, 20, 35])
_ANCESTORS = torch.rand(48, 48, generator=_GENERATOR) > 0.7
_CHOSEN = torch.randint(2, (2, 6, 6), generator=_GENERATOR)
_IMAGES = torch.tensor([[[4, 20], [30, 41]], [[0, 6], [24, 48]]])

FUNCTIONS: list[tuple[str, Callable[..., Any], Sizes]] = [
    ("causal", causal, SQUARE),
    ("everything", everything, SQUARE),
    ("nothing", nothing, SQUARE),
    ("sliding_window", sliding_window(6), SQUARE),
    ("documents", documents(_IDS), SQUARE),
    ("causal_documents", and_masks(causal, documents(_IDS)), SQUARE),
    ("document_local", document_local(_IDS, _STARTS, sliding_window(4)), SQUARE),
    ("dilated", dilated_window, SQUARE),
    ("prefix_lm", prefix_lm(torch.tensor([10, 33])), SQUARE),
    ("natten", natten, (1, 1, GRID * GRID, GRID * GRID)),
    ("sliding_tile", sliding_tile, SQUARE),
    ("shared_prefix", shared_prefix, SQUARE),
    ("block_diffusion", block_diffusion, SQUARE),
    ("longformer", longformer, SQUARE),
    ("strided", strided, SQUARE),
    ("per_head", per_head, (2, 4, 30, 30)),
    ("tree", tree(_ANCESTORS), SQUARE),
    ("bigbird", bigbird(_CHOSEN), SQUARE),
    ("transfusion", transfusion(_IMAGES), SQUARE),
    ("rectangle", and_masks(causal, dilated_window), (1, 2, 61, 20)),
]


@lru_cache
def _table(function: Callable[..., Any], sizes: Sizes) -> Tensor:
    return dense_mask(function, sizes, index=torch.tensor)


_NAMED = [pytest.param(function, sizes, id=name) for name, function, sizes in FUNCTIONS]


@pytest.mark.parametrize(("function", "sizes"), _NAMED)
def test_function_as_mask(function: Callable[..., Any], sizes: Sizes, small_tiles: None) -> None:
    assert torch.equal(_visible(sizes, mask=function), _table(function, sizes))


@pytest.mark.parametrize(("function", "sizes"), _NAMED)
def test_function_as_block_mask(function: Callable[..., Any], sizes: Sizes, small_tiles: None) -> None:
    blocks = create_block_mask(function, *sizes, device="cpu", BLOCK_SIZE=(16, 32))
    assert torch.equal(_visible(sizes, block_mask=blocks), _table(function, sizes))


@pytest.mark.parametrize(("function", "sizes"), _NAMED)
def test_function_joins_built_in_masks(function: Callable[..., Any], sizes: Sizes, small_tiles: None) -> None:
    table = _table(function, sizes)
    seen = _visible(sizes, mask=masks.custom(function) & masks.window(11, 3, "top_left") | masks.prefix(2))
    near = dense_mask(lambda b, h, i, j: i - 11 <= j <= i + 3, sizes)
    first = dense_mask(lambda b, h, i, j: j < 2, sizes)
    assert torch.equal(seen, table & near | first)


def test_block_mask_with_default_blocks() -> None:
    sizes = (1, 1, 150, 150)
    blocks = create_block_mask(sliding_window(9), *sizes, device="cpu")
    assert torch.equal(_visible(sizes, block_mask=blocks), dense_mask(sliding_window(9), sizes))


def test_all_mask_arguments_are_joined(small_tiles: None) -> None:
    blocks = create_block_mask(dilated_window, *SQUARE, device="cpu", BLOCK_SIZE=16)
    seen = _visible(SQUARE, causal=True, window=(15, 3), mask=documents(_IDS), block_mask=blocks)
    expected = _table(and_masks(causal, sliding_window(15), documents(_IDS), dilated_window), SQUARE)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("left", "right"), [(1, 0), (2, 0), (0, 2), (49, 0), (50, 50), (0, 0)])
def test_window_as_documented(left: int, right: int) -> None:
    seen = _visible((1, 1, 50, 50), window=(left, right))[0, 0]
    rule = dense_mask(lambda b, h, i, j: i - left <= j <= i + right, (1, 1, 50, 50))[0, 0]
    assert torch.equal(seen, rule)


def test_window_example_of_the_docstring() -> None:
    """`window(2, 0)` on 5 queries and 5 keys lets query 3 see keys 1, 2, 3."""
    assert _visible((1, 1, 5, 5), window=(2, 0))[0, 0, 3].tolist() == [False, True, True, True, False]


def test_captured_table_may_change_between_calls(small_tiles: None) -> None:
    """The trace is kept, the captured tensor is not: a new value, or a new tensor, is seen."""
    table = torch.zeros(SQUARE[2], dtype=torch.int64)

    def even(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return table[kv_idx] == 0

    assert bool(_visible(SQUARE, mask=even).all())
    table[10:] = 1
    assert torch.equal(_visible(SQUARE, mask=even), dense_mask(even, SQUARE))
    table = torch.ones(SQUARE[2], dtype=torch.int64)
    assert not bool(_visible(SQUARE, mask=even).any())


def test_captured_number_may_change_between_calls(small_tiles: None) -> None:
    for size in (3, 8):
        assert torch.equal(_visible(SQUARE, mask=sliding_window(size)), dense_mask(sliding_window(size), SQUARE))


def test_one_mask_serves_many_lengths(small_tiles: None) -> None:
    """A mask value that is not tied to a size is right at every size."""
    mask = masks.causal() & (masks.window(6, None) | masks.prefix(4)) | masks.custom(dilated_window)
    for seqlen_q, seqlen_kv in ((1, 1), (10, 30), (48, 48), (40, 9)):
        sizes = (1, 1, seqlen_q, seqlen_kv)
        shift = seqlen_kv - seqlen_q

        def rule(b: int, h: int, i: int, j: int, shift: int = shift) -> bool:
            near = j <= i + shift and (j >= i + shift - 6 or j < 4)
            return near or bool(dilated_window(b, h, i, j))

        assert torch.equal(_visible(sizes, mask=mask), dense_mask(rule, sizes))


def test_tensor_argument_broadcasts() -> None:
    for table in (ALLOWED, ALLOWED[0], ALLOWED[0, 0], ALLOWED[0, 0, 0]):
        assert torch.equal(_visible(SIZES, mask=table), table.expand(SIZES))
