"""The emulator's own parts, without tinygrad: code objects, arguments, number formats, banks of LDS."""

import struct

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget

from flashtile.compiling.targets import TARGETS
from flashtile.kernels import aot
from tests.amd import kernels
from tools.amd_emulation import emulator, guards, message_pack
from tools.amd_emulation.arguments import DeviceBuffer, packed
from tools.amd_emulation.code_object import CodeObject, Image
from tools.amd_emulation.errors import EmuError, Unsupported
from tools.amd_emulation.formats import f16, to_bf16, unpack
from tools.amd_emulation.lanes import dpp_sources

AMD = [name for name, target in TARGETS.items() if target.backend == "hip"]


@pytest.mark.parametrize("arch", AMD)
def test_code_objects(arch: str) -> None:
    single = torch.zeros(1)
    given = {"x": single, "y": single, "z": single, "n": 1000, "BLOCK": 256}
    compiled = aot.build(kernels.add_kernel, given, GPUTarget("hip", arch, TARGETS[arch].warp), num_warps=4)
    code = CodeObject(compiled.asm["hsaco"])
    assert (code.gfx, list(code.kernels)) == (arch, ["add_kernel"])
    kernel = code.kernels["add_kernel"]
    assert kernel[".wavefront_size"] == TARGETS[arch].warp
    # Three pointers, a number, and Triton's own two pointers.
    assert [field[".offset"] for field in kernel[".args"]] == [0, 8, 16, 24, 32, 40]
    descriptor, address = code.descriptor("add_kernel")
    assert (descriptor.arguments, descriptor.shared, descriptor.scratch) == (48, 0, 0)
    assert address + descriptor.entry == code.symbols["add_kernel"]
    image = Image(code)
    assert image.base + code.symbols["add_kernel"] in image


def test_what_is_no_code_object() -> None:
    with pytest.raises(ValueError, match="no code object"):
        CodeObject(bytes(64))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"\x07", 7),
        (b"\xff", -1),
        (b"\xc0", None),
        (b"\xc3", True),
        (b"\xa2hi", "hi"),
        (b"\xd9\x03abc", "abc"),
        (b"\xcd\x01\x00", 256),
        (b"\xd1\xff\xfe", -2),
        (b"\xc4\x02\x01\x02", b"\x01\x02"),
        (b"\x92\x01\xa1x", [1, "x"]),
        (b"\xdc\x00\x01\x05", [5]),
        (b"\x81\xa1k\x91\x02", {"k": [2]}),
        (b"\xde\x00\x01\x01\x02", {1: 2}),
    ],
)
def test_message_pack(text: bytes, value: object) -> None:
    assert message_pack.decode(text) == value


@pytest.mark.parametrize("text", [b"\x92\x01", b"\xc1"])
def test_what_is_no_message_pack(text: bytes) -> None:
    with pytest.raises(ValueError, match="MessagePack"):
        message_pack.decode(text)


def test_arguments() -> None:
    buffer = DeviceBuffer(np.arange(3, dtype=np.int32))
    kernel = {
        ".args": [
            {".offset": 0, ".size": 8, ".value_kind": "global_buffer"},
            {".offset": 8, ".size": 4, ".value_kind": "by_value"},
            {".offset": 12, ".size": 4, ".value_kind": "by_value"},
            {".offset": 16, ".size": 8, ".value_kind": "global_buffer"},
            {".offset": 24, ".size": 4, ".value_kind": "hidden_block_count_x"},
        ]
    }
    found = packed(kernel, 28, [buffer, 0.5, -1]).tobytes()
    assert found == struct.pack("<Qfiqi", buffer.address, 0.5, -1, 0, 0)
    with pytest.raises(EmuError, match="takes 4 arguments, two of them Triton's own, and got 1"):
        packed(kernel, 28, [buffer])


def test_writes_beside_a_buffer() -> None:
    buffer = DeviceBuffer(np.zeros(4, np.float32))
    buffer.bytes[:] = 1
    buffer.check()
    buffer.view[buffer.view.size - 1] = 0
    with pytest.raises(EmuError, match="1 bytes were written before or behind a buffer of 16 bytes"):
        buffer.check()


@pytest.mark.parametrize(
    ("kind", "fnuz", "dtype"),
    [
        ("fp8", False, torch.float8_e4m3fn),
        ("fp8", True, torch.float8_e4m3fnuz),
        ("bf8", False, torch.float8_e5m2),
        ("bf8", True, torch.float8_e5m2fnuz),
        ("i8", False, torch.int8),
    ],
)
def test_formats_of_eight_bits(kind: str, fnuz: bool, dtype: torch.dtype) -> None:
    """All 256 of them, as PyTorch has them."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    words = every.numpy().view(np.uint32)[:, None]
    np.testing.assert_array_equal(unpack(words, kind, fnuz)[:, 0], every.view(dtype).double().numpy())


def test_formats_of_sixteen_bits() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32)
    halves = every.to(torch.uint16)
    words = every.numpy().astype(np.uint32)
    np.testing.assert_array_equal(f16(words), halves.view(torch.float16).double().numpy())
    brains = halves.view(torch.bfloat16)
    np.testing.assert_array_equal(unpack(words[:, None], "bf16", False)[::2, 0], brains.double().numpy())
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(to_bf16(numbers.numpy()), numbers.bfloat16().view(torch.uint16).numpy())


@pytest.mark.parametrize(
    ("step", "size", "lanes", "expected"),
    [
        (4, 4, 32, 1),  # one word of each bank
        (4, 4, 64, 2),
        (8, 4, 32, 2),  # every other bank
        (128, 4, 32, 32),  # all in one
        (0, 4, 32, 1),  # the same word
        (16, 16, 32, 4),  # in four parts
        (128, 16, 32, 32),
        (144, 16, 32, 4),  # rows of 128 bytes, padded
    ],
)
def test_banks(step: int, size: int, lanes: int, expected: int) -> None:
    assert guards.cycles(np.arange(lanes) * step, size, 32) == expected


@pytest.mark.parametrize(
    ("name", "size"),
    [("DS_READ_B128", 16), ("DS_WRITE2ST64_B32", 4), ("DS_LOAD_2ADDR_B64", 8), ("DS_READ_U16_D16_HI", 2)],
)
def test_bytes_of_shared_accesses(name: str, size: int) -> None:
    found = guards.shared_addresses(name)
    assert found is not None
    assert found[0] == size
    assert guards.shared_addresses("V_ADD_F32") is None


def test_lanes_of_dpp() -> None:
    lane = np.arange(32)
    assert dpp_sources(0x1B, 32)[0].tolist() == (lane ^ 3).tolist()
    shifted, there = dpp_sources(0x111, 32)
    assert there.tolist() == (lane % 16 > 0).tolist()
    assert shifted[there].tolist() == (lane[there] - 1).tolist()
    assert dpp_sources(0x165, 32)[0].tolist() == (lane ^ 5).tolist()
    with pytest.raises(Unsupported, match="0x1ff"):
        dpp_sources(0x1FF, 32)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYGRAD", raising=False)
    assert "TINYGRAD is not set" in (emulator.missing() or "")
    monkeypatch.setenv("TINYGRAD", "/nowhere")
    assert "no test/mockgpu/amd/emu.py in /nowhere" in (emulator.missing() or "")
    with pytest.raises(ValueError, match="gfx90a: the emulator has gfx942"):
        emulator.architecture("gfx90a")
