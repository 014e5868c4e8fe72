"""wgmma: asynchronous matrix products of a warpgroup; each warp computes its own 16 rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tools.ptx_emulation.access import Access, Effect
from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.formats import BOOL, ELEMENT_BYTES, F16, F32, I64, U64, Array, to_float32
from tools.ptx_emulation.fragments import accumulator_matrix, accumulator_registers, left_matrix, product_shape
from tools.ptx_emulation.machine import POISON, Warp
from tools.ptx_emulation.memory import SHARED_BASE, Mask, check_fenced, need_all_lanes
from tools.ptx_emulation.parse import Instruction, Integer, Operand, Register, Vector


@dataclass(frozen=True)
class Product:
    """What one wgmma instruction says.

    columns, depth: N and K.
    kind, a_kind, b_kind: formats of the accumulator and the operands.
    registers: of the accumulator; a_registers: of A, None if it lies in shared memory.
    negated: the product is subtracted.
    a_transposed, b_transposed: the operand runs along M or N in shared memory, not along K.
    """

    columns: int
    depth: int
    kind: str
    a_kind: str
    b_kind: str
    registers: tuple[int, ...]
    a_registers: tuple[int, ...] | None
    negated: bool
    a_transposed: bool
    b_transposed: bool
    instruction: Instruction
    written: frozenset[int]
    read: frozenset[int]


class Issued:
    """A product under way: descriptors of its operands, and whether it adds to the accumulator."""

    __slots__ = ("a", "accumulates", "b", "done", "product")

    def __init__(self, product: Product, a: int | None, b: int, accumulates: bool) -> None:
        self.product, self.a, self.b, self.accumulates = product, a, b, accumulates
        self.done = False


class Accumulator:
    """The sum so far, and how many products that add to it have not been waited for."""

    __slots__ = ("matrix", "waiting")

    def __init__(self, matrix: Array | None) -> None:
        self.matrix, self.waiting = matrix, 0


class _Places(NamedTuple):
    """Where an operand lies: element numbers (rows x K), its first and last byte, its 16-byte chunks."""

    elements: Array
    low: int
    high: int
    chunks: Array


@lru_cache(maxsize=20000)
def _places(descriptor: int, rows: int, first_row: int, depth: int, size: int, transposed: bool) -> _Places:
    """Reads a descriptor of a matrix in shared memory; all offsets are relative to its start."""
    start = (descriptor & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    stride = ((descriptor >> 32) & 0x3FFF) << 4
    base_offset = (descriptor >> 49) & 7
    span = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    row = (np.arange(rows, dtype=I64) + first_row)[:, None]
    k = np.arange(depth, dtype=I64)[None, :]
    # Eight rows of `span` bytes are contiguous; the long side is cut into such rows. Without a swizzle, strides differ.
    long, short = (row * size, k) if transposed else (k * size, row)
    if span == 16:
        long_step, short_step = (stride, leading) if transposed else (leading, stride)
        address = long // 16 * long_step + long % 16 + short % 8 * 16 + short // 8 * short_step
    elif transposed:
        address = long // span * leading + long % span + short % 8 * span + short // 8 * stride
    else:
        address = long + short % 8 * span + short // 8 * stride
    address = address + start
    if span > 16:
        address = address ^ ((((address >> 7) - base_offset) & (span // 16 - 1)) << 4)
    address = address - SHARED_BASE
    return _Places(address // size, int(address.min()), int(address.max()) + size, np.unique(address >> 4))


def _shared_operand(
    warp: Warp, product: Product, name: str, descriptor: int, rows: int, first_row: int, kind: str, transposed: bool
) -> Array:
    """Rows x K in float32."""
    size = ELEMENT_BYTES[kind]
    places = _places(descriptor, rows, first_row, product.depth, size, transposed)
    cta, where = warp.cta, product.instruction.where()
    if places.low < 0 or places.high > cta.shared_bytes:
        reach = f"{places.low}..{places.high} of {cta.shared_bytes}"
        raise EmuError(f"wgmma operand {name} outside shared memory: {reach} ({where})")
    if (descriptor >> 49) & 7:
        message = f"non-zero base offset is modelled but unverified: {where}"
        warp.launch.report.warn("wgmma-base-offset", message)
    check_fenced(cta, places.chunks, product.instruction, f"wgmma operand {name}")
    return to_float32(cta.views[size][places.elements], kind)


def perform(warp: Warp, issued: Issued) -> None:
    """Computes a product that was issued."""
    product = issued.product
    issued.done = True
    if issued.a is None:
        left = left_matrix([warp.registers[i] for i in product.a_registers or ()], product.a_kind)
    else:
        first_row = 16 * (warp.index % 4)
        left = _shared_operand(warp, product, "A", issued.a, 16, first_row, product.a_kind, product.a_transposed)
    right = _shared_operand(warp, product, "B", issued.b, product.columns, 0, product.b_kind, product.b_transposed)
    result = np.matmul(left, right.T)
    if product.negated:
        result = -result
    accumulator = warp.accumulators[product.registers]
    accumulator.matrix = result + accumulator.matrix if issued.accumulates else result
    if product.kind == "f16":
        accumulator.matrix = accumulator.matrix.astype(F16).astype(F32)


def _finish(warp: Warp, issued: Issued) -> None:
    """The last product of an accumulator writes its registers."""
    product = issued.product
    accumulator = warp.accumulators[product.registers]
    if not issued.done:
        perform(warp, issued)
    accumulator.waiting -= 1
    if accumulator.waiting == 0:
        if warp.launch.late("wgmma"):
            _write(warp, product, accumulator)
        del warp.accumulators[product.registers]


def _write(warp: Warp, product: Product, accumulator: Accumulator) -> None:
    """The accumulator, back into its registers."""
    assert accumulator.matrix is not None
    for index, value in zip(product.registers, accumulator_registers(accumulator.matrix, product.kind), strict=True):
        warp.registers[index] = value


def _wait(left: int) -> Effect:
    """wait_group: products are finished in the order of their groups."""

    def run(warp: Warp, mask: Mask) -> None:
        while len(warp.wgmma_groups) > left:
            for issued in warp.wgmma_groups.pop(0):
                _finish(warp, issued)
        products = [issued.product for group in (*warp.wgmma_groups, warp.wgmma_open) for issued in group]
        warp.in_flight = frozenset().union(*(product.written for product in products))
        warp.in_flight_a = frozenset().union(*(product.read for product in products))

    return run


def _commit(warp: Warp, mask: Mask) -> None:
    warp.wgmma_groups.append(warp.wgmma_open)
    warp.wgmma_open = []


def _registers(operand: Operand) -> tuple[int, ...]:
    found = operand.items if isinstance(operand, Vector) else ()
    return tuple(item.index for item in found if isinstance(item, Register))


def _product(access: Access) -> Product:
    """Reads mma_async: D, A, B, scale-d, signs of A and B, and which of them are transposed."""
    _, columns, depth = product_shape(access)
    kind, a_kind, b_kind = access.parts[5:8]
    if kind not in ("f32", "f16") or a_kind not in ELEMENT_BYTES:
        raise access.unsupported()
    d, a, _, *rest = access.operands
    registers = _registers(d)
    if len(registers) != columns // (2 if kind == "f32" else 4):
        raise EmuError(f"{len(registers)} registers of an accumulator ({access.instruction.where()})")
    constants = [operand.value for operand in rest[1:] if isinstance(operand, Integer)]
    signs, transposed = (constants[:2] or [1, 1]), [bool(value) for value in constants[2:]]
    a_registers = _registers(a) if isinstance(a, Vector) else None
    if a_registers is not None:
        transposed.insert(0, False)
    a_transposed, b_transposed = (*transposed, False, False)[:2]
    if (a_transposed or b_transposed) and ELEMENT_BYTES[a_kind] != 2:
        raise Unsupported(f"transposed wgmma operand of {ELEMENT_BYTES[a_kind]}-byte elements")
    return Product(
        *(columns, depth, kind, a_kind, b_kind, registers, a_registers),
        *(signs[0] * signs[1] < 0, a_transposed, b_transposed, access.instruction),
        *(frozenset(registers), frozenset(a_registers or ())),
    )


def _multiply(access: Access) -> Effect:
    """mma_async."""
    product = _product(access)
    access.writes += product.registers
    access.reads += product.registers + (product.a_registers or ())
    a, b = access.operands[1:3]
    read_a = access.reader(a, U64) if product.a_registers is None else None
    read_b = access.reader(b, U64)
    read_scale = access.reader(access.operands[3], BOOL) if len(access.operands) > 3 else None
    where = access.instruction.where()

    def run(warp: Warp, mask: Mask) -> None:
        need_all_lanes(mask, product.instruction)
        warp.launch.report.count("wgmma")
        accumulates = True
        if read_scale is not None:
            scale = read_scale(warp)
            accumulates = bool(scale[0])
            if scale.any() != scale.all():
                raise EmuError(f"scale-d not uniform ({where})")
        issued = Issued(product, None if read_a is None else int(read_a(warp)[0]), int(read_b(warp)[0]), accumulates)
        _issue(warp, issued)

    return run


def _issue(warp: Warp, issued: Issued) -> None:
    """The accumulator reads as NaN until the product is waited for."""
    product = issued.product
    accumulator = warp.accumulators.get(product.registers)
    if accumulator is None:
        if warp.in_flight & product.written:
            warp.launch.report.warn("wgmma-accumulator-overlap", product.instruction.where())
        start = None
        if issued.accumulates:
            start = accumulator_matrix([warp.registers[i] for i in product.registers], product.kind)
        accumulator = warp.accumulators[product.registers] = Accumulator(start)
    accumulator.waiting += 1
    if warp.launch.late("wgmma"):
        for index in product.registers:
            warp.registers[index] = POISON
    else:
        perform(warp, issued)
        _write(warp, product, accumulator)
    warp.wgmma_open.append(issued)
    warp.in_flight |= product.written
    warp.in_flight_a |= product.read


def _wgmma(access: Access) -> Effect:
    """wgmma, in all its forms."""
    form = access.parts[1]
    if form == "fence":
        return lambda warp, mask: None
    if form == "commit_group":
        return _commit
    if form == "wait_group":
        return _wait(access.number(access.operands[0]))
    if form != "mma_async" or "sp" in access.parts:
        raise access.unsupported()
    return _multiply(access)


EFFECTS: dict[str, Callable[[Access], Effect]] = {"wgmma": _wgmma}
