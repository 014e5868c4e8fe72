"""Matrices in the registers of a warp: the fragments of mma.sync m16n8 and of a warp's 16 rows of wgmma."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.ptx_emulation.access import Access, Effect, items
from tools.ptx_emulation.formats import (
    ELEMENT_BYTES,
    F16,
    F32,
    I32,
    I64,
    U32,
    UNSIGNED,
    Array,
    to_float32,
)
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask, need_all_lanes


def left_matrix(registers: list[Array], kind: str) -> Array:
    """A, 16 x K, in float32."""
    size = ELEMENT_BYTES[kind]
    raw = np.stack(registers).view(UNSIGNED[size])
    # Half of K, half of the rows, row, lane of the row, element.
    parts = to_float32(raw, kind).reshape(-1, 2, 8, 4, 4 // size)
    return np.ascontiguousarray(parts.transpose(1, 2, 0, 3, 4)).reshape(16, -1)


def right_matrix(registers: list[Array], kind: str) -> Array:
    """B, K x 8, in float32."""
    size = ELEMENT_BYTES[kind]
    raw = np.stack(registers).view(UNSIGNED[size])
    # Half of K, column, lane of the column, element.
    parts = to_float32(raw, kind).reshape(-1, 8, 4, 4 // size)
    return np.ascontiguousarray(parts.transpose(0, 2, 3, 1)).reshape(-1, 8)


def accumulator_matrix(registers: list[Array], kind: str) -> Array:
    """C or D, 16 x N: float32 from f32 and f16, int32 from s32."""
    parts: Array
    raw = np.stack(registers)
    if kind == "f16":
        # Eight columns, half of the rows, row, lane, element.
        parts = raw.view(F16).astype(F32).reshape(-1, 2, 8, 4, 2)
        return np.ascontiguousarray(parts.transpose(1, 2, 0, 3, 4)).reshape(16, -1)
    # Eight columns, half of the rows, element, row, lane.
    dtype: Any = F32 if kind == "f32" else I32
    parts = raw.view(dtype).reshape(-1, 2, 2, 8, 4)
    return np.ascontiguousarray(parts.transpose(1, 3, 0, 4, 2)).reshape(16, -1)


def accumulator_registers(matrix: Array, kind: str) -> list[Array]:
    """The inverse, as 32-bit registers."""
    # Half of the rows, row, eight columns, lane, element.
    parts = matrix.reshape(2, 8, -1, 4, 2)
    ordered = parts.transpose(2, 0, 1, 3, 4).astype(F16) if kind == "f16" else parts.transpose(2, 0, 4, 1, 3)
    return list(np.ascontiguousarray(ordered).view(U32).reshape(-1, 32))


def product_shape(access: Access) -> tuple[int, int, int]:
    """(M, N, K) of a matrix instruction."""
    for part in access.parts:
        sizes = part.removeprefix("m").replace("n", " ").replace("k", " ").split()
        if part.startswith("m") and len(sizes) == 3 and all(size.isdigit() for size in sizes):
            rows, columns, depth = map(int, sizes)
            return rows, columns, depth
    raise access.unsupported()


_ACCUMULATORS: dict[str, Any] = {"f32": F32, "s32": I32, "f16": U32}


def _multiply(access: Access) -> Effect:
    """mma.sync."""
    parts = access.parts
    if product_shape(access)[:2] != (16, 8) or "sync" not in parts or "sp" in parts or "row" not in parts:
        raise access.unsupported()
    kinds = [part for part in parts[parts.index("col") + 1 :] if part != "satfinite"]
    d_kind, a_kind, b_kind, c_kind = kinds[:4]
    if a_kind not in ELEMENT_BYTES or d_kind not in _ACCUMULATORS:
        raise access.unsupported()
    d, a, b, c = access.operands[:4]
    read_a = [access.reader(item, U32) for item in items(a)]
    read_b = [access.reader(item, U32) for item in items(b)]
    read_c = [access.reader(item, _ACCUMULATORS[c_kind]) for item in items(c)]
    writers = [access.writer(item, _ACCUMULATORS[d_kind]) for item in items(d)]
    instruction = access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        need_all_lanes(mask, instruction)
        left = left_matrix([read(warp) for read in read_a], a_kind)
        right = right_matrix([read(warp) for read in read_b], b_kind)
        added = accumulator_matrix([read(warp) for read in read_c], c_kind)
        if d_kind == "s32":
            product = (np.matmul(left.astype(I64), right.astype(I64)) + added).astype(I32)
        else:
            product = np.matmul(left, right) + added
        for write, value in zip(writers, accumulator_registers(product, d_kind), strict=True):
            write(warp, value, mask)
        warp.launch.report.count("mma")

    return run


EFFECTS: dict[str, Callable[[Access], Effect]] = {"mma": _multiply}
