"""The emulator: kernels whose results are known, mistakes that it must notice, and single instructions in numpy."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton._C.libtriton import amd as assembler
from triton._C.libtriton import llvm
from triton.backends.compiler import GPUTarget

from flashtile.compiling.targets import TARGETS
from flashtile.kernels import aot
from tests.amd import kernels
from tests.amd.machine import EMULATED, missing
from tools.amd_emulation import CodeObject, EmuError, emulator, launch, table
from tools.amd_emulation.formats import unpack
from tools.amd_emulation.lanes import Dpp
from tools.amd_emulation.wave import Wave

if (lacking := missing()) is not None:
    pytest.skip(lacking, allow_module_level=True)

FLOATS = {torch.float16: np.uint16, torch.bfloat16: np.uint16, torch.float32: np.float32}
NUMBERS = np.random.default_rng(1)


def _compiled(kernel: Any, arch: str, warps: int = 4, **given: Any) -> Any:
    """`given`: tensors for the arrays, of which only dtypes count."""
    return aot.build(kernel, given, GPUTarget("hip", arch, TARGETS[arch].warp), num_warps=warps)


def _run(compiled: Any, arguments: list[Any], programs: int = 1, **options: Any) -> Any:
    metadata = compiled.metadata
    given = {"shared": metadata.shared, "num_warps": metadata.num_warps} | options
    return launch(compiled.asm["hsaco"], arguments, (programs,), **given)


@pytest.mark.parametrize("arch", EMULATED)
@pytest.mark.parametrize("preload", [True, False])
def test_sums(arch: str, preload: bool) -> None:
    """Arguments that the hardware preloads, and those that the kernel loads."""
    x = torch.zeros(1)
    compiled = _compiled(kernels.add_kernel, arch, x=x, y=x, z=x, n=1000, BLOCK=256)
    first, second = NUMBERS.standard_normal((2, 1000)).astype(np.float32)
    found = np.zeros(1000, np.float32)
    report = _run(compiled, [first, second, found, 1000], 4, preload=preload)
    np.testing.assert_array_equal(found, first + second)
    assert report.gfx == CodeObject(compiled.asm["hsaco"]).gfx == arch
    assert report.waves == 4 * 4
    assert report.instructions > report.waves


@pytest.mark.parametrize("arch", EMULATED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("sizes", "warps"), [((16, 16, 16), 1), ((32, 32, 32), 1), ((64, 32, 64), 4)])
def test_products(arch: str, dtype: torch.dtype, sizes: tuple[int, int, int], warps: int) -> None:
    m, n, k = sizes
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((m, k), (k, n)))
    c = np.zeros((m, n), np.float32)
    compiled = _compiled(kernels.dot_kernel, arch, warps, a=a, b=b, c=torch.zeros(1), M=m, N=n, K=k)
    as_bytes = [tensor.view(torch.uint8).numpy() for tensor in (a, b)]
    report = _run(compiled, [*as_bytes, c])
    np.testing.assert_allclose(c, (a.double() @ b.double()).numpy(), rtol=0, atol=2e-5)
    used = any(("MFMA" if arch.startswith("gfx9") else "WMMA") in name for name in report.counts)
    assert used == (dtype is not torch.float32 or arch.startswith("gfx9"))


EIGHT_BITS = {
    "gfx942": (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    "gfx950": (torch.float8_e4m3fn, torch.float8_e5m2),
    "gfx1201": (torch.float8_e4m3fn, torch.float8_e5m2),
}


@pytest.mark.parametrize(
    ("arch", "dtype"), [(arch, dtype) for arch, two in EIGHT_BITS.items() for dtype in two], ids=str
)
def test_products_of_eight_bits(arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each GPU's own formats."""
    monkeypatch.setitem(aot._NAMES, "torch.float8_e4m3fnuz", "fp8e4b8")
    monkeypatch.setitem(aot._NAMES, "torch.float8_e5m2fnuz", "fp8e5b16")
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((32, 64), (64, 32)))
    c = np.zeros((32, 32), np.float32)
    compiled = _compiled(kernels.dot_kernel, arch, 2, a=a, b=b, c=torch.zeros(1), M=32, N=32, K=64)
    report = _run(compiled, [tensor.view(torch.uint8).numpy() for tensor in (a, b)] + [c])
    np.testing.assert_allclose(c, (a.double() @ b.double()).numpy(), rtol=0, atol=2e-5)
    assert any("FP8" in name or "BF8" in name or "F8F6F4" in name for name in report.counts)


@pytest.mark.parametrize("arch", EMULATED)
def test_reductions(arch: str) -> None:
    x = NUMBERS.standard_normal((8, 256)).astype(np.float32)
    sums, maxima, places, running = (
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.int32),
        np.zeros_like(x),
    )
    single = torch.zeros(1)
    named = {"x": single, "sums": single, "maxima": single, "places": single.int(), "running": single}
    _run(_compiled(kernels.reduce_kernel, arch, **named, ROWS=8, COLUMNS=256), [x, sums, maxima, places, running])
    wide = x.astype(np.float64)
    np.testing.assert_allclose(sums, wide.sum(1), rtol=0, atol=3e-5)
    np.testing.assert_allclose(running, wide.cumsum(1), rtol=0, atol=3e-5)
    np.testing.assert_array_equal(maxima, x.max(1))
    np.testing.assert_array_equal(places, x.argmax(1))


@pytest.mark.parametrize("arch", EMULATED)
def test_atomics(arch: str) -> None:
    x, total = NUMBERS.integers(0, 100, 512).astype(np.float32), np.zeros(16, np.float32)
    single = torch.zeros(1)
    _run(_compiled(kernels.atomic_kernel, arch, x=single, total=single, BLOCK=256), [x, total], 2)
    np.testing.assert_array_equal(total, x.reshape(-1, 16).sum(0))


class TestNotices:
    """What is wrong must not pass."""

    @pytest.mark.parametrize("arch", EMULATED)
    @pytest.mark.parametrize(("read", "written"), [(1000, 1024), (1024, 1000)])
    def test_accesses_out_of_bounds(self, arch: str, read: int, written: int) -> None:
        single = torch.zeros(1)
        compiled = _compiled(kernels.unmasked_kernel, arch, x=single, z=single, BLOCK=256)
        with pytest.raises(EmuError, match="not inside any buffer"):
            _run(compiled, [np.ones(read, np.float32), np.zeros(written, np.float32)], 4)

    @pytest.mark.parametrize("arch", EMULATED)
    def test_too_little_shared_memory(self, arch: str) -> None:
        half = torch.zeros(1, dtype=torch.float16)
        compiled = _compiled(kernels.dot_kernel, arch, a=half, b=half, c=torch.zeros(1), M=64, N=64, K=64)
        a, b, c = np.zeros((64, 64), np.uint16), np.zeros((64, 64), np.uint16), np.zeros((64, 64), np.float32)
        with pytest.raises(EmuError, match="LDS access"):
            _run(compiled, [a, b, c], shared=512)

    @pytest.mark.parametrize("arch", EMULATED)
    def test_wrong_arguments(self, arch: str) -> None:
        single = torch.zeros(1)
        compiled = _compiled(kernels.unmasked_kernel, arch, x=single, z=single, BLOCK=256)
        with pytest.raises(EmuError, match="two of them Triton's own, and got 1"):
            _run(compiled, [np.ones(256, np.float32)])

    @pytest.mark.parametrize("arch", EMULATED)
    def test_an_endless_loop(self, arch: str) -> None:
        single = torch.zeros(1)
        compiled = _compiled(kernels.add_kernel, arch, x=single, y=single, z=single, n=1000, BLOCK=256)
        arrays = [np.zeros(1000, np.float32) for _ in range(3)]
        with pytest.raises(EmuError, match="a loop without an end"):
            _run(compiled, [*arrays, 1000], 4, most=10)


class _One:
    """One instruction, assembled by Triton's LLVM, on random registers; `before`: the vectors as they were."""

    def __init__(self, gfx: str, text: str, prepare: Callable[[Wave], None] | None) -> None:
        known, self.arch = emulator.load(), emulator.architecture(gfx)
        lanes, size = known._wave_size(self.arch), 1 << 16
        code = ctypes.create_string_buffer(_assembled(gfx, text) + bytes(64))
        address = ctypes.addressof(code)
        state = known._init_wave(address, 0, lanes, lanes, 1, 1, 0, 0, 0, self.arch, 0, 0, 0, [0], lanes)
        numbers = np.random.default_rng(2)
        self.lds = numbers.integers(0, 256, size, dtype=np.uint8)
        wave = self.wave = Wave(state, self.lds, size, self.arch, (), gfx == "gfx942")
        wave.vectors[:] = numbers.integers(0, 1 << 32, wave.vectors.shape, dtype=np.uint32)
        if self.arch == "cdna":
            wave.accumulators[:] = numbers.integers(0, 1 << 32, wave.vectors.shape, dtype=np.uint32)
        if prepare is not None:
            prepare(wave)
        self.before, self.lane = wave.vectors.copy(), np.arange(lanes)
        places = (state.sgpr_buf._buf.va_addr, state.vgpr_buf._buf.va_addr, 0, self.lds.ctypes.data, 0)
        pointers = [ctypes.c_uint64(place) for place in (*places, state.accvgpr_buf._buf.va_addr)]
        decoded = known.decode_inst(code.raw[:16], self.arch)
        if (call := table.find(known._op_name(decoded), self.arch)) is not None:
            call(wave, decoded)
        elif "DPP16" in type(decoded).__name__:
            Dpp(known, decoded, self.arch, lanes).run(wave, pointers)
        else:
            (program, runner), _ = known._decode_at(address, self.arch)
            runner.fxn(*[pointers[place] for place in program.arg.globals])

    def floats(self, register: int, before: bool = True) -> np.ndarray:
        return (self.before if before else self.wave.vectors)[register].view(np.float32)

    def words(self, address: np.ndarray) -> np.ndarray:
        return self.lds.view(np.uint32)[address // 4]


BEGIN, END = b"\xed\x5e\xed\x5e\x01\x02\x03\x04", b"\xed\x5e\xed\x5e\x05\x06\x07\x08"


def _assembled(gfx: str, text: str) -> bytes:
    """The bytes of an instruction, found between two marks."""
    llvm.init_targets()
    marked = "\n".join((".text", f".byte {', '.join(map(str, BEGIN))}", text, f".byte {', '.join(map(str, END))}", ""))
    made = bytes(assembler.assemble_amdgcn(marked, gfx, "-real-true16" if gfx == "gfx1100" else ""))
    return made[made.index(BEGIN) + len(BEGIN) : made.index(END)]


def _floats(wave: Wave) -> None:
    numbers = np.random.default_rng(3).standard_normal((12, wave.lanes)).astype(np.float32)
    wave.vectors[:12] = numbers.view(np.uint32)


def _places(step: int) -> Callable[[Wave], None]:
    """An address of its own for each lane, in the first vector register but one."""

    def prepare(wave: Wave) -> None:
        wave.vectors[1] = np.random.default_rng(4).permutation(wave.lanes) * step

    return prepare


def _lanes(wave: Wave) -> None:
    wave.vectors[1] = np.random.default_rng(5).integers(0, 256, wave.lanes) * 4


def _scalar(number: int, value: int) -> Callable[[Wave], None]:
    def prepare(wave: Wave) -> None:
        wave.scalars[number] = value

    return prepare


Expected = Callable[[_One], Any]


def _rows(one: _One, count: int, offset: int = 0) -> list[np.ndarray]:
    """Words of LDS at the lanes' addresses."""
    return [one.words(one.before[1] + offset + 4 * place) for place in range(count)]


def _everywhere(read: str, write: str) -> dict[str, tuple[Callable[[Wave], None] | None, Expected, Expected]]:
    """Instructions that all three have: text -> (registers before, what is found, what is expected)."""
    two = "read2" if read == "ds_read" else "load_2addr"

    def vector(number: int) -> Expected:
        return lambda one: one.wave.vectors[number]

    def vectors(count: int) -> Expected:
        return lambda one: list(one.wave.vectors[:count])

    def sums(source: Callable[[_One], np.ndarray]) -> Expected:
        return lambda one: (source(one) + one.floats(4)).view(np.uint32)

    return {
        "ds_bpermute_b32 v2, v1, v3": (_lanes, vector(2), lambda o: o.before[3][o.before[1] // 4 % len(o.lane)]),
        "ds_bpermute_b32 v3, v1, v3": (_lanes, vector(3), lambda o: o.before[3][o.before[1] // 4 % len(o.lane)]),
        "ds_swizzle_b32 v2, v3 offset:0x041f": (None, vector(2), lambda o: o.before[3][o.lane ^ 1]),
        f"{read}_b128 v[0:3], v1 offset:16": (_places(16), vectors(4), lambda o: _rows(o, 4, 16)),
        f"{read}_u16_d16_hi v2, v1 offset:4": (
            _places(8), vector(2), lambda o: o.before[2] & 0xFFFF | _rows(o, 1, 4)[0] << 16,
        ),
        f"{read}_u16_d16 v2, v1 offset:4": (
            _places(8), vector(2), lambda o: o.before[2] & 0xFFFF0000 | _rows(o, 1, 4)[0] & 0xFFFF,
        ),
        f"{write}_b64 v1, v[2:3] offset:8": (_places(16), lambda o: _rows(o, 2, 8), lambda o: list(o.before[2:4])),
        f"ds_{two}_b64 v[0:3], v1 offset0:1 offset1:8": (
            _places(16), vectors(4), lambda o: _rows(o, 2, 8) + _rows(o, 2, 64),
        ),
        "v_mul_u32_u24_e32 v2, v3, v4": (
            None, vector(2), lambda o: (o.before[3] & 0xFFFFFF) * (o.before[4] & 0xFFFFFF),
        ),
        "v_mad_u32_u24 v2, v3, 36, v5": (None, vector(2), lambda o: (o.before[3] & 0xFFFFFF) * 36 + o.before[5]),
        "v_add_f32_dpp v2, v3, v4 row_shr:8 row_mask:0xf bank_mask:0xf bound_ctrl:1": (
            _floats, vector(2), sums(lambda o: np.where(o.lane % 16 >= 8, o.floats(3)[o.lane - 8], np.float32(0))),
        ),
        "v_mov_b32_dpp v3, v3 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf": (
            None, vector(3), lambda o: o.before[3][o.lane ^ 1],
        ),
        "v_mov_b32_dpp v2, v3 row_shr:4 row_mask:0xf bank_mask:0xf": (
            None, vector(2), lambda o: np.where(o.lane % 16 >= 4, o.before[3][o.lane - 4], o.before[2]),
        ),
        "v_perm_b32 v2, v1, v3, s4": (
            _scalar(4, 0x05040100), vector(2), lambda o: o.before[3] & 0xFFFF | o.before[1] << 16,
        ),
    }  # fmt: skip


_NAMES = {"gfx942": ("ds_read", "ds_write"), "gfx1100": ("ds_load", "ds_store"), "gfx1201": ("ds_load", "ds_store")}


@pytest.mark.parametrize(
    ("gfx", "text"), [(gfx, text) for gfx, names in _NAMES.items() for text in _everywhere(*names)]
)
def test_single_instructions(gfx: str, text: str) -> None:
    prepare, found, expected = _everywhere(*_NAMES[gfx])[text]
    one = _One(gfx, text, prepare)
    np.testing.assert_array_equal(found(one), expected(one))


def _eight(one: _One, dtype: torch.dtype, half: int) -> np.ndarray:
    """The two 8-bit floats in this half of a register, (2, lanes), as PyTorch reads them."""
    taken = one.before[3][None] >> np.array([[16 * half], [16 * half + 8]], np.uint32) & 0xFF
    return torch.from_numpy(taken.astype(np.uint8)).view(dtype).double().numpy()


def _rounded(one: _One, scale: float, dtype: torch.dtype, place: int) -> np.ndarray:
    """Registers 3 and 4 in 8 bits, as PyTorch rounds them, in one half of register 2."""
    low, high = (
        torch.from_numpy(one.floats(number) / np.float32(scale)).to(dtype).view(torch.uint8).numpy().astype(np.uint32)
        for number in (3, 4)
    )
    return (one.before[2] & (0xFFFF0000 >> place)) | (low | high << 8) << place


def _wide(words: np.ndarray, kind: str) -> np.ndarray:
    return unpack(words, kind, False)


OWN: dict[tuple[str, str], tuple[Callable[[Wave], None] | None, Expected, Expected]] = {
    ("gfx942", "v_cvt_f16_f32_e32 v200, v3"): (
        _floats,
        lambda one: (one.wave.vectors[200], one.wave.vectors[72]),
        lambda one: (one.floats(3).astype(np.float16).view(np.uint16), one.before[72]),
    ),
    ("gfx942", "ds_write_b32 v1, a2 offset:16"): (
        _places(16), lambda one: _rows(one, 1, 16)[0], lambda one: one.wave.accumulators[2],
    ),
    ("gfx942", "v_mov_b32_dpp v2, v3 row_bcast:15 row_mask:0xa bank_mask:0xf"): (
        None,
        lambda one: one.wave.vectors[2],
        lambda one: np.where(one.lane // 16 % 2, one.before[3][one.lane // 16 * 16 - 1], one.before[2]),
    ),
    ("gfx950", "v_cvt_scalef32_pk_bf16_fp8 v2, v3, 1.0"): (
        None, lambda one: _wide(one.wave.vectors[2][None], "bf16"), lambda one: _eight(one, torch.float8_e4m3fn, 0),
    ),
    ("gfx950", "v_cvt_scalef32_pk_f16_bf8 v2, v3, 1.0 op_sel:[1,0,0]"): (
        None, lambda one: _wide(one.wave.vectors[2][None], "f16"), lambda one: _eight(one, torch.float8_e5m2, 1),
    ),
    ("gfx950", "v_cvt_scalef32_pk_f32_fp8 v[8:9], v3, 2.0"): (
        None, lambda one: _wide(one.wave.vectors[8:10], "f32"), lambda one: 2 * _eight(one, torch.float8_e4m3fn, 0),
    ),
    ("gfx950", "v_cvt_scalef32_pk_bf8_f32 v2, v3, v4, 2.0 op_sel:[0,0,0,1]"): (
        _floats, lambda one: one.wave.vectors[2], lambda one: _rounded(one, 2.0, torch.float8_e5m2, 16),
    ),
    ("gfx942", "v_cvt_pk_fp8_f32 v2, v3, v4"): (
        _floats, lambda one: one.wave.vectors[2], lambda one: _rounded(one, 1.0, torch.float8_e4m3fnuz, 0),
    ),
    ("gfx1100", "v_permlanex16_b32 v18, v22, s2, 0xfedcba98 op_sel:[1,0]"): (
        _scalar(2, 0x76543210), lambda one: one.wave.vectors[18], lambda one: one.before[22][one.lane ^ 16],
    ),
    ("gfx1100", "v_mov_b32_dpp v2, v3 row_xmask:3 row_mask:0xf bank_mask:0xf"): (
        None, lambda one: one.wave.vectors[2], lambda one: one.before[3][one.lane ^ 3],
    ),
    ("gfx1201", "v_mov_b32_dpp v2, v3 row_share:5 row_mask:0xf bank_mask:0xf"): (
        None, lambda one: one.wave.vectors[2], lambda one: one.before[3][one.lane & 16 | 5],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("gfx", "text"), OWN)
def test_instructions_of_one_kind_of_gpu(gfx: str, text: str) -> None:
    prepare, found, expected = OWN[gfx, text]
    one = _One(gfx, text, prepare)
    np.testing.assert_array_equal(found(one), expected(one))
