"""The Hopper kernels against the reference, emulated: under every schedule of their asynchronous operations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import masks
from flashtile.backends.hopper import calls
from flashtile.kernels import bias, bits, visits
from flashtile.tuning import hopper as tables
from flashtile.tuning.hopper import BackwardConfig, HopperConfig, QueryConfig
from tests import conformance, invariance, oracle
from tests.conformance import HALF, HOPPER_REFUSES
from tests.emulated.hopper import emulated
from tests.fuzz.problems import Problem
from tests.lengths import of_long_sequences
from tests.oracle import assert_equal_bits
from tests.problems import CASES, Case, Feature, Shape, compose, dense, packed
from tools.ptx_emulation import SWEEP

LONG = {"window_long"}
"""Emulated, these take minutes; they run on a GPU."""


ALIKE = {"alibi_batch", "group_of_seven"}
"""What these ask of the kernels, others do too; they run on a GPU."""


def _case(name: str, shape: Shape, *features: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(name, shape, features, (dtype,))


# What the golden problems, whose heads are narrow, do not reach.
WIDE = (
    _case("wide_plain", dense(1, 256, 256, 2, 2, 128)),
    _case("wide_float16", dense(2, 130, 200, 1, 1, 128), dtype=torch.float16),
    _case("wide_causal_gqa", dense(2, 200, 333, 4, 2, 128), "causal"),
    _case("wide_deterministic", dense(1, 150, 200, 2, 2, 128), "causal", "deterministic"),
    _case("wide_document", dense(1, 200, 200, 1, 1, 128), "document"),
    _case("wide_score_mod", dense(1, 100, 150, 1, 1, 128), "causal", "score_mod"),
    _case("tall_window", dense(1, 200, 450, 2, 2, 64), "window"),
    _case("widest_gqa", dense(1, 100, 150, 2, 1, 256), "causal", "softcap"),
    _case("widest_document", dense(1, 130, 130, 1, 1, 192), "document"),
    _case("widest_varlen", packed((50, 33), (70, 20), 2, 1, 256), "causal"),
    _case("wide_dropout", dense(1, 130, 140, 2, 1, 128), "causal", "dropout"),
    _case("widest_dropout", dense(1, 80, 100, 2, 1, 192, 128), "softcap", "dropout"),
    _case("strips_plain", dense(1, 140, 270, 2, 2, 192, 128)),
    _case("strips_causal_gqa", dense(1, 200, 333, 2, 1, 192, 128), "causal"),
    _case("strips_varlen", replace(packed((150, 33), (170, 20), 2, 1, 136), headdim_v=72), "causal"),
    _case("strips_document", dense(1, 130, 150, 1, 1, 192, 128), "document", "bias"),
    _case("widest_score_mod", dense(1, 70, 90, 2, 1, 160), "score_mod", "alibi"),
    _case("wide_out_float32", dense(2, 150, 200, 2, 1, 128), "causal", "out_float32"),
    _case("widest_out_float32", packed((50, 33), (70, 20), 2, 1, 192), "causal", "out_float32"),
    _case("deterministic_document", dense(1, 150, 150, 1, 1, 64), "document", "deterministic"),
)


# What every Triton is to compile: each loop, and each way of a tile into registers and out of them.
EACH_LOOP = {
    *("causal", "window", "bias", "score_mod", "mask_mod", "document", "varlen_mods"),
    *("wide_plain", "wide_causal_gqa", "wide_deterministic", "wide_dropout", "wide_out_float32"),
    *("widest_varlen", "widest_score_mod", "strips_causal_gqa", "strips_document"),
}


def _cases() -> list[Any]:
    """Those that the backend takes, in half precision."""
    chosen = [case for case in (*CASES, *WIDE) if case.name not in HOPPER_REFUSES | LONG | ALIKE]
    pairs = [(case, dtype) for case in chosen for dtype in case.dtypes if dtype in HALF]
    return [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=_marks(case.name, case.dtypes.index(dtype)))
        for case, dtype in pairs
    ]


def _marks(name: str, twin: int = 0) -> list[Any]:
    """One Triton is enough for problems whose loops others have, and for all dtypes of one but the first in half."""
    return [] if name in EACH_LOOP and twin <= 1 else [pytest.mark.one_triton]


@pytest.mark.one_triton
def test_a_bias_that_entries_share_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three entries, two of them summed up by some programs and one by others; more than are in flight at once."""
    monkeypatch.setattr(bias, "LEAST", 1)
    monkeypatch.setattr(bias, "PROGRAMS", 2)
    problem = Problem(dense(3, 20, 30, 1, 1, 16), torch.bfloat16, bias=(False, True, True, True))
    with emulated(SWEEP[0]) as device:
        oracle.check(problem.call("cpu"), "hopper")
    assert device.complaints == []


@pytest.mark.parametrize(("case", "dtype"), _cases())
def test_matches_reference(case: Case, dtype: torch.dtype) -> None:
    with emulated(SWEEP[0]) as device:
        conformance.check_case(case, dtype, "hopper", "cpu")
    assert device.complaints == []


@pytest.mark.parametrize("name", sorted(HOPPER_REFUSES))
def test_refuses_what_it_cannot_do(name: str) -> None:
    """Before anything is computed wrongly; a pass that it takes may run before one that it does not."""
    case = next(case for case in CASES if case.name == name)
    with emulated(SWEEP[0]), pytest.raises(NotImplementedError, match="hopper"):
        conformance.check_case(case, next(dtype for dtype in case.dtypes if dtype in HALF), "hopper", "cpu")


ADDS_NOTHING = ("deterministic", "widest_gqa", "strips_varlen")
EVERY_SCHEDULE = ("causal", "score_mod", "varlen_causal", *ADDS_NOTHING)
SOME_SCHEDULES = ("window_left", "document", "softcap", "sinks", "gqa_plain")


@pytest.mark.parametrize(
    "name",
    [*EVERY_SCHEDULE[:2], *(pytest.param(name, marks=pytest.mark.one_triton) for name in
                            (*EVERY_SCHEDULE[2:], *SOME_SCHEDULES))],
)  # fmt: skip
def test_every_schedule_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for dQ where programs add to it, in any order, as for long sequences. Those whose loops others have get one
    random schedule."""
    of_long_sequences(monkeypatch)
    case = next(case for case in (*CASES, *WIDE) if case.name == name)
    same = {"out", "lse", "dk", "dv"} | ({"dq"} if name in ADDS_NOTHING else set())
    call = case.call(torch.bfloat16, "cpu")
    first: dict[str, Tensor] = {}
    for schedule in SWEEP if name in EVERY_SCHEDULE else SWEEP[:-3]:
        with emulated(schedule) as device:
            found = oracle.ours(call, "hopper")
        assert device.complaints == []
        oracle.compare(dict(found), call)
        kept = {name: tensor for name, tensor in found.items() if name in same}
        first = first or kept
        assert_equal_bits([*kept.values()], [*first.values()])


@pytest.mark.one_triton
@pytest.mark.parametrize("name", ["document", "padding", "wide_document"])
def test_masks_too_large_for_bits_are_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "LARGEST", 0)
    case = next(case for case in (*CASES, *WIDE) if case.name == name)
    with emulated(SWEEP[0]) as device:
        conformance.check_case(case, torch.bfloat16, "hopper", "cpu")
    assert device.complaints == []


@pytest.mark.one_triton
def test_bits_of_the_places_that_need_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for those of all places: documents leave most tiles out, or uncut."""
    monkeypatch.setattr(bits, "LARGEST", 4 * 3 * 128 * 16)
    made: list[Any] = []
    make = bits.of

    def noted(*given: Any, **more: Any) -> Any:
        made.append(make(*given, **more))
        return made[-1]

    monkeypatch.setattr(bits, "of", noted)
    case = _case("few_places", dense(1, 450, 450, 1, 1, 64), "document")
    with emulated(SWEEP[0]) as device:
        conformance.check_case(case, torch.bfloat16, "hopper", "cpu")
    assert device.complaints == []
    assert len(made) == 2
    for lists in made:
        assert lists.places < lists.length
        assert lists.bits.nbytes <= bits.LARGEST


@pytest.mark.one_triton
def test_bits_go_with_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept while the mask's tensors live, and in all no more than some bytes."""
    monkeypatch.setattr(visits, "_known", {})
    monkeypatch.setattr(visits, "_KEPT_BYTES", 4 * 2 * 3 * 128 * 16)
    q = torch.randn(1, 200, 1, 64, dtype=torch.bfloat16)
    with emulated(SWEEP[0]), torch.no_grad():
        for length in (50, 60, 70, 80, 90):
            flashtile.attention(q, q, q, mask=lambda b, h, i, j, n=length: (i - j) % n < 40, backend="hopper")
        assert len(visits._known) == 4
        ids = torch.arange(200) // 60
        flashtile.attention(q, q, q, mask=masks.document(ids), backend="hopper")
        (listed,) = [known for key, known in visits._known.items() if "document" in key[0][0]]
        assert listed[1].bits is not None
        assert listed[1].bits.nbytes == 2 * 3 * 128 * 16
        del ids, listed
    assert not any("document" in key[0][0] for key in visits._known)


@pytest.mark.one_triton
def test_a_large_softcap_hides_no_score() -> None:
    call = compose("large", dense(1, 70, 90, 1, 1, 64), (Feature(lambda *_: {"softcap": 1e4}),), torch.bfloat16)
    with emulated(SWEEP[0]) as device, torch.no_grad():
        leaves = [call.leaves[name].detach() for name in "qkv"]
        state = flashtile.attention(*leaves, softcap=1e4, return_lse=True, backend="hopper")
    assert device.complaints == []
    oracle.compare({"out": state.out, "lse": state.lse}, call)


@pytest.mark.one_triton
def test_a_negative_scale() -> None:
    """It turns the largest dot product into the smallest score."""
    shape = dense(1, 33, 50, 2, 1, 16)
    with emulated(SWEEP[0]) as device:
        oracle.check(Problem(shape, torch.bfloat16, options=(("scale", -0.5),)).call("cpu"), "hopper")
    assert device.complaints == []


FORWARDS = (
    HopperConfig(consumers=2, tile_kv=64, stages=1),
    HopperConfig(consumers=2, tile_kv=64, stages=3, section=1),
    HopperConfig(consumers=2, tile_kv=64, stages=2, halves=True),
    HopperConfig(consumers=3, tile_kv=128, stages=2),
    HopperConfig(consumers=2, tile_kv=64, stages=2, query_stages=2),
    HopperConfig(consumers=2, tile_kv=64, stages=2, rows=True),
    HopperConfig(consumers=3, tile_kv=64, stages=3, turns=True, rows=True, early=True),
    HopperConfig(consumers=3, tile_kv=128, stages=2, turns=True, rows=True, early=True, apart=True),
    HopperConfig(consumers=2, tile_kv=64, stages=1, query_stages=2, early=True),
    HopperConfig(consumers=2, tile_kv=128, stages=3, query_stages=2, rows=True, early=True, apart=True),
)
BACKWARDS = (
    BackwardConfig(tile_q=128, stages=2),
    BackwardConfig(tile_q=64, stages=3),
    BackwardConfig(tile_q=64, stages=2, ahead=True, apart=True),
    BackwardConfig(tile_q=64, stages=2, queries=QueryConfig(tile_kv=64, stages=3, stages_v=2, query_stages=2)),
)


@pytest.mark.one_triton
@pytest.mark.parametrize("config", FORWARDS, ids=str)
def test_forward_tiles(config: HopperConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiles give right numbers, whether a table names them or not."""
    monkeypatch.setattr(tables, "FORWARD", dict.fromkeys(tables.FORWARD, (tables.Row(256, None, config),)))
    width, keys = (256, 70) if config.halves else (64, 333)
    case = _case("causal", dense(1, 200, keys, 2, 1, width), "causal")
    # One program takes all four tiles, so that it comes back to the memory of queries, or of halves of outputs.
    processors = 1 if config.query_stages > 1 or config.halves else 2
    for schedule in (SWEEP[0], SWEEP[-1]):
        with emulated(schedule, processors) as device, torch.no_grad():
            call = case.call(torch.bfloat16, "cpu")
            leaves = [call.leaves[name].detach() for name in "qkv"]
            state = flashtile.attention(*leaves, causal=True, return_lse=True, backend="hopper")
        assert device.complaints == []
        oracle.compare({"out": state.out, "lse": state.lse}, call)


@pytest.mark.one_triton
@pytest.mark.parametrize("steps", [(21, 14, 7, 0, 0), (36, 27, 18, 9, 0), (30, 29, 15, 14, 7), (0, 20, 40, 60, 60)])
@pytest.mark.parametrize("causal", [False, True])
def test_maxima_that_grow(causal: bool, steps: tuple[int, ...]) -> None:
    """From tile to tile by less than is minded, by more, or by both; rows of one warp do not all grow alike."""
    feature = Feature(lambda *_: {"causal": causal})
    call = compose("growing", dense(1, 150, 300, 2, 1, 128), (feature,), torch.bfloat16)
    with torch.no_grad():
        # In base 2, of the default scale: a query of 1 in the first column sees what its key has there.
        rise = torch.tensor(steps).repeat_interleave(64)[:300] * 128**0.5 / 1.4427
        call.leaves["k"][..., 0] = rise.to(torch.bfloat16)[None, :, None]
        call.leaves["q"][..., 0] = (torch.arange(150) % 3 / 2).to(torch.bfloat16)[None, :, None]
        with emulated(SWEEP[0]) as device:
            leaves = [call.leaves[name].detach() for name in "qkv"]
            state = flashtile.attention(*leaves, causal=causal, return_lse=True, backend="hopper")
    assert device.complaints == []
    oracle.compare({"out": state.out, "lse": state.lse}, call)


@pytest.mark.one_triton
@pytest.mark.parametrize("config", BACKWARDS, ids=str)
def test_backward_tiles(config: BackwardConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BACKWARD", dict.fromkeys(tables.BACKWARD, (tables.Row(128, None, config),)))
    case = _case("causal", dense(1, 150, 200, 4, 4, 64), "causal")
    # Tiles of two heads are handed out together, then those of the others.
    monkeypatch.setattr(calls, "CACHED", 2 * 150 * 64 * (2 + 2 + 4))
    # One program comes back to the memory of queries.
    processors = 1 if config.queries else 2
    for schedule in (SWEEP[0], SWEEP[-1]):
        with emulated(schedule, processors) as device:
            conformance.check_case(case, torch.bfloat16, "hopper", "cpu")
        assert device.complaints == []


def _results(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    state = flashtile.attention(*leaves, return_lse=True, backend="hopper", **options)
    return [state.out, state.lse, *torch.autograd.grad(state.out.float().square().sum(), leaves)]


@pytest.mark.one_triton
@pytest.mark.parametrize(("poison", "heads", "headdim"), [(torch.nan, 2, 64), (torch.inf, 2, 64), (torch.nan, 1, 256)])
def test_what_a_mask_hides_may_be_anything(poison: float, heads: int, headdim: int) -> None:
    """Padding of keys and values, whose first rows share a tile with what is seen."""
    used = torch.tensor([90])
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 150, heads, headdim, generator=generator).bfloat16()
    k[:, 90:], v[:, 90:] = 0.0, 0.0
    with emulated(SWEEP[0]):
        clean = _results(q, k, v, mask=lambda b, h, q_idx, kv_idx: kv_idx < used[b])
        k[:, 90:], v[:, 90:] = poison, poison
        found = _results(q, k, v, mask=lambda b, h, q_idx, kv_idx: kv_idx < used[b])
    for name, ours, expected in zip(("out", "lse", "dq", "dk", "dv"), found, clean, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6, msg=name)


@pytest.mark.one_triton
def test_nan_that_is_seen_is_not_hidden() -> None:
    q, k, v = torch.randn(3, 1, 100, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    v[:, 50, 0] = torch.nan
    with emulated(SWEEP[0]):
        # A function, and no window in other words: those do not look.
        out = flashtile.attention(q, k, v, mask=lambda b, h, i, j: (j <= i) | (j < 0), backend="hopper")
    assert out[:, 50:, 0].isnan().all()
    assert out[:, :, 1].isfinite().all()


@pytest.mark.one_triton
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_beside_packed_sequences_may_be_anything(causal: bool) -> None:
    """Rows that belong to no sequence, and those of a sequence that are not in use."""
    offsets = torch.tensor([0, 100, 170], dtype=torch.int32)
    used = torch.tensor([90, 70], dtype=torch.int32)
    rows = torch.arange(200)
    outside = ((rows >= 90) & (rows < 100)) | (rows >= 170)
    tensors = torch.randn(4, 200, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results() -> list[Tensor]:
        *leaves, grad = [tensor.clone().requires_grad_() for tensor in tensors]
        state = flashtile.attention_varlen(
            *leaves, offsets, offsets, seqused_q=used, seqused_k=used, causal=causal, return_lse=True, backend="hopper"
        )
        gradients = torch.autograd.grad(state.out, leaves, grad.detach())
        return [each[~outside] for each in (state.out, state.lse.transpose(0, 1), *gradients)]

    with emulated(SWEEP[0]) as device:
        tensors[:, outside] = 0.0
        clean = results()
        tensors[:, outside] = torch.nan
        found = results()
    assert device.complaints == []
    for name, ours, expected in zip(("out", "lse", "dq", "dk", "dv"), found, clean, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6, msg=name)


@pytest.mark.parametrize("name", invariance.OPTIONS)
@pytest.mark.one_triton
def test_a_sequence_gets_the_same_bits_everywhere(name: str) -> None:
    """The forward pass; deterministic gradients come from another backend."""
    with emulated(SWEEP[0]):
        invariance.check(name, torch.bfloat16, "hopper", 64, gradients=False)


@pytest.mark.one_triton
@pytest.mark.parametrize("by", ["keys", "queries", "heads"])
def test_gradients_of_captured_vectors(by: str) -> None:
    """What is read by one index alone gets one sum over all others: once, however often threads hold it."""
    q, k, v = torch.randn(3, 1, 70, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    table = torch.randn(70, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * table[{"keys": kv_idx, "queries": q_idx, "heads": h}[by]]

    def gradient(backend: str, tensors: tuple[Tensor, ...]) -> Tensor:
        out = flashtile.attention(*tensors, score_mod=score_mod, backend=backend)
        return torch.autograd.grad(out.float().square().sum(), table)[0]

    with emulated(SWEEP[0]) as device:
        found = gradient("hopper", (q, k, v))
    assert device.complaints == []
    expected = gradient("pytorch", (q.double(), k.double(), v.double()))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
