"""8-bit kernels, emulated: rounding gives PyTorch's bits, and the Hopper forward pass obeys the tolerance rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import scaled
from flashtile.backends.portable import quantize
from flashtile.kernels import aot
from flashtile.tuning import hopper as tables
from flashtile.tuning.hopper import HopperConfig
from tests import eight
from tests.conformance import watched
from tests.eight import Eight
from tests.emulated.hopper import emulated, plain
from tests.oracle import assert_equal_bits
from tests.problems import packed
from tools.ptx_emulation import SWEEP, emulate_kernel

BY_NAME = {case.name: case for case in eight.CASES}


def _run(case: Eight, schedule: dict[str, Any]) -> flashtile.State:
    quantized = case.quantized()
    with emulated(schedule) as device, watched() as ran:
        state: flashtile.State = flashtile.attention(*quantized, return_lse=True, backend="hopper", **case.options)
    assert device.complaints == []
    assert [(plan.backend, plan.kernel, plan.problem.scaled != "") for plan in ran] == [
        ("hopper", "warp_specialized", True)
    ]
    assert state.out.dtype is case.options.get("out_dtype", torch.bfloat16)
    eight.check(case, quantized, state)
    return state


@pytest.mark.parametrize("name", BY_NAME)
def test_hopper_matches_reference(name: str) -> None:
    _run(BY_NAME[name], SWEEP[0])


@pytest.mark.parametrize("name", ["causal_gqa", "tensor_window"])
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    first = None
    for schedule in SWEEP:
        state = _run(BY_NAME[name], schedule)
        first = first or state
        assert_equal_bits([state.out, state.lse], [first.out, first.lse])


def _run_packed(case: Eight, schedule: dict[str, Any]) -> flashtile.State:
    quantized = case.quantized()
    with emulated(schedule) as device, watched() as ran:
        state = eight.attend_packed(case, quantized, backend="hopper")
    assert device.complaints == []
    assert [(plan.backend, plan.problem.varlen, plan.problem.scaled != "") for plan in ran] == [("hopper", True, True)]
    assert state.out.dtype is case.options.get("out_dtype", torch.bfloat16)
    eight.check_packed(case, quantized, state)
    return state


@pytest.mark.parametrize("case", eight.PACKED, ids=lambda case: case.name)
def test_packed_sequences(case: Eight) -> None:
    _run_packed(case, SWEEP[0])


@pytest.mark.parametrize("name", ["packed_heads_causal", "packed_causal_gqa"])
def test_packed_sequences_have_the_same_bits_under_every_schedule(name: str) -> None:
    case = next(case for case in eight.PACKED if case.name == name)
    first = None
    for schedule in SWEEP:
        state = _run_packed(case, schedule)
        first = first or state
        assert_equal_bits([state.out, state.lse], [first.out, first.lse])


@pytest.mark.one_triton
@pytest.mark.parametrize("granularity", ["head", "block"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 10.0}], ids=str)
def test_nan_of_other_sequences_does_not_spread(granularity: str, options: dict[str, Any]) -> None:
    """A sequence between two others, and rows behind one that are not in use."""
    case = Eight("neighbours", packed((70, 40, 90), (150, 70, 100), 2, 1, 64), granularity)
    bounds_q, bounds_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 70, 110, 200], [0, 150, 220, 320]))
    used = torch.tensor([130, 70, 90], dtype=torch.int32)
    q, k, v = case.tensors()
    others = [slice(130, 220), slice(310, 320)]
    found = []
    for poison in (0.0, torch.nan):
        for rows in others:
            k[rows], v[rows] = poison, poison
        with emulated(SWEEP[0]) as device:
            state = flashtile.attention_varlen(
                *flashtile.fp8.quantize(q, k, v, granularity), bounds_q, bounds_k, seqused_k=used, return_lse=True,
                backend="hopper", **options,
            )  # fmt: skip
        assert device.complaints == []
        found.append(state)
    alone = [slice(0, 70), slice(110, 200)]
    assert bool(found[1].out[70:110].isnan().any())
    for rows in alone:
        # Tiles that are done again multiply 16-bit weights.
        one, other = (state.out[rows].float() for state in found)
        torch.testing.assert_close(other, one, rtol=0.0, atol=2**-4 * float(one.abs().max()))
        torch.testing.assert_close(found[1].lse[:, rows], found[0].lse[:, rows])


@pytest.mark.parametrize(("option", "value"), [("dropout_p", 0.1), ("batch_invariant", True)])
def test_what_packed_sequences_may_not_ask(option: str, value: Any) -> None:
    case = eight.PACKED[0]
    with emulated(SWEEP[0]), pytest.raises(NotImplementedError, match="packed sequences of 8 bits"):
        eight.attend_packed(case, case.quantized(), backend="hopper", **{option: value})


@pytest.mark.one_triton
@pytest.mark.parametrize("case", eight.PACKED[2:4], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "config",
    [
        HopperConfig(consumers=3, tile_kv=64, stages=2, turns=True),
        HopperConfig(consumers=2, tile_kv=64, stages=1, section=1, apart=True),
    ],
    ids=str,
)
def test_tiles_of_packed_sequences(case: Eight, config: HopperConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of keys that are smaller than the blocks that share a scale."""
    monkeypatch.setattr(tables, "FORWARD", dict.fromkeys(tables.FORWARD, (tables.Row(256, None, config),)))
    _run_packed(case, SWEEP[-1])


@pytest.mark.one_triton
@pytest.mark.parametrize(
    "config",
    [
        HopperConfig(consumers=3, tile_kv=64, stages=2, turns=True),
        HopperConfig(consumers=2, tile_kv=64, stages=1, section=1),
        HopperConfig(consumers=3, tile_kv=128, stages=4, turns=True, apart=True),
    ],
    ids=str,
)
def test_tiles(config: HopperConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of keys that are smaller than the blocks that share a scale, and those of long sequences."""
    monkeypatch.setattr(tables, "FORWARD", dict.fromkeys(tables.FORWARD, (tables.Row(256, None, config),)))
    _run(Eight("tiles", eight.dense(1, 200, 333, 2, 1, 64), "block", {"causal": True}), SWEEP[-1])


@pytest.mark.one_triton
@pytest.mark.parametrize("headdim", [64, 256])
def test_nan_of_padding_does_not_spread(headdim: int) -> None:
    """What a mask hides is no number; it is rounded to one that is none."""
    used = torch.tensor([90])
    q, k, v = Eight("padding", eight.dense(1, 150, 150, 1, 1, headdim)).tensors()
    k[:, 90:], v[:, 90:] = 0.0, 0.0
    found = []
    for poison in (0.0, torch.nan, torch.inf):
        k[:, 90:], v[:, 90:] = poison, poison
        with emulated(SWEEP[0]) as device:
            arguments = flashtile.fp8.quantize(q, k, v)
            out = flashtile.attention(*arguments, mask=lambda b, h, q_idx, kv_idx: kv_idx < used[b], backend="hopper")
        assert device.complaints == []
        found.append(out.float())
    for other in found[1:]:
        # Tiles that are done again multiply 16-bit weights.
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=2**-4 * float(found[0].abs().max()))


ROUNDED = (
    ((1, 100, 2, 64), (1, 150, 1, 64), 64, "block", True, torch.bfloat16, torch.float8_e4m3fn),
    ((1, 70, 1, 128), (1, 150, 1, 128), 40, "block", False, torch.bfloat16, torch.float8_e4m3fn),
    ((150, 2, 96), (70, 1, 96), 96, "head", True, torch.float16, torch.float8_e5m2),
    ((2, 70, 2, 40), (2, 30, 2, 40), 56, "tensor", True, torch.float16, torch.float8_e4m3fn),
    ((1, 70, 2, 40), (1, 20, 1, 40), 40, "block", True, torch.float32, torch.float8_e4m3fn),
)
"""Shapes of queries and of keys, columns of values, and how they are rounded."""


@pytest.mark.parametrize(("queries", "keys", "columns", "granularity", "incoherent", "dtype", "low"), ROUNDED, ids=str)
def test_rounding_gives_the_bits_of_pytorch(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    columns: int,
    granularity: str,
    incoherent: bool,
    dtype: Any,
    low: Any,
) -> None:
    tensors = eight.with_nan(queries, keys, columns, dtype)
    found = quantize.quantize(*tensors, granularity, incoherent, low, 0, _emulate)
    expected = eight.rounded(tensors, granularity, incoherent, low)
    for (data, scale), (expected_data, expected_scale) in zip(found, expected, strict=True):
        assert torch.equal(scale, expected_scale)
        assert torch.equal(data.float().nan_to_num(nan=-1e9), expected_data.float().nan_to_num(nan=-1e9))
        assert bool(data.float().isnan().any())


def _emulate(kernel: Any, programs: int, given: dict[str, Any], warps: int) -> None:
    """A launch of the rounding kernel as for a Hopper."""
    compiled = aot.build(kernel, given, aot.HOPPER, num_warps=warps)
    constants = aot.source(kernel, given).constants
    values = [
        plain(leaf)
        for index, parameter in enumerate(kernel.params)
        for path, leaf in aot.leaves(given[parameter.name], (index,))
        if path not in constants
    ]
    report = emulate_kernel(compiled, (programs, 1, 1), values)
    assert report.warnings == {}


def test_parts_of_a_call_lie_where_they_say() -> None:
    """What the kernel takes for key 8 j + 2 t + e of a group is that key."""
    order = scaled.turned(torch.arange(16).view(1, 16, 1, 1)).flatten().tolist()
    assert order == [8 * j + 2 * t + e for t in range(4) for j in range(2) for e in range(2)]
    values: Tensor = torch.randn(2, 37, 3, 5)
    assert torch.equal(scaled.straight(scaled.turned(values), 37), values)
