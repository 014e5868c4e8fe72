"""Loads, stores, atomics and the matrix loads and stores of shared memory."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.ptx_emulation.access import Access, Effect, items
from tools.ptx_emulation.errors import Unsupported
from tools.ptx_emulation.formats import F16, F32, LANES, U16, U32, UNSIGNED, Array, bf2f, f2bf, width
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask, active, load, need_all_lanes, resolve, shared_offsets, store
from tools.ptx_emulation.parse import Discard

_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _load(access: Access) -> Effect:
    """ld."""
    if access.parts[-1] == "b128":
        raise access.unsupported()
    dtype, space, instruction = access.type(), access.space(), access.instruction
    addresses = access.addresses(access.operands[1])
    writers = [access.writer(item, dtype) for item in items(access.operands[0])]
    size, count = width(dtype), len(writers)

    def run(warp: Warp, mask: Mask) -> None:
        values = load(warp, addresses(warp), size, count, mask, space, instruction)
        for write, value in zip(writers, values, strict=True):
            write(warp, value, mask)

    return run


def _store(access: Access) -> Effect:
    """st."""
    if access.parts[-1] == "b128":
        raise access.unsupported()
    dtype, space, instruction = access.type(), access.space(), access.instruction
    addresses = access.addresses(access.operands[0])
    readers = [access.reader(item, dtype) for item in items(access.operands[1])]
    size = width(dtype)
    unsigned = UNSIGNED[size]

    def run(warp: Warp, mask: Mask) -> None:
        values = [read(warp).view(unsigned) for read in readers]
        store(warp, addresses(warp), size, mask, space, instruction, values)

    return run


def _atomic(access: Access) -> Effect:
    """atom and red: lanes take turns in their order."""
    if "async" in access.parts:
        raise access.unsupported()
    instruction, space, dtype = access.instruction, access.space(), access.type()
    operands = list(access.operands)
    target = operands.pop(0) if access.parts[0] == "atom" else Discard()
    addresses = access.addresses(operands[0])
    operation = access.one_of(_ATOMICS)
    sources = [access.reader(item, dtype) for item in items(operands[1])]
    swaps = [access.reader(item, dtype) for item in items(operands[2])] if operation == "cas" else sources
    size, count = width(dtype), len(sources)
    writers = [access.writer(item, dtype) for item in items(target)]
    combine = _combination(operation, access.parts[-1], dtype)

    def run(warp: Warp, mask: Mask) -> None:
        places = addresses(warp)
        values = [read(warp) for read in sources]
        swapped = [read(warp) for read in swaps]
        before: list[Array] = [np.zeros(32, dtype) for _ in range(count)]
        for lane in active(mask):
            views, offset = resolve(warp, int(places[lane]), size * count, space, instruction)
            view = views[size].view(dtype)
            for i in range(count):
                old = view[offset // size + i]
                before[i][lane] = old
                view[offset // size + i] = combine(old, values[i][lane], swapped[i][lane])
        warp.launch.version += 1
        for write, old in zip(writers, before, strict=False):
            write(warp, old, mask)

    return run


def _combination(operation: str, kind: str, dtype: Any) -> Callable[[Any, Any, Any], Any]:
    """From the old number, the operand and, of cas, the one to swap in, to the new number."""
    if kind in ("bf16", "bf16x2", "f16x2"):
        return _packed_combination(operation, kind, dtype)
    table: dict[str, Callable[[Any, Any, Any], Any]] = {
        "add": lambda old, x, y: old + x,
        "min": lambda old, x, y: min(old, x),
        "max": lambda old, x, y: max(old, x),
        "and": lambda old, x, y: old & x,
        "or": lambda old, x, y: old | x,
        "xor": lambda old, x, y: old ^ x,
        "exch": lambda old, x, y: x,
        "cas": lambda old, x, y: y if old == x else old,
        "inc": lambda old, x, y: dtype(0) if old >= x else old + dtype(1),
        "dec": lambda old, x, y: x if old == 0 or old > x else old - dtype(1),
    }
    return table[operation]


def _packed_combination(operation: str, kind: str, dtype: Any) -> Callable[[Any, Any, Any], Any]:
    """Numbers that are kept as bits, in float32."""
    functions: dict[str, Any] = {"add": np.add, "min": np.fmin, "max": np.fmax}
    if operation not in functions:
        raise Unsupported(f"atomic {operation} of {kind}")
    function = functions[operation]

    def combine(old: Any, x: Any, _: Any) -> Any:
        both = np.array([old, x])
        if kind == "f16x2":
            halves = both.view(F16).astype(F32).reshape(2, -1)
            return function(halves[0], halves[1]).astype(F16).view(dtype)[0]
        halves = bf2f(both.view(U16)).reshape(2, -1)
        return f2bf(function(halves[0], halves[1])).view(dtype)[0]

    return combine


# Which row and which pair of columns of an 8x8 matrix a lane holds.
_ROW, _PAIR = LANES // 4, LANES % 4


def _matrices(access: Access) -> tuple[int, bool]:
    """How many 8x8 matrices, and whether they are transposed."""
    if "m8n8" not in access.parts or access.parts[-1] != "b16":
        raise access.unsupported()
    return int(access.one_of(("x1", "x2", "x4"))[1]), "trans" in access.parts


def _load_matrices(access: Access) -> Effect:
    """ldmatrix."""
    count, transposed = _matrices(access)
    addresses = access.addresses(access.operands[1])
    writers = [access.writer(item, U32) for item in items(access.operands[0])]
    instruction = access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        need_all_lanes(mask, instruction)
        rows = shared_offsets(warp, addresses(warp)[: 8 * count], 16, None, instruction).reshape(count, 8)
        warp.touches_shared(mask)
        for i, write in enumerate(writers):
            if transposed:
                view, row = warp.cta.views[2], rows[i] >> 1
                low, high = view[row[2 * _PAIR] + _ROW], view[row[2 * _PAIR + 1] + _ROW]
                write(warp, low.astype(U32) | (high.astype(U32) << U32(16)), mask)
            else:
                write(warp, warp.cta.views[4][(rows[i][_ROW] >> 2) + _PAIR], mask)

    return run


def _store_matrices(access: Access) -> Effect:
    """stmatrix."""
    count, transposed = _matrices(access)
    addresses = access.addresses(access.operands[0])
    readers = [access.reader(item, U32) for item in items(access.operands[1])]
    instruction = access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        need_all_lanes(mask, instruction)
        rows = shared_offsets(warp, addresses(warp)[: 8 * count], 16, None, instruction).reshape(count, 8)
        warp.touches_shared(mask)
        for i, read in enumerate(readers):
            values = read(warp)
            if transposed:
                view, row = warp.cta.views[2], rows[i] >> 1
                view[row[2 * _PAIR] + _ROW] = (values & U32(0xFFFF)).astype(U16)
                view[row[2 * _PAIR + 1] + _ROW] = (values >> U32(16)).astype(U16)
            else:
                warp.cta.views[4][(rows[i][_ROW] >> 2) + _PAIR] = values
        warp.cta.unfenced[rows >> 4] = warp.index + 1
        warp.launch.version += 1

    return run


EFFECTS: dict[str, Callable[[Access], Effect]] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
}
