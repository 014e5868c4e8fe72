"""Memory of a kernel, and its arguments as it reads them."""

import ctypes
import mmap
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.amd_emulation.errors import EmuError

PAD = 1 << 16


class DeviceBuffer:
    """A copy of some bytes between two pads. A pad that changed was written out of bounds; they hold 0xff, NaN in every
    float format, so that what is read there shows."""

    def __init__(self, data: np.ndarray) -> None:
        self.size = data.nbytes
        self.memory = mmap.mmap(-1, self.size + 2 * PAD)
        self.view = np.frombuffer(self.memory, np.uint8)
        self.view[:] = 0xFF
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAD
        self.bytes = self.view[PAD : PAD + self.size]
        self.bytes[:] = data.reshape(-1).view(np.uint8)

    @property
    def range(self) -> tuple[int, int]:
        """The addresses of the first byte and of the one behind the last."""
        return self.address, self.address + self.size

    def check(self) -> None:
        """Raises where a pad was written."""
        pads = np.concatenate([self.view[:PAD], self.view[PAD + self.size :]]) != 0xFF
        if pads.any():
            raise EmuError(f"{pads.sum()} bytes were written before or behind a buffer of {self.size} bytes")


def packed(kernel: dict[str, Any], size: int, arguments: Sequence[Any]) -> np.ndarray:
    """The arguments as `kernel`'s metadata places them: buffers as addresses, None as 0, numbers as their bytes.

    Behind the kernel's own arguments Triton has pointers to scratch memory, which are null.
    """
    fields = [field for field in kernel.get(".args", []) if not field[".value_kind"].startswith("hidden_")]
    if not 0 <= len(fields) - len(arguments) <= 2:
        raise EmuError(f"the kernel takes {len(fields)} arguments, two of them Triton's own, and got {len(arguments)}")
    text = bytearray(size)
    for field, value in zip(fields, arguments, strict=False):
        offset, width = field[".offset"], field[".size"]
        text[offset : offset + width] = _bytes(value, width)
    return np.frombuffer(bytes(text), np.uint8)


def _bytes(value: Any, width: int) -> bytes:
    if isinstance(value, DeviceBuffer):
        return struct.pack("<Q", value.address)
    if isinstance(value, float):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[width], value)
    return (int(value or 0) & (1 << 8 * width) - 1).to_bytes(width, "little")
