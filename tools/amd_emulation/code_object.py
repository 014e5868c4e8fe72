"""A code object: the ELF file that Triton makes for an AMD GPU (LLVM's user guide for the AMDGPU backend)."""

import ctypes
import mmap
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools.amd_emulation import message_pack
from tools.amd_emulation.errors import Unsupported

MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x4F: "gfx950", 0x41: "gfx1100", 0x4E: "gfx1201"}
"""Name of a GPU by the last byte of the file's flags."""

_LOAD, _NOTE = 1, 4
_RELA, _REL = 4, 9
_SYMBOLS = (2, 11)
_METADATA = 32


class Segment(NamedTuple):
    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    size: int
    memory: int
    align: int


class Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


@dataclass(frozen=True)
class Descriptor:
    """A kernel descriptor, 64 bytes. shared, scratch, arguments: bytes; entry: where its code begins, seen from it;
    resources: the hardware's two words; properties: which registers the kernel wants filled."""

    shared: int
    scratch: int
    arguments: int
    entry: int
    resources1: int
    resources2: int
    properties: int
    preload: int

    @classmethod
    def parse(cls, text: bytes) -> "Descriptor":
        shared, scratch, arguments, _, entry = struct.unpack_from("<IIIIq", text, 0)
        _, first, second, properties, preload = struct.unpack_from("<IIIHH", text, 44)
        return cls(shared, scratch, arguments, entry, first, second, properties, preload)

    @property
    def preloaded(self) -> tuple[int, int]:
        """(offset, count) of the 4-byte words of arguments that the hardware puts into scalar registers."""
        return self.preload >> 7, self.preload & 0x7F

    @property
    def user_registers(self) -> int:
        """Scalar registers that are filled before the numbers of the workgroup."""
        return self.resources2 >> 1 & 0x1F

    @property
    def flushes(self) -> bool:
        """Whether float32 denormals are taken, and given, as zeros."""
        return self.resources1 >> 16 & 3 == 0


class CodeObject:
    """gfx: the GPU; kernels: name -> metadata."""

    def __init__(self, elf: bytes) -> None:
        if elf[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", elf, 18)[0] != 224:
            raise ValueError("this is no code object for an AMD GPU")
        self.elf = elf
        program, sections, flags, _, size, count, section_size, section_count, _ = struct.unpack_from(
            "<QQIHHHHHH", elf, 32
        )
        self.gfx = MACHINES.get(flags & 0xFF, f"machine {flags & 0xFF:#x}")
        self.segments = [Segment(*struct.unpack_from("<IIQQQQQQ", elf, program + i * size)) for i in range(count)]
        places = [sections + i * section_size for i in range(section_count)]
        self.sections = [Section(*struct.unpack_from("<IIQQQQIIQQ", elf, place)) for place in places]
        self.symbols = {
            name: value
            for section in self.sections
            if section.kind in _SYMBOLS
            for name, value, defined in self._symbols_of(section)
            if defined
        }
        self.kernels: dict[str, Any] = {kernel[".name"]: kernel for kernel in self._metadata()["amdhsa.kernels"]}

    def _symbols_of(self, section: Section) -> list[tuple[str, int, bool]]:
        """(name, value, whether it is defined here)."""
        names, found = self.sections[section.link], []
        for place in range(section.offset, section.offset + section.size, 24):
            name, _, _, there, value, _ = struct.unpack_from("<IBBHQQ", self.elf, place)
            begin = names.offset + name
            found.append((self.elf[begin : self.elf.index(b"\0", begin)].decode(), value, bool(there and name)))
        return found

    def _metadata(self) -> Any:
        for segment in self.segments:
            place, end = segment.offset, segment.offset + segment.size
            while segment.kind == _NOTE and place < end:
                name_size, size, kind = struct.unpack_from("<III", self.elf, place)
                begin = place + 12 + (name_size + 3 & ~3)
                if kind == _METADATA and self.elf[place + 12 :].startswith(b"AMDGPU\0"):
                    return message_pack.decode(self.elf[begin : begin + size])
                place = begin + (size + 3 & ~3)
        raise ValueError("the code object has no metadata")

    def descriptor(self, kernel: str) -> tuple[Descriptor, int]:
        """The kernel's descriptor, and its address."""
        address = self.symbols[self.kernels[kernel][".symbol"]]
        place = next(
            segment.offset + address - segment.address
            for segment in self.segments
            if segment.kind == _LOAD and segment.address <= address < segment.address + segment.size
        )
        return Descriptor.parse(self.elf[place : place + 64]), address


class Image:
    """A code object as it lies in memory; `base`: the address there of its address 0."""

    def __init__(self, code: CodeObject) -> None:
        loaded = [segment for segment in code.segments if segment.kind == _LOAD]
        if any(s.kind in (_REL, _RELA) and s.size and code.sections[s.info].flags & 2 for s in code.sections):
            raise Unsupported("code objects with relocations: Triton's have none")
        # Whoever decodes the last instruction looks 16 bytes ahead.
        self.size = (max(segment.address + segment.memory for segment in loaded) + 0xFFF & ~0xFFF) + 0x1000
        self.memory = mmap.mmap(-1, self.size)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for segment in loaded:
            text = code.elf[segment.offset : segment.offset + segment.size]
            self.memory[segment.address : segment.address + segment.size] = text

    def __contains__(self, address: int) -> bool:
        return self.base <= address < self.base + self.size
