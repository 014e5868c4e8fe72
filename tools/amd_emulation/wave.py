"""The registers of a wave, and what it may touch."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.amd_emulation.errors import EmuError

EXEC = 126
PROGRAM_COUNTER = 256
INLINE_CONSTANTS = 128
VECTORS = 256
"""Numbers of operands from here on are vector registers; below, scalar ones, in which the emulator keeps inline
constants too."""
LITERAL = 255


def bits(word: int, high: int, low: int) -> int:
    """Bits `low` to `high` of an instruction."""
    return word >> low & (1 << high - low + 1) - 1


def signed_bits(word: int, high: int, low: int) -> int:
    value, width = bits(word, high, low), high - low + 1
    return value - (1 << width) if value >> width - 1 else value


class Wave:
    """Arrays over the emulator's own registers: scalars (index,), vectors and accumulators (index, lane).

    lds: the workgroup's shared memory, of which `lds_size` bytes are given out; ranges: addresses of memory that the
    kernel may read and write; fnuz: whether 8-bit floats are of the format without negative zero; saturates: whether
    16-bit and 8-bit floats end at the largest number instead of infinity.
    """

    def __init__(
        self, state: Any, lds: np.ndarray, lds_size: int, arch: str, ranges: Sequence[tuple[int, int]], fnuz: bool
    ) -> None:
        self.lanes = 64 if arch == "cdna" else 32
        self.arch, self.lds, self.lds_size, self.ranges, self.fnuz = arch, lds, lds_size, ranges, fnuz
        self.scalars = np.frombuffer(state._sgpr_mv, np.uint32)
        self.vectors = np.frombuffer(state._vgpr_mv, np.uint32).reshape(256, self.lanes)
        self.accumulators = self.vectors
        if arch == "cdna":
            memory = state.accvgpr_buf.as_memoryview(force_zero_copy=True).cast("I")
            self.accumulators = np.frombuffer(memory, np.uint32).reshape(256, self.lanes)
        self.saturates = False
        self.m0 = 124 if arch == "cdna" else 125
        self._places = np.arange(self.lanes, dtype=np.uint64)

    def active(self) -> np.ndarray:
        """Which lanes are on."""
        mask = int(self.scalars[EXEC])
        if self.lanes == 64:
            mask |= int(self.scalars[EXEC + 1]) << 32
        return (np.uint64(mask) >> self._places & np.uint64(1)).astype(bool)

    def active_lanes(self) -> list[int]:
        return [int(lane) for lane in np.nonzero(self.active())[0]]

    def set_active(self, lanes: np.ndarray) -> None:
        mask = sum(1 << int(lane) for lane in np.nonzero(lanes)[0])
        self.scalars[EXEC] = mask & 0xFFFFFFFF
        if self.lanes == 64:
            self.scalars[EXEC + 1] = mask >> 32

    @property
    def counter(self) -> int:
        """The address of the next instruction."""
        return int(self.scalars[PROGRAM_COUNTER]) | int(self.scalars[PROGRAM_COUNTER + 1]) << 32

    @counter.setter
    def counter(self, address: int) -> None:
        self.scalars[PROGRAM_COUNTER], self.scalars[PROGRAM_COUNTER + 1] = address & 0xFFFFFFFF, address >> 32

    def file(self, accumulators: int) -> np.ndarray:
        return self.accumulators if accumulators else self.vectors

    def operand(self, number: int, accumulators: int = 0, count: int = 1) -> np.ndarray:
        """`count` registers of a 9-bit source operand, (count, lanes)."""
        if number >= VECTORS:
            return self.file(accumulators)[number - VECTORS : number - VECTORS + count]
        if number >= INLINE_CONSTANTS:
            return np.broadcast_to(self.scalars[number], (count, self.lanes))
        return np.broadcast_to(self.scalars[number : number + count, None], (count, self.lanes))

    def write(self, register: int, values: np.ndarray, accumulators: int = 0) -> None:
        """(count, lanes) to active lanes."""
        active, file = self.active(), self.file(accumulators)
        for place, row in enumerate(values.astype(np.uint32)):
            file[register + place][active] = row[active]

    def load(self, address: int, size: int) -> bytes:
        self._check(address, size)
        return ctypes.string_at(address, size)

    def store(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        ctypes.memmove(address, data, len(data))

    def _check(self, address: int, size: int) -> None:
        if not any(begin <= address and address + size <= end for begin, end in self.ranges):
            raise EmuError(f"access of {size} bytes at {address:#x}: not inside any buffer of the kernel")

    def check_all(self, addresses: np.ndarray, size: int) -> None:
        """As `load` and `store`, for what the emulator is about to do itself."""
        inside = np.zeros(addresses.shape, bool)
        for begin, end in self.ranges:
            inside |= (addresses >= begin) & (addresses + size <= end)
        for address in addresses[~inside][:1]:
            self._check(int(address), size)

    def shared(self, address: int, size: int) -> np.ndarray:
        """Bytes of LDS."""
        self.check_shared(address, size)
        return self.lds[address : address + size]

    def check_shared(self, address: int, size: int) -> None:
        if not 0 <= address <= self.lds_size - size:
            raise EmuError(f"LDS access of {size} bytes at {address:#x}: the workgroup has {self.lds_size:#x}")
