"""Layouts of wgmma, and warp-specialised kernels: right under every schedule, and mistakes in them are found."""

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton.experimental.gluon import language as gl

from tests.ptx_emulation import hopper_kernels
from tests.ptx_emulation.compiling import compiled, descriptor
from tests.ptx_emulation.test_plain import STORED
from tools.ptx_emulation import SWEEP, EmuError, Report, TensorMap, bf2f, emulate_kernel, f2bf

Array = np.ndarray[Any, Any]
BITS = {"bf16": 16, "fp16": 16, "fp8e4nv": 8, "fp8e5": 8, "fp32": 32}


@pytest.mark.parametrize(
    ("dtype", "a_layout", "b_layout", "shape"),
    [
        ("bf16", (32, False), (128, False), (64, 64, 64)),
        ("bf16", (32, True), (32, True), (64, 64, 64)),
        ("bf16", (64, False), (64, True), (128, 64, 64)),
        ("bf16", (64, True), (64, False), (64, 256, 128)),
        ("bf16", (128, False), (32, False), (64, 128, 64)),
        ("bf16", (128, True), (128, True), (128, 64, 128)),
        ("fp16", (128, False), (64, False), (64, 128, 128)),
        ("fp8e4nv", (32, False), (128, True), (64, 64, 128)),
        ("fp8e5", (128, False), (64, True), (64, 128, 128)),
        ("fp32", (64, False), (128, True), (64, 64, 64)),
    ],
)
def test_layouts(
    dtype: str, a_layout: tuple[int, bool], b_layout: tuple[int, bool], shape: tuple[int, int, int]
) -> None:
    """Swizzles of all widths, operands along K or along M and N."""
    m, n, k = shape
    layouts = [
        gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=BITS[dtype], rank=2, transposed=transposed)
        for width, transposed in (a_layout, b_layout)
    ]
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32"}
    sizes = {"M": m, "N": n, "K": k, "K_STEP": 256 // BITS[dtype], "WARPS": m // 16, "num_warps": m // 16}
    kernel = compiled(hopper_kernels.layout_product, types, A_LAYOUT=layouts[0], B_LAYOUT=layouts[1], **sizes)
    rng = np.random.default_rng(0)
    store, read = STORED[dtype]
    a, b = (store(rng.standard_normal(size).astype(np.float32)) for size in ((m, k), (k, n)))
    out = np.full((m, n), np.nan, np.float32)
    report = emulate_kernel(kernel, (1,), [a, b, out])
    if dtype == "fp32":
        a, b = ((each.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for each in (a, b))
    assert np.abs(out - read(a).astype(np.float64) @ read(b)).max() < 1e-4
    assert not report.warnings


NO_FENCE = "no fence"


def edited(kernel: Any, mistake: str) -> Any:
    """Fences are removed from the PTX: newer compilers put in those that a kernel lacks."""
    if mistake != NO_FENCE:
        return kernel
    ptx, fences = re.subn(r"fence\.proxy\.async\S*;", "", kernel.asm["ptx"])
    assert fences > 0
    return SimpleNamespace(asm={"ptx": ptx}, metadata=kernel.metadata)


TILE, STAGES = 64, 2
TILES, STEPS = 3, 4


@cache
def ring_kernel(adds: bool, mistake: str) -> Any:
    types = {
        **dict.fromkeys(("a_desc", "b_desc"), descriptor("bf16", TILE, TILE)),
        "out_desc": descriptor("fp32", TILE, TILE),
        **dict.fromkeys(("tiles", "steps"), "i32"),
    }
    options = {"TILE": TILE, "STAGES": STAGES, "ADDS": adds, "MISTAKE": mistake, "num_warps": 4}
    return edited(compiled(hopper_kernels.ring_product, types, **options), mistake)


def ring_product(adds: bool = False, mistake: str = "", programs: int = 2, **schedule: Any) -> tuple[float, Report]:
    """The largest error, and what was reported."""
    kernel = ring_kernel(adds, mistake)
    rng = np.random.default_rng(0)
    a, b = (f2bf(rng.standard_normal(size)) for size in ((TILES * TILE, STEPS * TILE), (STEPS * TILE, TILE)))
    expected = bf2f(a).astype(np.float64) @ bf2f(b)
    out = np.full((TILES * TILE, TILE), np.nan, np.float32)
    if adds:
        out = np.zeros((TILE, TILE), np.float32)
        expected = expected.reshape(TILES, TILE, TILE).sum(0)
    maps = [TensorMap.from_meta(*each) for each in zip((a, b, out), kernel.metadata.tensordesc_meta, strict=True)]
    report = emulate_kernel(kernel, (programs,), [*maps, TILES, STEPS], **schedule)
    return float(np.abs(out - expected).max()), report


@pytest.mark.parametrize("schedule", SWEEP, ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["stores", "adds"])
def test_ring(schedule: dict[str, Any], adds: bool) -> None:
    error, report = ring_product(adds, **schedule)
    assert error < 1e-4
    assert not report.warnings
    assert report.counts["tma.load"] == 2 * TILES * STEPS
    assert report.counts["tma.reduce" if adds else "tma.store"] == 2 * TILES


LENGTH, HEADS, D = 200, 2, 64


@cache
def attention_kernel(mistake: str) -> Any:
    tile = descriptor("bf16", 1, TILE, D)
    types = {
        **dict.fromkeys(("q_desc", "k_desc", "v_desc", "out_desc"), tile),
        "lse": "*fp32",
        "scale": "fp32",
        "length": "i32",
    }
    options = {"TILE": TILE, "D": D, "STAGES": STAGES, "MISTAKE": mistake, "num_warps": 4, "maxnreg": 168}
    return edited(compiled(hopper_kernels.attention, types, **options), mistake)


def attention(mistake: str = "", **schedule: Any) -> tuple[Array, Array, float, Report]:
    """(output, lse, largest error of both, report)"""
    kernel = attention_kernel(mistake)
    rng = np.random.default_rng(0)
    q, k, v = (f2bf(rng.standard_normal((HEADS, LENGTH, D))) for _ in range(3))
    scale = D**-0.5 / np.log(2)
    scores = bf2f(q).astype(np.float64) @ bf2f(k).transpose(0, 2, 1) * scale
    powers = 2.0**scores
    expected = powers / powers.sum(-1, keepdims=True) @ bf2f(v)
    out, lse = np.full(q.shape, 0xFFFF, np.uint16), np.full((HEADS, LENGTH), np.nan, np.float32)
    maps = [TensorMap.from_meta(*each) for each in zip((q, k, v, out), kernel.metadata.tensordesc_meta, strict=True)]
    report = emulate_kernel(kernel, (2, HEADS), [*maps, lse, scale, LENGTH], **schedule)
    error = np.maximum(np.abs(bf2f(out) - expected).max(), np.abs(lse - np.log2(powers.sum(-1))).max())
    return out, lse, float(error), report


def test_attention() -> None:
    """The same bits under every schedule; the last query and key tiles are not full."""
    out, lse, error, report = attention()
    assert error < 4e-3
    assert not report.warnings
    for schedule in SWEEP:
        other_out, other_lse, _, report = attention(**schedule)
        assert np.array_equal(out, other_out)
        assert np.array_equal(lse, other_lse)
        assert not report.warnings


def seen(run: Any, mistake: str, schedule: dict[str, Any], tolerance: float) -> str:
    """How a mistake shows: as an error, as warnings, as wrong numbers, or not at all."""
    try:
        *_, error, report = run(mistake=mistake, **schedule)
    except EmuError as complaint:
        return str(complaint).split("\n")[0]
    return ", ".join(report.kinds()) or ("" if error < tolerance else "wrong")


@pytest.mark.parametrize(
    ("mistake", "schedule", "shown"),
    [
        (NO_FENCE, {}, "missing-proxy-fence"),
        ("products do not wait for loads", {}, "more arrivals than its count"),
        ("products are not waited for", {}, "inflight-read"),
        ("loads do not wait", {}, "more arrivals than its count"),
        ("slots are given back early", {"order": "eager"}, "wrong"),
        ("slots are not given back", {}, "deadlock"),
        ("stores are not waited for", {"programs": 1}, "wrong"),
        ("the last store is not waited for", {}, "not-waited"),
    ],
)
def test_mistakes_in_a_ring(mistake: str, schedule: dict[str, Any], shown: str) -> None:
    assert shown in seen(ring_product, mistake, schedule, 1e-4)


@pytest.mark.parametrize(
    ("mistake", "schedule", "shown"),
    [
        (NO_FENCE, {}, "missing-proxy-fence"),
        ("the query is not waited for", {}, "not-waited"),
        ("values are given back early", {"order": "eager"}, "wrong"),
    ],
)
def test_mistakes_in_attention(mistake: str, schedule: dict[str, Any], shown: str) -> None:
    assert shown in seen(attention, mistake, schedule, 4e-3)


def test_a_deadlock_says_who_waits_for_what() -> None:
    said = r"(?s)deadlock\n.*warp 0: waits on mbarrier shared\+\d+ parity \d: phase \d, 1 of 1 arrivals pending"
    with pytest.raises(EmuError, match=said):
        ring_product(mistake="slots are not given back")


def test_tensor_maps_must_fit() -> None:
    kernel = ring_kernel(False, "")
    array = np.zeros((TILE, TILE), np.uint16)
    with pytest.raises(EmuError, match="needs a TensorMap, got ndarray"):
        emulate_kernel(kernel, (1,), [array] * 15 + [1, 1])
    with pytest.raises(EmuError, match="1 arguments"):
        emulate_kernel(kernel, (1,), [array])
