"""What plain Triton compiles to on Ampere and Hopper, against numpy."""

from typing import Any

import numpy as np
import pytest

from tests.ptx_emulation import plain_kernels
from tests.ptx_emulation.compiling import compiled
from tools.ptx_emulation import E4M3, E5M2, EmuError, bf2f, emulate_kernel, f2bf, f2e4m3, f2e5m2

Array = np.ndarray[Any, Any]
both_architectures = pytest.mark.parametrize("arch", [80, 90])


def normal(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@both_architectures
def test_elementwise(arch: int) -> None:
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "length": "i32"}
    kernel = compiled(plain_kernels.scale_and_add, types, arch, BLOCK=256)
    x, y = normal(2, 1000)
    out = np.full(1000, np.nan, np.float32)
    emulate_kernel(kernel, (4,), [x.copy(), y.copy(), out, 1000])
    assert np.abs(out - (x * 2 + np.exp(y))).max() < 2e-5


@both_architectures
def test_reductions(arch: int) -> None:
    kernel = compiled(plain_kernels.softmax, {"x": "*fp16", "out": "*fp32", "length": "i32"}, arch, BLOCK=1024)
    x = normal(3, 777).astype(np.float16)
    out = np.full((3, 777), np.nan, np.float32)
    emulate_kernel(kernel, (3,), [x, out, 777])
    powers = np.exp(x.astype(np.float64))
    assert np.abs(out - powers / powers.sum(1, keepdims=True)).max() < 1e-8


@both_architectures
def test_scans(arch: int) -> None:
    kernel = compiled(plain_kernels.running_sum, {"x": "*fp32", "out": "*fp32", "largest": "*i32"}, arch, BLOCK=512)
    x = normal(2, 512)
    out, largest = np.full((2, 512), np.nan, np.float32), np.zeros(2, np.int32)
    emulate_kernel(kernel, (2,), [x, out, largest])
    assert np.abs(out - np.cumsum(x.astype(np.float64), 1)).max() < 2e-5
    assert (largest == x.argmax(1)).all()


@both_architectures
def test_atomics(arch: int) -> None:
    types = {"x": "*i32", "counts": "*i32", "last": "*i32", "length": "i32"}
    kernel = compiled(plain_kernels.count_and_last, types, arch, BLOCK=128)
    x = np.random.default_rng(0).integers(0, 10, 500).astype(np.int32)
    counts, last = np.zeros(10, np.int32), np.zeros(10, np.int32)
    emulate_kernel(kernel, (4,), [x, counts, last, 500], interleave="all")
    assert (counts == np.bincount(x, minlength=10)).all()
    assert last.tolist() == [np.nonzero(x == i)[0].max() for i in range(10)]


@both_architectures
def test_loops(arch: int) -> None:
    kernel = compiled(plain_kernels.collatz, {"x": "*i32", "out": "*i32"}, arch, START=0)
    out = np.zeros(8, np.int32)
    emulate_kernel(kernel, (8,), [np.arange(1, 9).astype(np.int32), out])
    assert out.tolist() == [0, 1, 7, 2, 5, 8, 16, 3]


@both_architectures
def test_conversions(arch: int) -> None:
    types = {"x": "*fp32", "as_bf16": "*bf16", "as_fp16": "*fp16", "as_int": "*i32", "mixed": "*i32"}
    kernel = compiled(plain_kernels.casts, types, arch, BLOCK=256)
    x = normal(256) * 30
    as_bf16, as_fp16 = np.zeros(256, np.uint16), np.zeros(256, np.float16)
    as_int, mixed = np.zeros(256, np.int32), np.zeros(256, np.int32)
    emulate_kernel(kernel, (1,), [x, as_bf16, as_fp16, as_int, mixed])
    assert np.array_equal(as_bf16, f2bf(x))
    assert np.array_equal(as_fp16, x.astype(np.float16))
    whole = np.trunc(x).astype(np.int32)
    assert np.array_equal(as_int, whole)
    quotient = np.trunc(whole / 7).astype(np.int32) ^ np.fmod(whole, 5)
    assert np.array_equal(mixed, quotient + (whole >> 2) * 3 + np.where(whole > 3, whole & 12, whole | 3))


# How numbers are stored and read back.
STORED: dict[str, tuple[Any, Any]] = {
    "bf16": (f2bf, bf2f),
    "fp16": (lambda values: values.astype(np.float16), lambda stored: stored),
    "fp32": (lambda values: values, lambda stored: stored),
    "fp8e4nv": (f2e4m3, lambda stored: E4M3[stored]),
    "fp8e5": (f2e5m2, lambda stored: E5M2[stored]),
}


@pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
@pytest.mark.parametrize(
    ("arch", "dtype", "precision", "tolerance", "instruction"),
    [
        (80, "bf16", "ieee", 2e-5, "mma"),
        (80, "fp32", "tf32", 6e-2, "mma"),
        (89, "fp8e4nv", "ieee", 2e-5, "mma"),
        (90, "fp16", "ieee", 2e-5, "wgmma"),
        (90, "fp32", "tf32", 6e-2, "wgmma"),
        (90, "fp32", "ieee", 5e-5, None),
        (90, "fp8e5", "ieee", 2e-5, "wgmma"),
    ],
)
def test_products(
    arch: int, dtype: str, precision: str, tolerance: float, instruction: str | None, aligned: bool
) -> None:
    """mma.sync and wgmma; through cp.async and ldmatrix where alignment is promised."""
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32", "ROWS": "i32", "COLUMNS": "i32", "DEPTH": "i32"}
    step = 64 if dtype.startswith("fp8") else 32
    options = {"TILE": 64, "STEP": step, "PRECISION": precision, "num_stages": 3, "num_warps": 4}
    kernel = compiled(plain_kernels.product, types, arch, aligned, **options)
    rows, columns, depth = (80, 64, 160) if aligned else (70, 61, 113)
    store, read = STORED[dtype]
    a, b = store(normal(rows, depth)), store(normal(depth, columns))
    outs = []
    for mode in ("late", "early"):
        out = np.full((rows, columns), np.nan, np.float32)
        report = emulate_kernel(kernel, (2, 1), [a, b, out, rows, columns, depth], async_mode=mode)
        assert not report.warnings
        assert instruction is None or report.counts[instruction] > 0
        outs.append(out)
    assert np.abs(outs[0] - read(a).astype(np.float64) @ read(b)).max() < tolerance
    assert np.array_equal(*outs)


def test_out_of_bounds() -> None:
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "length": "i32"}
    kernel = compiled(plain_kernels.scale_and_add, types, BLOCK=256)
    arrays = [normal(1000) for _ in range(3)]
    with pytest.raises(EmuError, match=r"out of bounds: argument 0 .* warp 3 of cta \(3, 0, 0\)"):
        emulate_kernel(kernel, (4,), [*arrays, 1001])
