"""The benchmarks: cases mean what they say, the gate stops wrong peers, figures are measured, reports stay in place."""

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from flashtile import reference
from flashtile.bench import (
    accuracy,
    block_masks,
    cases,
    decode,
    machine,
    memory,
    peers,
    records,
    report,
    subject,
    suite,
    tables,
    textbook,
    timing,
)
from flashtile.bench.cases import Case
from flashtile.bench.peers import PEERS, Bound, Peer, Refused
from flashtile.bench.suite import Settings
from flashtile.bench.timing import Effort

SMALL = Case(seqlen=96, heads=4, heads_kv=4, headdim=16)
BRIEF = Effort(seconds=0.01, least=2, most=3)
TINY = Settings(seqlens=(48, 64), error_seqlen=32, heads=2, heads_kv=2, headdim=16, effort=BRIEF)
PNG = b"\x89PNG"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Peer]:
    """A copy of the registry that a test may fill."""
    copy = dict(PEERS)
    monkeypatch.setattr(peers, "PEERS", copy)
    monkeypatch.setattr(suite, "PEERS", copy)
    monkeypatch.setattr(tables, "PEERS", copy)
    return copy


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every suite, tiny; memory in this process, since a fresh one takes seconds to start."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "in_fresh_process", subject.measure)
        for name in suite.usual("cpu"):
            suite.run(name, TINY, folder)
    return folder


def rows_of(results: Path, name: str) -> list[dict[str, Any]]:
    return next(record for record in records.read(results) if record["suite"] == name)["rows"]


class TestCases:
    @pytest.mark.parametrize("feature", [name for name, feature in cases.FEATURES.items() if feature.dense])
    @pytest.mark.parametrize("heads_kv", [4, 2])
    def test_both_statements_of_a_feature_agree(self, feature: str, heads_kv: int) -> None:
        case = replace(SMALL, feature=feature, dtype="float64", heads_kv=heads_kv)
        q, k, v, _ = cases.tensors(case)
        dense = textbook.attention(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)), allowed=cases.allowed(case), added=cases.added(case)
        )
        torch.testing.assert_close(dense.transpose(1, 2), reference.attention(q, k, v, **cases.options(case)).out)

    @pytest.mark.parametrize("feature", [name for name, feature in cases.FEATURES.items() if feature.rule])
    @pytest.mark.parametrize("seqlen", [96, 1500])
    def test_pairs_are_those_that_the_mask_allows(self, feature: str, seqlen: int) -> None:
        case = replace(SMALL, feature=feature, seqlen=seqlen)
        mask = cases.allowed(case)
        assert mask is not None
        assert cases.pairs(case) == int(mask.sum())

    def test_documents_are_several_in_order(self) -> None:
        steps = cases.document_ids(Case("document", seqlen=8192)).diff()
        assert set(steps.unique().tolist()) == {0, 1}
        assert int(steps.sum()) >= 8

    def test_packed_lengths_have_a_long_tail(self) -> None:
        lengths = cases.lengths(Case("packed causal", seqlen=32768))
        assert int(lengths.sum()) == 32768
        assert int(lengths.min()) > 0
        assert float(lengths.max()) > 3 * float(lengths.float().mean())

    @pytest.mark.parametrize("name", ["flashtile", "sdpa_padded"])
    def test_packed_peers_compute_the_same(self, name: str) -> None:
        case = Case("packed causal", seqlen=300, heads=4, heads_kv=2, headdim=16)
        q, k, v, _ = cases.tensors(case)
        expected = reference.attention(q, k, v, **cases.options(case)).out
        torch.testing.assert_close(PEERS[name].prepare(case)(q, k, v), expected.float(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("feature", ["plain", "causal", "window 1024", "packed causal"])
    def test_other_flash_attentions_are_asked_for_the_same(self, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a package of the same functions, which computes what it is told."""

        def dense(
            q: Tensor, k: Tensor, v: Tensor, *, window_size: Any = None, softmax_scale: float, **options: Any
        ) -> Any:
            return reference.attention(q, k, v, window=window_size, scale=softmax_scale, **options).out, "its lse"

        def packed(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, **options: Any) -> Tensor:
            offsets = [options.pop(f"cu_seqlens_{of}") for of in "qk"]
            assert options.pop("max_seqlen_q") == options.pop("max_seqlen_k") == int(offsets[0].diff().max())
            return reference.attention_varlen(q, k, v, *offsets, scale=softmax_scale, **options).out

        package = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
        case = Case(feature, seqlen=1300, heads=2, heads_kv=1, headdim=24, headdim_v=16)
        q, k, v, _ = cases.tensors(case)
        expected = reference.attention(q, k, v, **cases.options(case)).out
        torch.testing.assert_close(PEERS["fa4"].prepare(case)(q, k, v), expected)

    @pytest.mark.parametrize("feature", ["alibi", "document"])
    def test_other_flash_attentions_are_not_asked_for_more(self, feature: str) -> None:
        with pytest.raises(Refused, match=f"no {feature}"):
            PEERS["fa4"].prepare(Case(feature))

    def test_flex_attention_is_not_asked_for_what_is_no_function(self) -> None:
        with pytest.raises(Refused, match="sinks has no function"):
            PEERS["flex"].prepare(Case("sinks"))

    @pytest.mark.parametrize("feature", ["window", "window 1024", "causal document softcap"])
    def test_functions_say_what_options_say(self, feature: str) -> None:
        case = Case(feature, seqlen=1300, heads=2, heads_kv=2, headdim=16)
        q, k, v, _ = cases.tensors(case)
        found = PEERS["flashtile_functions"].prepare(case)(q, k, v)
        torch.testing.assert_close(found, PEERS["flashtile"].prepare(case)(q, k, v), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("feature", ["causal", "window", "document", "causal document"])
    def test_a_block_mask_made_in_pieces_is_the_whole(self, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(feature, seqlen=1900, heads=2, heads_kv=2, headdim=16)
        mask_mod, _ = cases.functions(case)
        assert mask_mod is not None
        whole = block_masks.block_mask(mask_mod, case.seqlen, case.device)
        rows: list[int] = []

        def counted(function: Any, batch: None, heads: None, queries: int, keys: int, device: str) -> Any:
            rows.append(queries)
            return create_block_mask(function, batch, heads, queries, keys, device=device)

        monkeypatch.setattr(block_masks, "create_block_mask", counted)
        monkeypatch.setattr(block_masks, "WHOLE", 1024)
        monkeypatch.setattr(block_masks, "ROWS", 512)
        pieces = block_masks.block_mask(mask_mod, case.seqlen, case.device)
        assert rows == [512, 512, 512, 364]
        assert pieces.seq_lengths == whole.seq_lengths == (1900, 1900)
        assert (pieces.BLOCK_SIZE, pieces.mask_mod) == (whole.BLOCK_SIZE, mask_mod)
        for side in ("kv", "q", "full_kv", "full_q"):
            for name in (f"{side}_num_blocks", f"{side}_indices"):
                made, expected = getattr(pieces, name), getattr(whole, name)
                torch.testing.assert_close(made, expected, rtol=0, atol=0)
                assert (made.dtype, made.is_contiguous()) == (expected.dtype, expected.is_contiguous())

    def test_flops_of_plain_attention(self) -> None:
        case = Case(seqlen=100, heads=2, heads_kv=2, headdim=8)
        assert cases.flops(case, backward=False) == 4 * 2 * 100 * 100 * 8
        assert cases.flops(case, backward=True) == 10 * 2 * 100 * 100 * 8
        wide = replace(case, headdim=12, headdim_v=8)
        assert cases.flops(wide, backward=False) == 2 * 2 * 100 * 100 * (12 + 8)
        assert cases.flops(wide, backward=True) == 2 * 2 * 100 * 100 * (3 * 12 + 2 * 8)

    def test_the_formula_in_plain_words(self) -> None:
        q, k, v = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
        out = textbook.attention(q, k, v, causal=True)
        for i in range(5):
            weights = torch.softmax(k[0, 0, : i + 1] @ q[0, 0, i] / 2, dim=0)
            torch.testing.assert_close(out[0, 0, i], weights @ v[0, 0, : i + 1])


class TestGate:
    @pytest.mark.parametrize("name", ["flashtile", "textbook", "sdpa", "sdpa_math"])
    @pytest.mark.parametrize(
        "case",
        [
            SMALL,
            replace(SMALL, feature="causal", heads_kv=2, dtype="bfloat16"),
            replace(SMALL, feature="causal", headdim=24, headdim_v=16),
        ],
    )
    def test_passes_the_peers_that_are_right(self, name: str, case: Case) -> None:
        inputs = cases.tensors(case)
        truth = accuracy.truth(case, inputs)
        assert truth.failures(truth.errors(PEERS[name].bind(case, inputs))) == []

    @staticmethod
    def _slightly_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return textbook.attention(q, k, v) * (1 + 1e-4)

    @staticmethod
    def _last_head_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factor = torch.ones(q.shape[1], 1, 1)
        factor[-1] = 1.001
        return textbook.attention(q, k, v) * factor

    @staticmethod
    def _forgets_the_gradient_of_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return textbook.attention(q, k.detach() + 0 * k, v)

    @staticmethod
    def _one_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = textbook.attention(q, k, v)
        return torch.where(torch.arange(out.numel()).view(out.shape) == 7, math.nan, out)

    @pytest.mark.parametrize("wrong", ["_slightly_off", "_last_head_off", "_forgets_the_gradient_of_k", "_one_nan"])
    def test_a_wrong_peer_has_no_figure(self, wrong: str, registry: dict[str, Peer], tmp_path: Path) -> None:
        attend: Callable[..., Tensor] = getattr(self, wrong)
        peers.peer("wrong", title="a wrong one", layout="bhsd")(lambda case: attend)
        settings = replace(TINY, seqlens=(48,), peers=("wrong", "textbook"))
        record, _ = suite.run("dense", settings, tmp_path)
        rows = [entry for entry in record["rows"] if entry["peer"] == "wrong" and entry["case"]["feature"] == "plain"]
        assert [entry["status"] for entry in rows] == ["wrong", "wrong"]
        assert all("ms" not in entry and "gflops" not in entry for entry in rows)
        assert all("error" in entry["reason"] and not entry["gate"]["passed"] for entry in rows)
        right = [entry for entry in record["rows"] if entry["peer"] == "textbook"]
        assert all(entry["status"] == "ok" and entry["gate"]["passed"] for entry in right)
        assert "wrong" in tables.of(record)[0].rows[0]

    def test_a_peer_may_refuse(self, registry: dict[str, Peer], tmp_path: Path) -> None:
        @peers.peer("choosy", title="choosy")
        def _choosy(case: Case) -> peers.Attend:
            raise Refused("it likes nothing")

        record, _ = suite.run("masks", replace(TINY, peers=("choosy",)), tmp_path)
        assert {entry["reason"] for entry in record["rows"]} == {"it likes nothing"}

    def test_a_peer_may_have_a_forward_pass_alone(self, registry: dict[str, Peer], tmp_path: Path) -> None:
        peers.peer("half", title="half", layout="bhsd", trains=False)(lambda case: textbook.attention)
        settings = replace(TINY, seqlens=(48,), peers=("half", "textbook"))
        record, _ = suite.run("dense", settings, tmp_path)
        rows = [entry for entry in record["rows"] if entry["peer"] == "half" and entry["case"]["feature"] == "plain"]
        found = {entry["pass"]: entry for entry in rows}
        assert found["forward"]["status"] == "ok"
        assert set(found["forward"]["gate"]) == {"passed", "heads_kv_compared", "out"}
        assert found["backward"]["status"] == "refused"
        assert found["backward"]["reason"] == peers.FORWARD_ALONE

    def test_a_peer_may_crash(self, registry: dict[str, Peer], tmp_path: Path) -> None:
        @peers.peer("broken", title="broken")
        def _broken(case: Case) -> peers.Attend:
            raise RuntimeError("no such symbol")

        record, _ = suite.run("dense", replace(TINY, seqlens=(48,), peers=("broken", "textbook")), tmp_path)
        found = {(entry["peer"], entry["status"], entry["reason"]) for entry in record["rows"]}
        assert found == {("broken", "failed", "RuntimeError: no such symbol"), ("textbook", "ok", "")}

    def test_a_peer_of_another_device_is_refused(self, registry: dict[str, Peer]) -> None:
        peers.peer("far", title="far", devices=("cuda",))(lambda case: textbook.attention)
        with pytest.raises(Refused, match="does not run on cpu"):
            registry["far"].bind(SMALL, cases.tensors(SMALL))

    def test_an_unknown_layout_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="layout: got 'sbhd', need one of bshd, bhsd"):
            peers.peer("odd", title="odd", layout="sbhd")

    def test_too_big_is_said_and_not_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(machine, "free_memory", lambda device: 2**14)
        record, _ = suite.run("dense", replace(TINY, seqlens=(64,), peers=("textbook",)), tmp_path)
        assert {entry["status"] for entry in record["rows"]} == {"too big"}
        assert all(entry["reason"].startswith("would need") for entry in record["rows"])

    def test_long_sequences_compare_fewer_heads(self) -> None:
        compared = [accuracy._compared(Case(seqlen=seqlen)) for seqlen in (1024, 4096, 8192)]
        assert compared == [list(range(8)), [0, 7], [7]]


class TestTiming:
    def test_peers_take_turns_after_a_warm_up(self) -> None:
        calls: list[str] = []
        bounds = {name: _recorded(name, calls) for name in "abc"}
        samples = timing.interleave(bounds, "cpu", Effort(seconds=0.0, least=2, most=2))
        assert calls[:3] == list("abc")
        assert [sorted(calls[begin : begin + 3]) for begin in (3, 6)] == [list("abc")] * 2
        assert all(len(found.forward) == len(found.backward) == 2 for found in samples.values())

        timing.interleave(bounds, "cpu", Effort(seconds=0.0, least=1, most=1), known={"a": 60.0})
        assert calls[9:11] == list("bc")
        assert sorted(calls[11:]) == list("abc")

    def test_nobody_follows_the_same_peer_every_round(self) -> None:
        calls: list[str] = []
        bounds = {name: _recorded(name, calls) for name in "abcd"}
        timing.interleave(bounds, "cpu", Effort(seconds=0.0, least=30, most=30))
        before = Counter(itertools.pairwise(calls[4:]))
        assert all(before[first, second] >= 4 for first, second in itertools.permutations("abcd", 2))

    def test_what_a_warm_up_took_is_forgotten(self) -> None:
        samples = timing.Samples([1.0], [2.0], {"forward": [3.0], "backward": [4.0]}, {"forward": 1.0})
        samples.forget()
        assert (samples.forward, samples.backward, samples.host_us("forward")) == ([], [], None)
        assert samples.last == {"forward": 1.0}

    def test_rounds_follow_the_time_of_one(self) -> None:
        effort = Effort(seconds=10, least=3, most=30)
        assert [effort.rounds(one) for one in (100.0, 2.0, 0.001)] == [3, 5, 30]

    def test_summary(self) -> None:
        found = timing.summary([0.005, 0.001, 0.002, 0.003, 0.004, 0.006])
        assert (found["median"], found["rounds"]) == (3.5, 6)
        assert found["p20"] == pytest.approx(2)
        assert found["p80"] == pytest.approx(5)
        assert found["samples"][0] == pytest.approx(5)


def _recorded(name: str, calls: list[str]) -> Bound:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(name)
        return q + k + v

    q, k, v = (torch.ones(2, requires_grad=True) for _ in range(3))
    return Bound(PEERS["textbook"], attend, q, k, v, torch.ones(2))


class TestMemory:
    MEGABYTE = 2**20

    def _call(self) -> Tensor:
        first = torch.ones(8 * self.MEGABYTE, dtype=torch.uint8)
        second = first + 1
        del first
        return second + 1

    def test_allocated_is_exact(self) -> None:
        self._call()
        assert memory.allocated_peak(self._call) == pytest.approx(16 * self.MEGABYTE, abs=1024)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
    def test_resident_agrees(self) -> None:
        self._call()
        found = memory.resident_peak(self._call)
        # Pages freed before may be used again; three tensors are made in all.
        assert found is None or 0 <= found <= 24 * self.MEGABYTE

    def test_the_formula_holds_matrices_and_flashtile_does_not(self) -> None:
        case = Case("causal", seqlen=1024, heads=2, heads_kv=2, headdim=32)
        extra = {name: subject.measure(case, name, "training")["extra_bytes"] for name in ("textbook", "flashtile")}
        assert 2 * case.matrix_bytes <= extra["textbook"] <= PEERS["textbook"].quadratic * case.matrix_bytes
        assert extra["flashtile"] < extra["textbook"] / 5

    def test_a_fresh_process_measures_the_same(self) -> None:
        case = Case("causal", seqlen=512, heads=2, heads_kv=2, headdim=32)
        found = subject.in_fresh_process(case, "textbook", "forward")
        assert found["status"] == "ok"
        assert found["extra_bytes"] == subject.measure(case, "textbook", "forward")["extra_bytes"]

    def test_a_process_that_fails_says_so(self) -> None:
        found = subject.in_fresh_process(SMALL, "nobody", "forward")
        assert found["status"] == "failed"
        assert "nobody" in found["reason"]

    @pytest.mark.parametrize(
        ("size", "text"),
        [(3 * 2**30, "3 GiB"), (1536 * 1024, "1.5 MiB"), (1023.4 * 2**20, "1023 MiB"), (2048, "2 KiB")],
    )
    def test_sizes_in_words(self, size: float, text: str) -> None:
        assert memory.gib(size) == text


class TestMachine:
    @pytest.mark.parametrize(
        ("told", "wanted"),
        [
            ("1980, 2619, 1980, 2619, 700.00\n", [1980.0, 2619.0, 1980.0, 2619.0, 700.0]),
            ("1980, [N/A], 1980, 2619, 700.00\n", None),
            ("No devices were found\n", None),
            ("", None),
        ],
    )
    def test_clocks(self, monkeypatch: pytest.MonkeyPatch, told: str, wanted: list[float] | None) -> None:
        """Of the card that PyTorch means, whatever number others give it."""
        asked: list[list[str]] = []

        def run(command: list[str], **options: Any) -> Any:
            asked.append(command)
            return SimpleNamespace(stdout=told)

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0a1b"))
        monkeypatch.setattr(machine.subprocess, "run", run)
        found = machine.clocks("cuda")
        assert (None if found is None else list(found.values())) == wanted
        assert asked[0][-2:] == ["-i", "GPU-0a1b"]
        assert machine.clocks("cpu") is None

    def test_slug_is_a_folder_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "cpu_name", lambda: "Intel(R) Xeon(R) CPU @ 2.70GHz")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert machine.slug("cpu") == "cpu-intel-xeon-cpu-2-70ghz-2-threads"

    def test_outside_a_checkout_there_is_no_commit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_git", lambda *arguments: None)
        assert machine.commit() == {"commit": None, "dirty": None}


class TestRecords:
    def test_a_record_says_all_that_a_reader_needs(self, results: Path) -> None:
        for record in records.read(results):
            assert record["schema"] == records.SCHEMA
            assert record["machine"]["versions"]["torch"] == str(torch.__version__)
            assert record["machine"]["slug"] == machine.slug("cpu")
            assert set(record["machine"]["source"]) == {"commit", "dirty"}
            assert record["settings"]["heads"] == TINY.heads

    def test_dense_has_every_cell_with_samples(self, results: Path) -> None:
        rows = rows_of(results, "dense")
        assert len(rows) == 2 * 2 * 3 * 2
        for entry in rows:
            assert entry["status"] == "ok"
            assert entry["gate"]["passed"]
            assert len(entry["ms"]["samples"]) == entry["ms"]["rounds"] >= 2
            assert 0 < entry["ms"]["p20"] <= entry["ms"]["median"] <= entry["ms"]["p80"]
            assert entry["gflops"] > 0

    def test_masks_are_put_to_flashtile_and_sdpa(self, results: Path) -> None:
        rows = rows_of(results, "masks")
        assert {entry["peer"] for entry in rows} == {"flashtile", "sdpa"}
        assert {entry["case"]["feature"] for entry in rows} == {"window", "document", "causal document"}
        assert all(entry["case"]["seqlen"] == 64 and entry["status"] == "ok" for entry in rows)

    def test_memory_counts_more_for_the_formula(self, results: Path) -> None:
        rows = rows_of(results, "memory")
        extra = {(entry["peer"], entry["pass"]): entry["extra_bytes"] for entry in rows}
        assert len(extra) == 6
        assert extra["textbook", "training"] >= 2 * records.case_of(rows[0]).matrix_bytes

    def test_errors_of_every_feature_and_dtype(self, results: Path) -> None:
        rows = rows_of(results, "error")
        ours = [entry for entry in rows if entry["peer"] == "flashtile"]
        assert len(ours) == 3 * sum(feature.common for feature in cases.FEATURES.values())
        assert all(entry["passed"] for entry in ours)
        refused = {entry["case"]["feature"] for entry in rows if entry["status"] == "refused"}
        assert refused == {"softcap", "sinks"}

    def test_another_schema_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "device" / "dense.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"schema": 0}))
        with pytest.raises(ValueError, match="got no record of schema 1"):
            records.read(tmp_path)

    def test_ratio_to_the_fastest_other_peer(self) -> None:
        times = {"flashtile": 2.0, "sdpa": 3.0, "textbook": 8.0}
        rows = [records.row(SMALL, name, ms={"median": time}) for name, time in times.items()]
        assert records.best_ratio(rows) == (1.5, "sdpa")
        assert records.best_ratio(rows[1:]) is None
        assert records.best_ratio(rows[:1]) is None
        eight = [
            records.row(SMALL, name, ms={"median": time}) for name, time in (("flashtile_eight", 1.0), ("fa3", 2.0))
        ]
        assert records.subject(rows) == "flashtile"
        assert records.subject([*rows, *eight]) == "flashtile_eight"
        assert records.subject([{"peer": "flashtile_portable"}, {"peer": "sdpa_flash"}]) == "flashtile_portable"
        assert records.best_ratio([*rows, *eight]) == (1.0, "fa3"), "what is ours is no other"
        assert records.best_ratio([*rows, *eight], "flashtile_eight") == (2.0, "fa3")
        assert records.geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1)
        assert records.geometric_mean([]) is None


class TestDecode:
    def _record(self, folder: Path, **changes: Any) -> dict[str, Any]:
        return suite.run("decode", replace(TINY, seqlens=(128,), heads=4, **changes), folder)[0]

    def test_who_is_timed_and_what_is_read(self, tmp_path: Path) -> None:
        record = self._record(tmp_path)
        assert {row["case"]["batch"] for row in record["rows"]} == {1, 4}
        timed = [row for row in record["rows"] if row["status"] == "ok"]
        assert {row["peer"] for row in timed} == {"sdpa", "flashtile", "flashtile_paged", "flashtile_fp8", "read"}
        for row in timed:
            read = 2 * row["case"]["batch"] * 128 * 2 * 16 * (1 if row["peer"] == "flashtile_fp8" else 4)
            assert row["gb_per_s"] == pytest.approx(read / row["ms"]["median"] / 1e6)
            assert row["gate"]["passed"]
        text = tables.of(record)[0].markdown()
        columns = "| flashtile, pages of 64 | flashtile, FP8 cache | plain read | flashtile | best / flashtile |"
        assert columns in text
        assert "FlashAttention-3 is not in this table: it does not run on cpu" in text
        assert report.write(tmp_path, tmp_path / "docs") == [tmp_path / "docs" / "benchmarks.md"]

    def test_latent_attention_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case("latent, batch 2", 2, 64, 3, 1, decode.LATENT, "float32", "cpu")
        monkeypatch.setattr(decode, "PEERS", {name: decode.PEERS[name] for name in ("sdpa", "flashtile_fp8", "read")})
        rows = {row["peer"]: row for row in decode.rows(case, Effort(seconds=0.0, least=1, most=1), None, print)}
        assert rows["sdpa"]["reason"] == "it has no kernel for heads of more than 256 columns"
        for name, size in (("flashtile_fp8", 1), ("read", 4)):
            assert rows[name]["status"] == "ok"
            assert rows[name]["gb_per_s"] == pytest.approx(2 * 64 * 576 * size / rows[name]["ms"]["median"] / 1e6)

    def test_a_wrong_peer_has_no_figure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = decode.PEERS["sdpa"]._replace(prepare=lambda case, made: lambda: made.q * 2)
        crash = decode.PEERS["flashtile_paged"]._replace(prepare=lambda case, made: lambda: made.none)
        monkeypatch.setattr(decode, "PEERS", {"sdpa": wrong, "flashtile_paged": crash})
        rows = self._record(tmp_path, heads_kv=4)["rows"]
        found = {(row["peer"], row["status"]) for row in rows}
        assert found == {("sdpa", "wrong"), ("flashtile_paged", "failed")}
        assert not any("ms" in row for row in rows)


class TestReport:
    def test_sparsity_and_a_gpu_s_columns(self, tmp_path: Path) -> None:
        """Measured on the CPU, told as a GPU's: what is drawn and written, not the figures."""
        settings = replace(TINY, effort=Effort(seconds=0.0, least=1, most=1))
        features = ("plain", "causal", "window", "blocks 1/2")
        rows = [
            entry
            for feature in features
            for entry in suite.timed(settings.case(feature, 200, "float32"), settings, ("flashtile",), print)
        ]
        for entry in rows:
            entry["case"]["device"], entry["host_us"] = "cuda", 12.0
        record, _ = suite.run("dense", replace(settings, seqlens=(64,), peers=("flashtile",)), tmp_path / "other")
        records.write({**record, "suite": "sparsity", "rows": rows}, tmp_path / "results")
        page, plot = report.write(tmp_path / "results", tmp_path)
        assert "TFLOP/s" in page.read_text()
        assert "host time a call forward 12 µs, backward 12 µs" in page.read_text()
        assert plot.stat().st_size > 10_000

    def test_writes_the_page_and_the_plots(self, results: Path, tmp_path: Path) -> None:
        written = report.write(results, tmp_path)
        page = written[0].read_text()
        assert [path.suffix for path in written] == [".md", ".png", ".png", ".png"]
        for image in written[1:]:
            assert image.read_bytes().startswith(PNG)
            assert f"({image.relative_to(tmp_path).as_posix()})" in page
        for title in (suite.SUITES[name].title for name in suite.usual("cpu")):
            assert f"### {title}" in page
        assert "geometric mean" in page

    def test_leaves_what_stands_outside_the_markers(self, results: Path, tmp_path: Path) -> None:
        page = tmp_path / "benchmarks.md"
        page.write_text(f"# Mine\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
        report.write(results, tmp_path)
        once = page.read_text()
        assert once.startswith("# Mine\n\nbefore\n")
        assert once.endswith("\nafter\n")
        assert "\nold\n" not in once
        report.write(results, tmp_path)
        assert page.read_text() == once
        page.write_text("# Without markers\n")
        report.write(results, tmp_path)
        assert page.read_text().startswith(f"# Without markers\n\n{report.BEGIN}")

    def test_markdown_tables_are_rectangular(self, results: Path) -> None:
        for record in records.read(results):
            for table in tables.of(record):
                assert table.rows
                assert {len(row) for row in table.rows} == {len(table.columns)}
                assert table.markdown().count("\n|") == len(table.rows) + 1

    def test_no_records_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="got no record"):
            report.write(tmp_path, tmp_path)


def test_errors_beside_fused_kernels(tmp_path: Path) -> None:
    """Both kinds of inputs; outliers make them larger; a kernel without gradients has none in the table."""
    settings = replace(TINY, error_seqlen=48, peers=("flashtile", "sdpa", "fa3"))
    record, _ = suite.run("grid_error", settings, tmp_path)
    assert {row["status"] for row in record["rows"] if row["peer"] == "fa3"} == {"refused"}
    shown = [row for row in record["rows"] if row["peer"] == "flashtile"]
    assert [row["case"]["inputs"] for row in shown] == ["normal", "outliers"] * 6
    assert all(row["passed"] for row in shown)
    usual, large = (cases.tensors(records.case_of(row)) for row in shown[:2])
    assert usual.q.abs().max() < 6 < large.q.abs().max()
    forward_alone = {**shown[0], "peer": "fa3", "errors": {"out": {"max": 2.0, "rms": 1.0}}}
    own = {**shown[0], "errors": {name: {"max": 1.0, "rms": 0.5} for name in ("out", "dq", "dk", "dv")}}
    (table,) = tables.of({**record, "rows": [own, forward_alone]})
    assert [line[2] for line in table.rows] == ["2.0e+00 (1e+00)", "–"]
    assert "outputs: root mean square at most 0.50 times that of the best other kernel" in table.notes


def test_eight_bits(tmp_path: Path) -> None:
    """Errors of the paper's table in its order; attention with 8-bit inputs passes a gate that rounds as it must."""
    record, _ = suite.run("fp8_error", replace(TINY, error_seqlen=256), tmp_path)
    for headdim in (64, 128):
        rows = [row for row in record["rows"] if row["case"]["headdim"] == headdim]
        rms = {row["peer"]: row["errors"]["out"]["rms"] for row in rows}
        assert rms["float16, flashtile"] < rms["float16, standard"] < rms["FP8, flashtile, blocks, incoherent"]
        assert rms["FP8, flashtile, blocks, incoherent"] < rms["FP8, standard, one scale a tensor"]
    case = replace(SMALL, feature="causal", dtype="bfloat16", headdim=32)
    names = ("flashtile_eight", "flashtile_eight_blocks", "flashtile_eight_whole")
    timed = [row for row in suite.timed(case, TINY, names, lambda text: None) if row["pass"] == "forward"]
    assert {row["peer"]: row["status"] for row in timed} == dict.fromkeys(names, "ok")
    assert all(row["gate"]["passed"] for row in timed)
