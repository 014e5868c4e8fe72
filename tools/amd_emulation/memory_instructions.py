"""Loads, stores and atomics that the emulator lacks or gets wrong: of LDS, of buffers, of global memory."""

import re
from typing import Any

import numpy as np

from tools.amd_emulation.errors import Unsupported
from tools.amd_emulation.formats import bf16, to_bf16
from tools.amd_emulation.wave import Wave, bits, signed_bits


def read_transposed(wave: Wave, instruction: Any) -> None:
    """ds_read_b64_tr_b16, _b8 (gfx950): of 16 lanes, their 8 bytes are rows of 16 elements; lane i gets column i."""
    word, width = instruction._raw, 2 if "B16" in instruction.op.name else 1
    if not wave.active().all():
        raise Unsupported(f"{instruction.op.name} with lanes off")
    offset = bits(word, 15, 0)
    rows = np.stack([np.array(wave.shared(int(place) + offset, 8)) for place in wave.vectors[bits(word, 39, 32)]])
    elements = rows.view(np.uint16 if width == 2 else np.uint8).reshape(4, 8 // width, 16)
    columns = np.ascontiguousarray(elements.transpose(0, 2, 1)).reshape(64, 8 // width).view(np.uint32)
    wave.write(bits(word, 63, 56), columns.T, bits(word, 25, 25))


def read_half(wave: Wave, instruction: Any) -> None:
    """ds_read_u16_d16 and the like: one half of a register; the emulator writes the other one too."""
    word, name = instruction._raw, instruction.op.name
    width, signed = (1 if re.search("[UI]8", name) else 2), re.search("_I(8|16)", name) is not None
    file = wave.file(wave.arch == "cdna" and bits(word, 25, 25))[bits(word, 63, 56)]
    for lane in wave.active_lanes():
        data = wave.shared(int(wave.vectors[bits(word, 39, 32)][lane]) + bits(word, 15, 0), width).tobytes()
        value = int.from_bytes(data, "little", signed=signed) & 0xFFFF
        file[lane] = _joined(int(file[lane]), value, name.endswith("_HI"))


def _joined(old: int, half: int, high: bool) -> int:
    return old & 0xFFFF | half << 16 if high else old & 0xFFFF0000 | half


class BufferInstruction:
    """One of RDNA's, for which the emulator has no class."""

    def __init__(self, word: int, size: int, name: str) -> None:
        self._raw, self._size, self.name = word, size, name

    def size(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"{self.name.lower()}({self._raw:#x})"


_OPERATIONS = {
    16: "LOAD_U8", 17: "LOAD_I8", 18: "LOAD_U16", 19: "LOAD_I16",
    20: "LOAD_B32", 21: "LOAD_B64", 22: "LOAD_B96", 23: "LOAD_B128",
    24: "STORE_B8", 25: "STORE_B16", 26: "STORE_B32", 27: "STORE_B64", 28: "STORE_B96", 29: "STORE_B128",
    30: "LOAD_D16_U8", 31: "LOAD_D16_I8", 32: "LOAD_D16_B16",
    33: "LOAD_D16_HI_U8", 34: "LOAD_D16_HI_I8", 35: "LOAD_D16_HI_B16", 36: "STORE_D16_HI_B8", 37: "STORE_D16_HI_B16",
    43: "GL0_INV", 44: "GL1_INV", 51: "ATOMIC_SWAP_B32", 53: "ATOMIC_ADD_U32", 86: "ATOMIC_ADD_F32",
    89: "ATOMIC_PK_ADD_F16", 90: "ATOMIC_PK_ADD_BF16",
}  # fmt: skip
"""By number, the same on gfx11 and gfx12."""

_CDNA_NAMES = {
    "UBYTE": "U8", "SBYTE": "I8", "USHORT": "U16", "SSHORT": "I16", "BYTE": "B8", "SHORT": "B16",
    "DWORD": "B32", "DWORDX2": "B64", "DWORDX3": "B96", "DWORDX4": "B128", "BYTE_D16_HI": "D16_HI_B8",
    "UBYTE_D16": "D16_U8", "SBYTE_D16": "D16_I8", "SHORT_D16": "D16_B16",
    "UBYTE_D16_HI": "D16_HI_U8", "SBYTE_D16_HI": "D16_HI_I8", "SHORT_D16_HI": "D16_HI_B16",
    "ADD": "ADD_U32", "SWAP": "SWAP_B32",
}  # fmt: skip
"""What CDNA calls the same."""


def decode_buffer(text: bytes, arch: str) -> BufferInstruction | None:
    """A buffer instruction of RDNA, if this is one."""
    head = int.from_bytes(text[:4], "little")
    if arch == "rdna3" and head >> 26 == 0x38:
        size, number = 8, bits(head, 25, 18)
    elif arch == "rdna4" and head >> 26 == 0x31:
        size, number = 12, bits(head, 21, 14)
    else:
        return None
    if number not in _OPERATIONS:
        raise Unsupported(f"buffer instruction {number} of {arch}")
    return BufferInstruction(int.from_bytes(text[:size], "little"), size, "BUFFER_" + _OPERATIONS[number])


class _Access:
    """The fields of a buffer instruction, and the addresses of its lanes. `data`: register of the data."""

    def __init__(self, wave: Wave, word: int, name: str) -> None:
        self.lds = False
        accumulators = 0
        if wave.arch == "rdna4":
            scalar, self.data, descriptor, vector = (
                bits(word, 6, 0), bits(word, 39, 32), bits(word, 49, 41), bits(word, 71, 64)
            )  # fmt: skip
            self.offset, by_vector, by_index, self.returns = (
                signed_bits(word, 95, 72), bits(word, 62, 62), bits(word, 63, 63), bits(word, 52, 52)
            )  # fmt: skip
        else:
            scalar, self.data, descriptor, vector = (
                bits(word, 63, 56), bits(word, 47, 40), bits(word, 52, 48) * 4, bits(word, 39, 32)
            )  # fmt: skip
            self.offset, self.returns = bits(word, 11, 0), bits(word, 14, 14)
            if wave.arch == "cdna":
                by_vector, by_index = bits(word, 12, 12), bits(word, 13, 13)
                self.lds, accumulators = bool(bits(word, 16, 16)), bits(word, 55, 55)
            else:
                by_vector, by_index = bits(word, 54, 54), bits(word, 55, 55)
        self.file = wave.file(accumulators)
        first, second, self.records = (int(word) for word in wave.scalars[descriptor : descriptor + 3])
        if by_index or second >> 16 & 0x3FFF:
            raise Unsupported(f"{name} of a buffer with a stride")
        nothing = scalar == 124 and wave.arch != "cdna"
        self.base = (first | (second & 0xFFFF) << 32) + (0 if nothing else int(wave.scalars[scalar]))
        moved = wave.vectors[vector].astype(np.int64) if by_vector else np.zeros(wave.lanes, np.int64)
        self.offsets = moved + self.offset & 0xFFFFFFFF


def buffer_access(wave: Wave, instruction: Any) -> None:
    """What lies behind the end of a buffer reads as zeros and is not written."""
    named = instruction.name if isinstance(instruction, BufferInstruction) else instruction.op.name
    kind, _, what = named.removeprefix("BUFFER_").partition("_")
    what = _CDNA_NAMES.get(what, what) if wave.arch == "cdna" else what
    access = _Access(wave, instruction._raw, named)
    for lane in wave.active_lanes():
        if kind == "ATOMIC":
            _buffer_atomic(wave, access, what, lane)
        elif kind == "LOAD":
            _buffer_load(wave, access, what, lane)
        else:
            _buffer_store(wave, access, what, lane)


def _buffer_atomic(wave: Wave, access: _Access, what: str, lane: int) -> None:
    offset = int(access.offsets[lane])
    if offset + 4 > access.records:
        return
    old = wave.load(access.base + offset, 4)
    wave.store(access.base + offset, _combined(what, old, int(access.file[access.data][lane]).to_bytes(4, "little")))
    if access.returns:
        access.file[access.data][lane] = int.from_bytes(old, "little")


def _pieces(access: _Access, size: int, lane: int) -> list[tuple[int, int, bool]]:
    """(place in the data, address, whether it is inside) of each element, of 4 bytes at most."""
    offset, element = int(access.offsets[lane]), min(size, 4)
    return [
        (place, access.base + offset + place, offset + place + element <= access.records)
        for place in range(0, size, element)
    ]


def _size(what: str) -> int:
    return int(what.rsplit("_", 1)[-1][1:]) // 8


def _buffer_load(wave: Wave, access: _Access, what: str, lane: int) -> None:
    size = _size(what)
    pieces = _pieces(access, size, lane)
    element = min(size, 4)
    data = b"".join(wave.load(address, element) if inside else bytes(element) for _, address, inside in pieces)
    if access.lds:
        if size < 4:
            raise Unsupported("buffer loads of less than 4 bytes to LDS")
        place = (int(wave.scalars[wave.m0]) & 0x3FFFF) + access.offset + lane * size
        wave.shared(place, size)[:] = np.frombuffer(data, np.uint8)
    elif size >= 4:
        access.file[access.data : access.data + size // 4, lane] = np.frombuffer(data, np.uint32)
    else:
        signed, half = what.rsplit("_", 1)[-1][0] == "I", "D16" in what
        value = int.from_bytes(data, "little", signed=signed) & (0xFFFF if half else 0xFFFFFFFF)
        old = int(access.file[access.data][lane])
        access.file[access.data][lane] = _joined(old, value, "HI_" in what) if half else value


def _buffer_store(wave: Wave, access: _Access, what: str, lane: int) -> None:
    size = _size(what)
    if size < 4:
        value = int(access.file[access.data][lane]) >> (16 if "HI_" in what else 0)
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    else:
        data = np.ascontiguousarray(access.file[access.data : access.data + size // 4, lane]).tobytes()
    for place, address, inside in _pieces(access, size, lane):
        if inside:
            wave.store(address, data[place : place + min(size, 4)])


def _combined(what: str, old: bytes, data: bytes) -> bytes:
    """What an atomic leaves in memory."""
    if what == "ADD_F32":
        return (np.frombuffer(old, np.float32) + np.frombuffer(data, np.float32)).tobytes()
    if what == "PK_ADD_F16":
        total = np.frombuffer(old, np.float16).astype(np.float64) + np.frombuffer(data, np.float16)
        return total.astype(np.float16).tobytes()
    if what == "PK_ADD_BF16":
        return to_bf16(bf16(np.frombuffer(old, np.uint16)) + bf16(np.frombuffer(data, np.uint16))).tobytes()
    if what == "ADD_U32":
        return (int.from_bytes(old, "little") + int.from_bytes(data, "little") & 0xFFFFFFFF).to_bytes(4, "little")
    if what == "SWAP_B32":
        return data
    raise Unsupported(f"atomic {what}")


GLOBAL_ATOMICS = {
    "GLOBAL_ATOMIC_ADD_F32": "ADD_F32",
    "GLOBAL_ATOMIC_PK_ADD_F16": "PK_ADD_F16",
    "GLOBAL_ATOMIC_PK_ADD_BF16": "PK_ADD_BF16",
    "GLOBAL_ATOMIC_ADD": "ADD_U32",
    "GLOBAL_ATOMIC_ADD_U32": "ADD_U32",
    "GLOBAL_ATOMIC_SWAP": "SWAP_B32",
    "GLOBAL_ATOMIC_SWAP_B32": "SWAP_B32",
}


def global_addresses(wave: Wave, instruction: Any) -> np.ndarray:
    """Of all lanes."""
    word = instruction._raw
    if wave.arch == "rdna4":
        vector, scalar, offset = bits(word, 71, 64), bits(word, 6, 0), signed_bits(word, 95, 72)
    else:
        vector, scalar, offset = bits(word, 39, 32), bits(word, 54, 48), signed_bits(word, 12, 0)
    low = wave.vectors[vector].astype(np.uint64)
    if scalar < 0x7C:
        base = np.uint64(int(wave.scalars[scalar]) | int(wave.scalars[scalar + 1]) << 32) + low
    else:
        base = low | wave.vectors[vector + 1 & 255].astype(np.uint64) << np.uint64(32)
    return base.astype(np.int64) + offset


def global_atomic(wave: Wave, instruction: Any) -> None:
    """float32 and packed 16-bit sums, integers."""
    word, what = instruction._raw, GLOBAL_ATOMICS[instruction.op.name]
    if wave.arch == "rdna4":
        data, target, returns, file = bits(word, 62, 55), bits(word, 39, 32), bits(word, 52, 52), wave.vectors
    else:
        data, target = bits(word, 47, 40), bits(word, 63, 56)
        returns = bits(word, 14, 14) if wave.arch == "rdna3" else bits(word, 16, 16)
        file = wave.file(wave.arch == "cdna" and bits(word, 55, 55))
    addresses = global_addresses(wave, instruction)
    for lane in wave.active_lanes():
        address = int(addresses[lane])
        old = wave.load(address, 4)
        wave.store(address, _combined(what, old, int(file[data][lane]).to_bytes(4, "little")))
        if returns:
            file[target][lane] = int.from_bytes(old, "little")


def global_load_to_shared(wave: Wave, instruction: Any) -> None:
    """global_load_lds_dword (CDNA): to M0 + offset + lane * size."""
    size = {"DWORD": 4, "DWORDX3": 12, "DWORDX4": 16}.get(instruction.op.name.rsplit("_", 1)[1])
    if size is None:
        raise Unsupported(instruction.op.name)
    addresses, offset = global_addresses(wave, instruction), signed_bits(instruction._raw, 12, 0)
    for lane in wave.active_lanes():
        place = (int(wave.scalars[wave.m0]) & 0x3FFFF) + offset + lane * size
        wave.shared(place, size)[:] = np.frombuffer(wave.load(int(addresses[lane]), size), np.uint8)
