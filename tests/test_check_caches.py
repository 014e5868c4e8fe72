"""Every message about KV caches: a wrong call raises it, and the caches are as they were before."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile
from flashtile import check
from flashtile.kvcache import OutOfPages, PagedCache
from tests.raises import lines_run, raises


def _call(**changes: Any) -> None:
    """A sound call, contiguous or with a block table, with some arguments changed; caches must not change."""
    paged = "block_table" in changes
    given: dict[str, Any] = {
        "q": torch.randn(2, 1, 4, 8),
        "k_cache": torch.randn(*((7, 16) if paged else (2, 48)), 2, 8),
        "v_cache": torch.randn(*((7, 16) if paged else (2, 48)), 2, 6),
        "k": torch.randn(2, 1, 2, 8),
        "v": torch.randn(2, 1, 2, 6),
        "cache_seqlens": torch.tensor([3, 40]),
    }
    given |= changes
    stores = [given[name] for name in ("k_cache", "v_cache") if isinstance(given[name], torch.Tensor)]
    before = [store.detach().clone() for store in stores]
    tensors = [given.pop(name) for name in ("q", "k_cache", "v_cache")]
    try:
        flashtile.attention_kvcache(*tensors, **given)
    except Exception:
        assert all(torch.equal(store, old) for store, old in zip(stores, before, strict=True))
        raise
    assert not any(torch.equal(store, old) for store, old in zip(stores, before, strict=True))


TABLE = torch.tensor([[0, 2, 4], [6, 1, 3]])
COS = torch.randn(48, 4)
SHARED = torch.randn(2, 48, 2, 8)
EIGHT: dict[str, Any] = {
    "k_cache": torch.zeros(2, 48, 2, 8).to(torch.int8),
    "v_cache": torch.zeros(2, 48, 2, 6).to(torch.int8),
    "k_scale": torch.full((2,), 0.01),
    "v_scale": torch.full((2,), 0.01),
}
FOUR: dict[str, Any] = {
    **EIGHT,
    "k_cache": torch.zeros(2, 48, 2, 4, dtype=torch.uint8),
    "v_cache": torch.zeros(2, 48, 2, 3, dtype=torch.uint8),
}
PAGED_EIGHT: dict[str, Any] = {
    "k_cache": torch.zeros(7, 16, 2, 8).to(torch.int8),
    "v_cache": torch.zeros(7, 16, 2, 6).to(torch.int8),
    "k_scale": torch.full((7, 2), 0.01),
    "v_scale": torch.full((7, 2), 0.01),
    "block_table": TABLE,
}
UNUSED = {**PAGED_EIGHT, "k_scale": torch.tensor([[0.01, 0.01]] * 2 + [[torch.nan] * 2] + [[0.01, 0.01]] * 4)}
"""Page 2 is of no sequence, so it needs no scale."""
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q: got list, need a torch.Tensor"),
    ({"k_cache": torch.zeros(2, 48, 2, 8).int()}, TypeError, "k_cache: got torch.int32, need float16"),
    ({"v_cache": torch.zeros(48, 2, 6)}, ValueError, r"v_cache: got shape \(48, 2, 6\), need \(batch, seqlen, heads"),
    ({"v_cache": torch.zeros(9, 2, 6), "block_table": TABLE}, ValueError, r"v_cache: got shape .*\(pages, page_size"),
    ({"k_cache": torch.zeros(2, 48, 2, 8).half()}, TypeError, r"k_cache: got torch.float16, need torch.float32 as q"),
    ({"v_cache": torch.zeros(3, 48, 2, 6)}, ValueError, "v_cache: got 3 rows, need 2 as k_cache"),
    ({"v_cache": torch.zeros(8, 16, 2, 6), "block_table": TABLE}, ValueError, "v_cache: got 8 pages, need 7"),
    ({"v_cache": torch.zeros(2, 47, 2, 6)}, ValueError, "v_cache: got 47 keys, need 48 as k_cache"),
    ({"q": torch.zeros(2, 1, 5, 8)}, ValueError, "k_cache: got 2 heads, need a divisor of q's 5"),
    ({"q": torch.zeros(2, 1, 4, 9)}, ValueError, "k_cache: got headdim 8, need 9 as q"),
    ({"k_cache": torch.zeros(2, 48, 8, 2).transpose(2, 3)}, ValueError, "k_cache: got strides .* side by side"),
    ({"k": None}, ValueError, "k: got None beside v, need both or neither"),
    ({"v": None}, ValueError, "v: got None beside k, need both or neither"),
    ({"v": torch.zeros(2, 1, 2, 6).half()}, TypeError, "v: got torch.float16, need torch.float32 as q"),
    ({"k": torch.zeros(1, 1, 2, 8)}, ValueError, r"k: got shape \(1, 1, 2, 8\), need .* = \(2, 1, 2, 8\)"),
    ({"v": torch.zeros(2, 2, 2, 6)}, ValueError, r"v: got shape \(2, 2, 2, 6\), need .* = \(2, 1, 2, 6\)"),
    ({"block_table": TABLE.float()}, TypeError, "block_table: got torch.float32, need int32 or int64"),
    ({"block_table": TABLE[:1]}, ValueError, r"block_table: got shape \(1, 3\).*try cache_batch_idx"),
    (
        {"block_table": TABLE, "k_cache": torch.zeros(7, 8, 2, 8), "v_cache": torch.zeros(7, 8, 2, 6)},
        ValueError,
        "k_cache: got pages of 8 rows, need 16 or more",
    ),
    (
        {"k_cache": torch.zeros(1, 48, 2, 8), "v_cache": torch.zeros(1, 48, 2, 6)},
        ValueError,
        "k_cache: got 1 rows, need one for each of q's 2 sequences; try cache_batch_idx",
    ),
    ({"cache_seqlens": 48}, ValueError, "cache_seqlens: got 48 beside 1 new rows, need 0 to 47"),
    ({"cache_seqlens": None}, TypeError, "cache_seqlens: got NoneType, need an int or an integer tensor"),
    ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens: got torch.float32, need int32 or int64"),
    ({"cache_seqlens": torch.zeros(3).int()}, ValueError, r"cache_seqlens: got shape \(3,\), need \(batch,\) = \(2,\)"),
    ({"cache_seqlens": torch.tensor([3, 48])}, ValueError, "cache_seqlens: got 48 beside 1 new rows, need 0 to 47"),
    ({"cache_seqlens": torch.tensor([-1, 4])}, ValueError, "cache_seqlens: got -1 beside 1 new rows"),
    ({"cache_leftpad": 3}, TypeError, "cache_leftpad: got int, need an integer tensor"),
    ({"cache_leftpad": torch.tensor([4, 0])}, ValueError, "cache_leftpad: got 4 for sequence 0, need 0 to 3"),
    ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, "cache_batch_idx: got 2, need 0 to 1, the rows of k_cache"),
    (
        {"cache_batch_idx": torch.tensor([0, 2]), "block_table": TABLE},
        ValueError,
        "cache_batch_idx: got 2, need 0 to 1, the rows of block_table",
    ),
    ({"cache_batch_idx": torch.tensor([1, 1])}, ValueError, r"cache_batch_idx: got \[1, 1\] beside new keys"),
    (
        {"block_table": torch.tensor([[0, 9, 9], [6, 1, 7]])},
        ValueError,
        "block_table: got page 7 for sequence 1, need 0 to 6",
    ),
    ({"rotary_cos": COS}, ValueError, "rotary_sin: got None beside rotary_cos"),
    ({"rotary_sin": COS}, ValueError, "rotary_cos: got None beside rotary_sin"),
    (
        {"rotary_cos": COS, "rotary_sin": COS, "k": None, "v": None},
        ValueError,
        "rotary_cos: got one without new keys, need k and v",
    ),
    (
        {"rotary_cos": COS, "rotary_sin": COS, "k_cache": SHARED, "v_cache": SHARED[..., :6]},
        ValueError,
        "rotary_cos: got one beside a v_cache that is part of k_cache, need None",
    ),
    ({"rotary_cos": COS, "rotary_sin": COS.half()}, ValueError, "rotary_sin: got torch.float16 of shape"),
    ({"rotary_cos": COS, "rotary_sin": COS.int()}, TypeError, "rotary_sin: got torch.int32, need a floating-point"),
    ({"rotary_cos": COS, "rotary_sin": COS[:, :3].clone()}, ValueError, r"rotary_sin: got shape \(48, 3\)"),
    ({"rotary_cos": torch.zeros(48, 5), "rotary_sin": torch.zeros(48, 5)}, ValueError, "got 5 columns, need 1 to 4"),
    ({"rotary_cos": COS[:47], "rotary_sin": COS[:47]}, ValueError, "rotary_cos: got 47 positions, need 48"),
    (
        {"rotary_cos": COS, "rotary_sin": COS, "q": torch.zeros(2, 4, 4, 8)},
        ValueError,
        "rotary_cos: got 48 positions, need 51, for the rows .* and 3 queries more than new keys",
    ),
    (
        {"rotary_cos": torch.zeros(32, 4), "rotary_sin": torch.zeros(32, 4), "block_table": TABLE},
        ValueError,
        "rotary_cos: got 32 positions, need 33",
    ),
    (
        {"rotary_cos": COS[:40], "rotary_sin": COS[:40], "block_table": TABLE},
        ValueError,
        "cache_seqlens: got 40 beside 1 new rows, need 0 to 39.*longer rotary tables",
    ),
    ({"k_scale": torch.ones(2)}, ValueError, "k_scale: got one beside a cache of torch.float32, need None"),
    (
        {**EIGHT, "v_cache": torch.zeros(2, 48, 2, 6).half()},
        TypeError,
        "v_cache: got torch.float16, need torch.float32",
    ),
    ({**EIGHT, "v_cache": EIGHT["v_cache"].to(torch.float8_e5m2)}, TypeError, "got torch.float8_e5m2, need torch.int8"),
    ({**FOUR, "k_cache": torch.zeros(2, 48, 2, 8, dtype=torch.uint8)}, ValueError, "k_cache: got headdim 16, need 8"),
    ({**FOUR, "v": torch.zeros(2, 1, 2, 3)}, ValueError, r"v: got shape \(2, 1, 2, 3\), need .* = \(2, 1, 2, 6\)"),
    ({**FOUR, "k_scale": None}, ValueError, "k_scale: got None beside a cache of torch.uint8, need a float32 tensor"),
    ({**EIGHT, "v_scale": None}, ValueError, "v_scale: got None beside a cache of torch.int8, need a float32 tensor"),
    ({**EIGHT, "k_scale": 1.0}, TypeError, "k_scale: got float, need a torch.Tensor"),
    ({**EIGHT, "k_scale": torch.ones(3)}, ValueError, r"k_scale: got torch.float32 of shape \(3,\), need float32"),
    ({**EIGHT, "k_scale": torch.ones(2, 2)}, ValueError, r"of shape \(heads_kv,\) = \(2,\)"),
    ({**EIGHT, "v_scale": torch.ones(2).half()}, ValueError, "v_scale: got torch.float16 of shape"),
    (
        {**PAGED_EIGHT, "v_scale": torch.ones(6, 2)},
        ValueError,
        r"need float32, heads side by side, of shape \(heads_kv,\) or \(pages, heads_kv\) = \(2,\) or \(7, 2\)",
    ),
    ({**PAGED_EIGHT, "v_scale": torch.ones(2)}, ValueError, r"v_scale: got shape \(2,\), need \(7, 2\) as k_scale"),
    ({**EIGHT, "k_scale": torch.tensor([0.1, 0.0])}, ValueError, "k_scale: got 0.0, need finite numbers above 0"),
    ({**FOUR, "v_scale": torch.tensor([torch.nan, 0.1])}, ValueError, "v_scale: got nan, need finite numbers above 0"),
    (
        {**PAGED_EIGHT, "v_scale": torch.tensor([[0.1, 0.1]] * 6 + [[0.1, torch.inf]])},
        ValueError,
        "v_scale: got inf, need finite numbers above 0",
    ),
    ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved: got 1, need True or False"),
    ({"causal": None}, TypeError, "causal: got None"),
    ({"debug": 1}, TypeError, "debug: got 1"),
    ({"batch_invariant": 1}, TypeError, "batch_invariant: got 1"),
    ({"return_lse": None}, TypeError, "return_lse: got None"),
    ({"window": 4}, TypeError, "window: got int"),
    ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks: got shape \(3,\)"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes: got shape \(3,\)"),
    ({"scale": "x"}, TypeError, "scale: got str"),
    ({"num_splits": 2.0}, TypeError, "num_splits: got 2.0, need an int or None"),
    ({"num_splits": 0}, ValueError, "num_splits: got 0, need 1 to 256"),
    ({"num_splits": 2, "batch_invariant": True}, ValueError, "num_splits: got 2 beside batch_invariant"),
    ({"backend": "magic"}, ValueError, "backend: got 'magic'"),
    ({"q": torch.zeros(2, 1, 4, 8, requires_grad=True)}, ValueError, "q: got a tensor that requires a gradient"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_calls(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        _call(**changes)
    assert re.search("[,;] need ", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"block_table": TABLE}, {"block_table": torch.tensor([[0, -9, 99], [6, 1, 3]])}, EIGHT, FOUR, UNUSED],
)
def test_sound_calls_write(changes: dict[str, Any]) -> None:
    """Entries of pages that are not in use may be anything."""
    _call(**changes)


def test_gradients_may_be_off() -> None:
    with torch.no_grad():
        _call(q=torch.zeros(2, 1, 4, 8, requires_grad=True))


def _pool(**changes: Any) -> PagedCache:
    given: dict[str, Any] = {"pages": 4, "page_size": 16, "heads_kv": 2, "headdim": 8, "dtype": torch.float32}
    return PagedCache(**given | changes)


ROWS = torch.zeros(1, 3, 2, 8)
WRONG_POOLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: _pool(pages=0), ValueError, "pages: got 0, need 1 or more"),
    (lambda: _pool(page_size=8), ValueError, "page_size: got 8, need 16 or more"),
    (lambda: _pool(headdim=2.0), TypeError, "headdim: got float, need an int"),
    (lambda: _pool(dtype=torch.uint8, headdim_v=7), ValueError, "headdim_v: got 7, need an even number"),
    (lambda: _pool(dtype=torch.int16), TypeError, "dtype: got torch.int16, need float16"),
    (lambda: _pool().allocate(-1), ValueError, "tokens: got -1, need 0 or more"),
    (lambda: _pool().allocate(65), OutOfPages, "pages: got 4 free of 4, need 5 more; nothing has changed"),
    (lambda: _pool().fork(0), ValueError, "sequence: got 0, need one that allocate or fork returned"),
    (lambda: _pool().free(0), ValueError, "sequence: got 0"),
    (lambda: _pool().seqlen("a"), ValueError, "sequence: got 'a'"),
    (lambda: _pool().read(1), ValueError, "sequence: got 1"),
    (lambda: _pool().truncate(1, 0), ValueError, "sequence: got 1"),
    (lambda: _pool().block_table([1]), ValueError, "sequence: got 1"),
    (
        lambda: _with_one(lambda pool: pool.extend([0, 0], 1)),
        ValueError,
        r"sequences: got \[0, 0\], need each one once",
    ),
    (lambda: _with_one(lambda pool: pool.extend([0], 33, width=2)), ValueError, "width: got 2, need 3"),
    (lambda: _with_one(lambda pool: pool.append(0, ROWS, ROWS.half())), TypeError, "v: got torch.float16"),
    (lambda: _with_one(lambda pool: pool.append(0, ROWS, ROWS[:, :2])), ValueError, r"v: got shape \(1, 2, 2, 8\)"),
    (lambda: _with_one(lambda pool: pool.append(0, ROWS[0], ROWS[0])), ValueError, r"k: got shape \(3, 2, 8\)"),
]


def _with_one(wrong: Callable[[PagedCache], Any]) -> None:
    pool = _pool()
    assert pool.allocate() == 0
    try:
        wrong(pool)
    finally:
        assert (pool.seqlen(0), pool.pages_free) == (0, 4)


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG_POOLS, ids=[message[:40] for _, _, message in WRONG_POOLS])
def test_wrong_use_of_a_pool(wrong: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        wrong()
    assert re.search("[,;] need ", str(caught.value)), str(caught.value)


def test_combine_wants_as_many_of_both() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="lses: got 1 parts, need 2 as outputs"):
        flashtile.combine([out, out], [lse])
    with pytest.raises(TypeError, match="outputs: got int, need a tensor"):
        flashtile.combine(3, [lse])  # type: ignore[arg-type]


def test_every_message_is_in_a_table() -> None:
    """Each `raise` about KV caches runs when the tables do."""
    folder = Path(check.__file__).parent
    calls: list[tuple[Callable[[], Any], type[Exception]]] = [
        *((functools.partial(_call, **changes), kind) for changes, kind, _ in WRONG),
        *((wrong, kind) for wrong, kind, _ in WRONG_POOLS),
        (test_combine_wants_as_many_of_both, AssertionError),
    ]
    assert sorted(raises(folder / name for name in ("caches.py", "pages.py")) - lines_run(folder, calls)) == []


def test_every_argument_is_in_the_table() -> None:
    refused = {message.split(":")[0] for _, _, message in WRONG}
    assert set(inspect.signature(flashtile.attention_kvcache).parameters) <= refused
