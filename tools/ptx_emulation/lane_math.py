"""Arithmetic over 32 lanes that is more than one numpy call; generated code calls it by these names."""

from typing import Any

import numpy as np

from tools.ptx_emulation import formats
from tools.ptx_emulation.formats import F16, F32, F64, I8, I64, LANES, U8, U16, U32, U64, UNSIGNED, Array, width


def _lanes(value: Any) -> Array:
    return np.broadcast_to(value, (32,))


def _is_signed(dtype: Any) -> bool:
    return np.issubdtype(dtype, np.signedinteger)


def filled(value: Any) -> Array:
    """The same number in all lanes."""
    return np.full(32, value)


def shift_left(values: Array, amounts: Any, bits: int) -> Array:
    amounts = _lanes(amounts).astype(U64)
    dtype = values.dtype.type
    return np.where(amounts >= bits, dtype(0), values << np.minimum(amounts, bits - 1).astype(dtype))


def shift_right(values: Array, amounts: Any, bits: int) -> Array:
    """Of signed numbers the sign moves in."""
    amounts = np.minimum(_lanes(amounts).astype(U64), U64(bits))
    dtype = values.dtype.type
    shifted: Array = values >> np.minimum(amounts, U64(bits - 1)).astype(dtype)
    return shifted if _is_signed(dtype) else np.where(amounts >= bits, dtype(0), shifted)


def divide(a: Any, b: Any) -> Array:
    """Integer division towards zero; all ones where the divisor is zero."""
    a, b = _lanes(a), _lanes(b)
    dtype = a.dtype.type
    divisor = np.where(b == 0, dtype(1), b)
    quotient = a // divisor
    if not _is_signed(dtype):
        return np.where(b == 0, dtype(np.iinfo(dtype).max), quotient)
    rounded_down = (a - quotient * divisor != 0) & ((a < 0) != (divisor < 0))
    quotient = np.where(rounded_down, quotient + dtype(1), quotient)
    return np.where(b == 0, dtype(-1), quotient).astype(dtype)


def remainder(a: Any, b: Any) -> Array:
    """Has the sign of the dividend; the dividend itself where the divisor is zero."""
    a, b = _lanes(a), _lanes(b)
    return np.where(b == 0, a, a - divide(a, b) * b).astype(a.dtype)


def multiply_wide(a: Any, b: Any, dtype: Any) -> Array:
    """The product in a type of twice the width."""
    product: Array = _lanes(a).astype(dtype) * _lanes(b).astype(dtype)
    return product


def multiply_high(a: Any, b: Any) -> Array:
    """The upper half of the product."""
    a, b = _lanes(a), _lanes(b)
    dtype = a.dtype.type
    bits = 8 * width(dtype)
    if bits < 64:
        wide = I64 if _is_signed(dtype) else U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(dtype)
    high = [((int(x) * int(y)) >> 64) & ((1 << 64) - 1) for x, y in zip(a, b, strict=True)]
    return np.array(high, U64).view(dtype)


def fma32(a: Any, b: Any, c: Any) -> Array:
    """float32, through float64."""
    return (np.multiply(a, b, dtype=F64) + c).astype(F32)


def fma16(a: Any, b: Any, c: Any) -> Array:
    """float16, through float64."""
    return (np.asarray(a).astype(F64) * b.astype(F64) + np.asarray(c).astype(F64)).astype(F16)


def bit_field(values: Array, starts: Any, lengths: Any, bits: int) -> Array:
    """bfe: bits [start, start + length), with the sign of the field's last bit if values are signed."""
    signed = np.issubdtype(values.dtype, np.signedinteger)
    full = (1 << bits) - 1
    fields = []
    for value, start, length in zip(values.tolist(), _bytes(starts), _bytes(lengths), strict=True):
        unsigned = value & full
        field = (unsigned >> start) & ((1 << length) - 1) if start < bits else 0
        if signed and length and unsigned >> min(start + length - 1, bits - 1) & 1:
            available = max(min(length, bits - start), 0)
            field |= full & ~((1 << available) - 1)
        fields.append(field & full)
    return np.array(fields, UNSIGNED[bits // 8])


def bit_insert(new: Any, old: Any, starts: Any, lengths: Any, bits: int) -> Array:
    """bfi: the low bits of `new` at [start, start + length) of `old`."""
    full = (1 << bits) - 1
    mixed = []
    for x, y, start, length in zip(_lanes(new), _lanes(old), _bytes(starts), _bytes(lengths), strict=True):
        field = ((1 << length) - 1) << start
        mixed.append((((int(x) << start) & field) | (int(y) & ~field)) & full)
    return np.array(mixed, UNSIGNED[bits // 8])


def _bytes(values: Any) -> list[int]:
    """Bit positions and lengths count modulo 256."""
    low: list[int] = (_lanes(values).astype(I64) & 255).tolist()
    return low


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: bit (a, b, c) of the table, for each bit."""
    result = np.zeros(32, U32)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def permute_bytes(a: Any, b: Any, selectors: Any) -> Array:
    """prmt: each result byte is one of eight, or its sign."""
    a, b, selectors = (np.ascontiguousarray(_lanes(x)) for x in (a, b, selectors))
    source = np.concatenate([a.view(U8).reshape(32, 4), b.view(U8).reshape(32, 4)], 1)
    result = np.empty((32, 4), U8)
    for i in range(4):
        selector = (selectors >> U32(4 * i)) & U32(15)
        chosen = source[LANES, (selector & U32(7)).astype(I64)]
        result[:, i] = np.where(selector & U32(8), (chosen.view(I8) >> 7).view(U8), chosen)
    return result.reshape(-1).view(U32)


def funnel_shift(low: Any, high: Any, amounts: Any, left: bool, wrap: bool) -> Array:
    """shf: half of a shifted 64-bit number."""
    low, high, amounts = (_lanes(x).astype(U64) for x in (low, high, amounts))
    amounts = amounts & U64(31) if wrap else np.minimum(amounts, U64(32))
    both = (high << U64(32)) | low
    return ((both << amounts) >> U64(32) if left else both >> amounts).astype(U32)


def shuffle(mode: str, distance: Any, clamp: Any) -> tuple[Array, Array]:
    """shfl: from which lane each lane reads, and whether that lane is in range."""
    distance = _lanes(distance).astype(I64) & 31
    clamp = _lanes(clamp).astype(I64)
    segment = (clamp >> 8) & 31
    last = (LANES & segment) | (clamp & 31 & ~segment)
    if mode == "up":
        source = LANES - distance
        in_range = source >= last
    else:
        if mode == "down":
            source = LANES + distance
        elif mode == "bfly":
            source = LANES ^ distance
        else:
            source = (LANES & segment) | (distance & ~segment)
        in_range = source <= last
    return np.where(in_range, source, LANES), in_range


_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def float_to_int(values: Any, rounding: str, dtype: Any) -> Array:
    """Saturates; NaN becomes zero."""
    rounded = _ROUNDINGS[rounding](np.asarray(values).astype(F64))
    limits = np.iinfo(dtype)
    nan = np.isnan(rounded)
    low, high = rounded <= float(limits.min), rounded >= float(limits.max)
    inside = np.where(nan | low | high, 0, rounded).astype(dtype)
    saturated = np.where(low, dtype(limits.min), np.where(high, dtype(limits.max), inside))
    return np.where(nan, dtype(0), saturated)


def pack2(high: Array, low: Array) -> Array:
    """Two 16-bit numbers in one register."""
    packed: Array = (high.astype(U32) << U32(16)) | low.astype(U32)
    return packed


def low_half(pairs: Array) -> Array:
    return (pairs & U32(0xFFFF)).astype(U16)


def high_half(pairs: Array) -> Array:
    return (pairs >> U32(16)).astype(U16)


def pack_fp8(high: Array, low: Array, encode: Any) -> Array:
    """Two FP8 numbers in one 16-bit register."""
    packed: Array = (encode(high).astype(U16) << U16(8)) | encode(low).astype(U16)
    return packed


def unpack_fp8(pairs: Array, table: Array) -> Array:
    """Two FP8 numbers as a pair of float16."""
    low, high = table[(pairs & U16(255)).astype(I64)], table[(pairs >> U16(8)).astype(I64)]
    return pack2(high.astype(F16).view(U16), low.astype(F16).view(U16))


def to_tf32(values: Array) -> Array:
    """Rounded to nearest, ties away from zero."""
    bits = np.ascontiguousarray(values).view(U32)
    rounded: Array = (bits + U32(0x1000)) & U32(0xFFFFE000)
    return rounded


def bit_property(values: Array, what: str) -> Array:
    """popc, clz, bfind or brev."""
    bits = values.dtype.itemsize * 8
    unsigned = [int(value) & ((1 << bits) - 1) for value in values.tolist()]
    if what == "popc":
        return np.array([value.bit_count() for value in unsigned], U32)
    if what == "clz":
        return np.array([bits - value.bit_length() for value in unsigned], U32)
    if what == "bfind":
        return np.array([(value.bit_length() - 1) & 0xFFFFFFFF for value in unsigned], U32)
    return np.array([int(f"{value:0{bits}b}"[::-1], 2) for value in unsigned], UNSIGNED[bits // 8])


def relu(values: Array) -> Array:
    return np.where(values > 0, values, values.dtype.type(0))


_FUNCTIONS = (
    *(filled, shift_left, shift_right, divide, remainder, multiply_wide, multiply_high, fma32, fma16),
    *(bit_field, bit_insert, logic3, permute_bytes, funnel_shift, shuffle, float_to_int),
    *(pack2, low_half, high_half, pack_fp8, unpack_fp8, to_tf32, bit_property, relu),
    *(formats.bf2f, formats.f2bf, formats.f2bf_rz, formats.f2e4m3, formats.f2e5m2),
)

# All names that generated code may use, beside those of registers and constants.
NAMESPACE: dict[str, Any] = {
    "np": np,
    **{name: dtype for dtype, name in formats.TYPE_NAMES.items()},
    **{function.__name__: function for function in _FUNCTIONS},
    "E4M3": formats.E4M3,
    "E5M2": formats.E5M2,
}
