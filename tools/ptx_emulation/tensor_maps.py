"""Tensor maps: what a TMA instruction knows about a tensor in global memory and a box in shared memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.ptx_emulation.errors import Unsupported
from tools.ptx_emulation.formats import I64, PTX_TYPES, UNSIGNED, Array, bf2f, f2bf

_SWIZZLES = (0, 32, 64, 128)
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class TensorMap:
    """An array as TMA sees it; dimensions are given outermost first, strides in elements.

    Args:
        array: C-contiguous; kernels change it in place.
        block: the box of one TMA instruction, which may be smaller than the tile of a kernel.
        swizzle: bytes of a swizzled row in shared memory: 0, 32, 64 or 128.
        shape: the array's by default.
        strides: of a dense tensor of that shape by default.
        dtype: what reductions add up, "bf16", "f32", ...; the array's by default.
        elem_size: bytes of an element; the array's by default.

    Raises:
        ValueError: the hardware takes no such map.
    """

    def __init__(
        self,
        array: Array,
        block: Sequence[int],
        swizzle: int = 128,
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        dtype: str | None = None,
        elem_size: int | None = None,
    ) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("array: need C-contiguous")
        self.element_bytes = elem_size or array.dtype.itemsize
        self.shape = tuple(array.shape if shape is None else shape)
        self.strides = _dense(self.shape) if strides is None else tuple(strides)
        self.block = tuple(block)
        self.swizzle = swizzle
        self.dtype = dtype or {"f": "f", "u": "u", "i": "s"}[array.dtype.kind] + str(8 * self.element_bytes)
        flat = array.reshape(-1).view(UNSIGNED[self.element_bytes])
        self._check(flat.size)
        byte_strides = [stride * self.element_bytes for stride in self.strides]
        self._view = np.lib.stride_tricks.as_strided(flat, self.shape, byte_strides)
        self.box_bytes = int(np.prod(self.block)) * self.element_bytes
        self._chunks: dict[int, Array] = {}

    def _check(self, elements: int) -> None:
        """What the driver would refuse."""
        if self.strides[-1] != 1:
            raise ValueError(f"strides: got {self.strides}, need 1 as the last")
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        if last >= elements:
            raise ValueError(f"shape {self.shape} and strides {self.strides} reach beyond the array")
        if any(stride * self.element_bytes % 16 for stride in self.strides[:-1]):
            raise ValueError(f"strides: got {self.strides}, need multiples of 16 bytes")
        if self.swizzle not in _SWIZZLES:
            raise ValueError(f"swizzle: got {self.swizzle}, need one of {_SWIZZLES}")
        row = self.block[-1] * self.element_bytes
        if row % 16 or (self.swizzle and row > self.swizzle):
            raise ValueError(f"block: rows of {row} bytes do not fit a swizzle of {self.swizzle}")
        if not all(1 <= length <= 256 for length in self.block):
            raise ValueError(f"block: got {self.block}, need 1 to 256 in each dimension")

    @classmethod
    def from_meta(cls, array: Array, meta: dict[str, Any], dtype: str | None = None, **options: Any) -> "TensorMap":
        """The map that Triton would make; `meta`: an entry of `kernel.metadata.tensordesc_meta`."""
        swizzle = _SWIZZLES[meta["swizzle"]]
        return cls(array, meta["block_size"], swizzle, dtype=dtype, elem_size=meta["elem_size"], **options)

    def _inside(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The part of a box that lies in the tensor, in the box and in the tensor; None: there is none."""
        in_box, in_tensor = [], []
        for first, extent, length in zip(corner, self.block, self.shape, strict=True):
            low, high = max(first, 0), min(first + extent, length)
            if low >= high:
                return None
            in_box.append(slice(low - first, high - first))
            in_tensor.append(slice(low, high))
        return tuple(in_box), tuple(in_tensor)

    def read_box(self, corner: Sequence[int]) -> Array:
        """Elements of a box; zeros outside the tensor."""
        box = np.zeros(self.block, UNSIGNED[self.element_bytes])
        inside = self._inside(corner)
        if inside:
            box[inside[0]] = self._view[inside[1]]
        return box

    def write_box(self, corner: Sequence[int], box: Array, reduction: str | None = None) -> None:
        """Writes or adds what lies inside the tensor."""
        inside = self._inside(corner)
        if inside is None:
            return
        new = box[inside[0]]
        if reduction is not None:
            new = self._reduced(self._view[inside[1]], new, reduction)
        self._view[inside[1]] = new

    def _reduced(self, old: Array, new: Array, reduction: str) -> Array:
        """Old and new numbers combined, as bits."""
        combine = REDUCTIONS[reduction]
        old, new = np.ascontiguousarray(old), np.ascontiguousarray(new)
        if self.dtype == "bf16":
            return f2bf(combine(bf2f(old), bf2f(new)))
        if self.dtype not in PTX_TYPES:
            raise Unsupported(f"TMA reduction of {self.dtype}")
        dtype = PTX_TYPES[self.dtype]
        return np.ascontiguousarray(combine(old.view(dtype), new.view(dtype))).view(UNSIGNED[self.element_bytes])

    def chunks(self, offset: int) -> Array:
        """Where a box at this byte of shared memory lies: 16-byte chunk numbers, in the box's order."""
        phase = offset % 1024
        numbers = self._chunks.get(phase)
        if numbers is None:
            addresses = (np.arange(self.box_bytes // 16, dtype=I64) << 4) + phase
            numbers = (_swizzled(addresses, self.swizzle) >> 4) - (phase >> 4)
            self._chunks[phase] = numbers
        return numbers + (offset >> 4)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.insert(0, step)
        step *= length
    return tuple(strides)


def _swizzled(addresses: Array, span: int) -> Array:
    """XOR of address bits 4 to 6 with bits 7 to 9, as far as the swizzle reaches."""
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    return addresses ^ (((addresses >> 7) & mask) << 4) if mask else addresses
