"""`attention_kvcache` on the CPU: against the reference, in place, compiled, and what becomes of odd calls."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import decoding, plan, recall
from flashtile.decoding import CacheArguments
from tests import caches
from tests.caches import CASES, EVERYTHING, INT8, LATENT, QUANTIZED, WIDE, CacheCase
from tests.oracle import assert_close

DTYPES = (torch.float32, torch.bfloat16)
PLAIN = ("one_query", "not_causal", "rotary_not_causal")
"""Cases whose queries see all keys of their sequences, so that PyTorch's own operator takes them."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *QUANTIZED, *WIDE, *LATENT], ids=str)
def test_matches_reference(case: CacheCase, dtype: torch.dtype) -> None:
    call = caches.make(case, dtype)
    assert _plan(call).backend == "pytorch"
    assert _plan(call).kernel == ("aten_flash" if case.name in PLAIN else "tiled")
    caches.check(call)


def _plan(call: caches.CacheCall) -> plan.Plan:
    return decoding.build(call.q, call.k_cache, call.v_cache, CacheArguments(**call.options)).plan()


def test_a_page_of_padding_alone_needs_no_scale() -> None:
    """Nor is it asked for where debug looks."""
    case = CacheCase("padding", (20,), 3, 0, stored=INT8, page=16, leftpad=(20,), scale_by_page=True)
    call = caches.make(case, torch.float32)
    assert bool(call.options["k_scale"].isnan().all())
    caches.check(call)
    caches.check(caches.make(case, torch.float32), debug=True)


@pytest.mark.parametrize("stored", [None, INT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, stored: torch.dtype | None) -> None:
    call = caches.make(replace(EVERYTHING, stored=stored), dtype)
    if dtype is torch.float64:
        found, (truth, _) = call.run(), caches.expected(call, torch.float64)
        # Quantised rows too are multiplied out in float64.
        assert_close(found.out, truth.out, roundings=32)
        assert_close(found.lse, truth.lse, roundings=32)
    else:
        caches.check(call)


def test_tables_may_be_float32() -> None:
    call = caches.make(EVERYTHING, torch.bfloat16)
    for name in ("rotary_cos", "rotary_sin"):
        call.options[name] = call.options[name].float()
    caches.check(call)


def test_strided_caches_are_written_through() -> None:
    """Keys and values of one tensor, heads before rows: views, written in place."""
    case = CacheCase("strided")
    call = caches.make(case, torch.float32)
    both = torch.stack((call.k_cache, call.v_cache)).transpose(2, 3).contiguous().transpose(2, 3)
    call.k_cache, call.v_cache = both
    caches.check(call)


def test_one_length_for_all() -> None:
    call = caches.make(CacheCase("equal", lengths=(9, 9)), torch.float32)
    wanted = call.copy().run()
    call.options["cache_seqlens"] = 9
    assert torch.equal(call.run().out, wanted.out)


def test_no_sequences_and_no_queries() -> None:
    cache = torch.randn(2, 16, 1, 8)
    for batch, rows in ((0, 2), (2, 0)):
        q = torch.randn(batch, rows, 2, 8)
        found = flashtile.attention_kvcache(q, cache, cache, cache_seqlens=4, return_lse=True)
        assert found.out.shape == q.shape
        assert found.lse.shape == (batch, 2, rows)


def test_decoding_step_by_step_is_the_causal_whole() -> None:
    """Row by row through a cache, as a model generates, against one causal call."""
    q, k, v = (torch.randn(2, 11, heads, 16) for heads in (4, 2, 2))
    k_cache, v_cache = torch.full((2, 16, 2, 16), torch.nan), torch.full((2, 16, 2, 16), torch.nan)
    rows = []
    for i in range(11):
        now = slice(i, i + 1)
        rows.append(
            flashtile.attention_kvcache(
                q[:, now], k_cache, v_cache, k=k[:, now], v=v[:, now], cache_seqlens=torch.tensor([i, i])
            )
        )
    torch.testing.assert_close(torch.cat(rows, dim=1), flashtile.attention(q, k, v, causal=True))


def test_shared_prefix_by_combine() -> None:
    """A cascade: the prefix once for all queries, each sequence's own keys by itself."""
    q, prefix_k, prefix_v = torch.randn(3, 1, 4, 16), torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16)
    own_k, own_v = torch.randn(3, 9, 2, 16), torch.randn(3, 9, 2, 16)
    together = q.transpose(0, 1)  # one batch entry with three queries
    prefix = flashtile.attention_kvcache(together, prefix_k, prefix_v, cache_seqlens=20, causal=False, return_lse=True)
    own = flashtile.attention_kvcache(q, own_k, own_v, cache_seqlens=9, return_lse=True)
    parts = [prefix.out.transpose(0, 1), own.out], [prefix.lse.permute(2, 1, 0), own.lse]
    found = flashtile.combine(*parts)
    stacked = flashtile.combine(*(torch.stack(part) for part in parts))
    k, v = (torch.cat((one.expand(3, -1, -1, -1), two), 1) for one, two in ((prefix_k, own_k), (prefix_v, own_v)))
    wanted = flashtile.attention(q, k, v, return_lse=True)
    for state in (found, stacked):
        torch.testing.assert_close(state.out, wanted.out)
        torch.testing.assert_close(state.lse, wanted.lse)


@pytest.mark.parametrize("appends", [True, False])
def test_compiles_whole(appends: bool) -> None:
    case = replace(EVERYTHING, appended=3 if appends else None, rotary=12 if appends else 0)
    call = caches.make(case, torch.float32)
    wanted = call.copy().run()
    compiled = torch.compile(lambda call: call.run(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        again = call.copy()
        found = compiled(again)
        assert torch.equal(found.out, wanted.out)
        assert torch.equal(found.lse, wanted.lse)
        caches._check_caches(again, call.copy(), caches.expected(call, torch.float64)[1])


def test_operator_is_sound() -> None:
    call = caches.make(EVERYTHING, torch.float32)
    call.k_cache.nan_to_num_()
    call.v_cache.nan_to_num_()
    made = decoding.build(call.q, call.k_cache, call.v_cache, CacheArguments(**call.options))
    with torch.no_grad():
        torch.library.opcheck(decoding._operator, decoding._pack(made), test_utils=("test_schema", "test_faketensor"))


class TestRecall:
    """On a GPU calls that were made before are known; here the CPU's are kept as those are."""

    @pytest.fixture(autouse=True)
    def _remembering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recall, "worth_it", lambda q: True)
        monkeypatch.setattr(decoding, "_known", {})

    def test_a_second_call_sees_its_own_tensors(self) -> None:
        for _ in range(3):
            caches.check(caches.make(EVERYTHING, torch.float32))
        assert len(decoding._known) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"causal": False},
            {"window": (3, 0)},
            {"softcap": None},
            {"scale": 2.0},
            {"num_splits": 2},
            {"batch_invariant": True},
            {"rotary_interleaved": False},
            {"backend": "pytorch"},
            {"cache_batch_idx": None},
            {"sinks": None},
        ],
        ids=str,
    )
    def test_what_differs_is_another_call(self, change: dict[str, Any]) -> None:
        call = caches.make(EVERYTHING, torch.float32)
        call.copy().run()
        call.options |= change
        call.options["block_table"].clamp_(max=0)  # other sequences than before may be looked at
        call.k_cache.nan_to_num_()
        call.v_cache.nan_to_num_()
        again = call.copy().run()
        assert len(decoding._known) == 2
        decoding._known.clear()
        assert torch.equal(call.run().out, again.out)

    @pytest.mark.parametrize("change", [{"debug": True}, {"cache_seqlens": 9}, {"window": [3, 0]}], ids=str)
    def test_what_is_not_kept(self, change: dict[str, Any]) -> None:
        call = caches.make(CacheCase("equal", lengths=(9, 9)), torch.float32)
        call.options |= change
        call.run()
        assert decoding._known == {}

    def test_errors_come_again(self) -> None:
        call = caches.make(CacheCase("plain"), torch.float32)
        call.copy().run()
        call.options["cache_seqlens"] += 50
        with pytest.raises(ValueError, match="cache_seqlens: got 91"):
            call.run()
        call.q.requires_grad_()
        with pytest.raises(ValueError, match="q: got a tensor that requires a gradient"):
            call.run()


def test_autocast_casts_queries_and_new_rows() -> None:
    call = caches.make(CacheCase("plain"), torch.bfloat16)
    wanted = call.copy().run().out
    call.q = call.q.float()
    call.options |= {name: call.options[name].float() for name in ("k", "v")}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call.run().out, wanted)


def test_plans_say_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    call = caches.make(EVERYTHING, torch.float32)
    before = call.copy()
    text = str(flashtile.explain_kvcache(call.q, call.k_cache, call.v_cache, **call.options))
    assert capsys.readouterr().out == text + "\n"
    torch.testing.assert_close(call.k_cache, before.k_cache, rtol=0, atol=0, equal_nan=True)
    assert "attention over a KV cache in pages of 16: batch 3, seqlen 3x64" in text
    assert "runs on  pytorch/tiled" in text
    call.options["backend"] = "hopper"
    with pytest.raises(NotImplementedError, match="no backend takes attention over a KV cache"):
        call.run()


@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, {"batch_invariant": True}], ids=str)
def test_parts_do_not_change_what_comes_out(options: dict[str, Any]) -> None:
    caches.check(caches.make(EVERYTHING, torch.float32), **options)


@pytest.mark.parametrize("page", [0, 16])
def test_batch_invariant(page: int) -> None:
    caches.check_invariance(torch.float32, page)
