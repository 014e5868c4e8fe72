"""Calls over a KV cache on a GPU: every case, graphs replayed with other lengths, large caches, no waiting."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import decoding, plan
from flashtile.decoding import CacheArguments
from flashtile.kernels.tape import Tape
from flashtile.kvcache import PagedCache
from tests import caches
from tests.caches import CASES, EVERYTHING, LATENT, QUANTIZED, WIDE, CacheCase
from tests.gpu.graphs import captured
from tests.test_examples import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def _plan(call: caches.CacheCall, **more: object) -> plan.Plan:
    given = CacheArguments(**call.options | more)
    return decoding.build(call.q, call.k_cache, call.v_cache, given).plan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *QUANTIZED, *WIDE], ids=str)
def test_matches_reference(case: CacheCase, dtype: torch.dtype) -> None:
    for splits in (None, 1, 5):
        call = caches.make(case, dtype, "cuda")
        chosen = _plan(call, num_splits=splits)
        assert (chosen.backend, chosen.kernel) == ("portable", "split_keys")
        caches.check(call, num_splits=splits)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper")
@pytest.mark.parametrize("case", [*map(str, LATENT), "real", "real_pages", "real_fp8"])
def test_latent_attention_on_hopper(case: str) -> None:
    """In a process of its own: warpgroups that wait for each other for ever end with it."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.gpu.latent", case], capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.split() == ["ran", case]


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("page", [0, 64, 80])
def test_real_shapes(headdim: int, page: int) -> None:
    """Tiles of the tables, thousands of keys, lengths that end inside of tiles and pages."""
    case = CacheCase(
        f"real_{headdim}_{page}",
        lengths=(1, 4097, 2222, 0),
        seqlen_q=2,
        appended=2,
        heads=8,
        heads_kv=2,
        headdim=headdim,
        headdim_v=headdim,
        capacity=4160,
        page=page,
    )
    call = caches.make(case, torch.bfloat16, "cuda")
    assert _plan(call).config.splits > 1
    caches.check(call)


def test_mixed_head_dimensions_and_float32_tables() -> None:
    call = caches.make(replace(EVERYTHING, headdim=80, headdim_v=160, rotary=64), torch.bfloat16, "cuda")
    for name in ("rotary_cos", "rotary_sin"):
        call.options[name] = call.options[name].float()
    caches.check(call)


@pytest.mark.parametrize("page", [0, 16])
def test_batch_invariant(page: int) -> None:
    caches.check_invariance(torch.bfloat16, page, "cuda")


def _by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    rows = [
        flashtile.attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], causal=True, backend="pytorch")
        for i, n in enumerate(lengths)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_graphs_are_replayed_with_other_lengths(batch_invariant: bool) -> None:
    """Captured once: later lengths, pages and new rows are read on the device, and nothing waits for them."""
    batch, page, width, headdim = 4, 64, 16, 128
    pool = PagedCache(batch * width, page, 2, headdim, dtype=torch.float16, device="cuda")
    table = torch.randperm(batch * width, device="cuda").view(batch, width).int()
    lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(batch, 1, heads, headdim, device="cuda", dtype=torch.float16) for heads in (8, 2, 2))

    def call() -> Tensor:
        out: Tensor = flashtile.attention_kvcache(
            q, pool.k[0], pool.v[0], k=k, v=v, cache_seqlens=lengths, block_table=table, batch_invariant=batch_invariant
        )
        return out

    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with captured() as graph:
        out = call()
    for step in range(3):
        chosen = [3, 100 * step, 1022 - step, 511]
        pool.k.normal_()
        pool.v.normal_()
        for tensor in (q, k, v):
            tensor.normal_()
        table.copy_(torch.randperm(batch * width, device="cuda").view(batch, width))
        lengths.copy_(torch.tensor(chosen))
        graph.replay()
        rows = [pool.k[0], pool.v[0]]
        dense = [store[table.long()].flatten(1, 2) for store in rows]
        for i, n in enumerate(chosen):
            assert torch.equal(dense[0][i, n], k[i, 0])
            assert torch.equal(dense[1][i, n], v[i, 0])
        wanted = _by_hand(q, *dense, [n + 1 for n in chosen])
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)


def test_compiles_whole() -> None:
    call = caches.make(EVERYTHING, torch.bfloat16, "cuda")
    wanted = call.copy().run()
    found = torch.compile(lambda call: call.run(), fullgraph=True)(call.copy())
    assert torch.equal(found.out, wanted.out)
    assert torch.equal(found.lse, wanted.lse)


def test_more_than_two_to_the_31_elements() -> None:
    """Pages and rows whose offsets do not fit into 32 bits."""
    pages, page, heads, headdim = 2100, 1024, 8, 128
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    pool = PagedCache(pages, page, heads, headdim, device="cuda")
    assert pool.k.numel() > 2**31
    q = torch.randn(1, 1, 8, headdim, device="cuda", dtype=torch.bfloat16)
    pool.k[0, -2:].normal_()
    pool.v[0, -2:].normal_()
    k, v = (store[-2:].flatten(0, 1)[None].clone() for store in (pool.k[0], pool.v[0]))
    # In pages, and as the end of the second of two rows.
    table = torch.tensor([[pages - 2, pages - 1]], device="cuda", dtype=torch.int32)
    found = flashtile.attention_kvcache(q, pool.k[0], pool.v[0], cache_seqlens=1500, block_table=table)
    whole = (store.view(2, -1, heads, headdim) for store in (pool.k[0], pool.v[0]))
    row, pad = torch.tensor([1], device="cuda"), torch.tensor([(pages // 2 - 2) * page], device="cuda")
    length = (pages // 2 - 2) * page + 1500
    second = flashtile.attention_kvcache(q, *whole, cache_seqlens=length, cache_batch_idx=row, cache_leftpad=pad)
    wanted = flashtile.attention(q, k[:, :1500], v[:, :1500], backend="pytorch")
    for out in (found, second):
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("cache_seqlens", 81, "cache_seqlens: got 81 beside 3 new rows"),
        ("block_table", 2**20, "block_table: got page 1048576 for sequence"),
        ("cache_batch_idx", 9, "cache_batch_idx: got 9, need 0 to 4"),
        ("k_scale", 0.0, "k_scale: got 0.0, need finite numbers above 0"),
    ],
)
def test_debug_looks_at_what_lies_on_the_device(name: str, wrong: float, message: str) -> None:
    case = replace(EVERYTHING, name="debug", rotary=0, stored=torch.int8, scale_by_page=True)
    call = caches.make(case, torch.float16, "cuda")
    call.options[name].fill_(wrong)
    before = call.copy()
    with pytest.raises(ValueError, match=message):
        call.run(debug=True)
    assert torch.equal(call.k_cache, before.k_cache)
    assert torch.equal(call.v_cache, before.v_cache)


def test_the_example_generates_through_a_graph() -> None:
    assert load("generate").main(["--device", "cuda"]) == 0


def test_calls_are_played_from_a_tape() -> None:
    """The third call of a kind is a tape's; each sees its own tensors, lengths and pages."""
    decoding._known.clear()
    for _ in range(4):
        caches.check(caches.make(EVERYTHING, torch.bfloat16, "cuda"))
    (known,) = decoding._known.values()
    assert any(isinstance(kept, Tape) for kept in known.memory.values())
