"""Number types of PTX, and the formats that numpy lacks: bfloat16, TF32 and the two kinds of FP8."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tools.ptx_emulation.errors import Unsupported

Array: TypeAlias = npt.NDArray[Any]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
BOOL = np.bool_

LANES = np.arange(32, dtype=I64)
UNSIGNED: dict[int, Any] = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED: dict[int, Any] = {1: I8, 2: I16, 4: I32, 8: I64}
SIGNED_TYPES = (I8, I16, I32, I64)
FLOAT_TYPES = (F16, F32, F64)

# bfloat16 and packed pairs are kept as bits.
PTX_TYPES: dict[str, Any] = {
    name: dtype
    for dtype, names in (
        (U8, "b8 u8"),
        (U16, "b16 u16 bf16 e4m3x2 e5m2x2"),
        (U32, "b32 u32 tf32 f16x2 bf16x2 u16x2 s16x2"),
        (U64, "b64 u64"),
        *((I8, "s8"), (I16, "s16"), (I32, "s32"), (I64, "s64")),
        *((F16, "f16"), (F32, "f32"), (F64, "f64"), (BOOL, "pred")),
    )
    for name in names.split()
}

# What generated code calls each type.
TYPE_NAMES: dict[Any, str] = {
    U8: "U8",
    U16: "U16",
    U32: "U32",
    U64: "U64",
    I8: "I8",
    I16: "I16",
    I32: "I32",
    I64: "I64",
    F16: "F16",
    F32: "F32",
    F64: "F64",
    BOOL: "BOOL",
}

# Bytes of one element of a matrix operand.
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4, "s8": 1, "u8": 1}


def width(dtype: Any) -> int:
    """Bytes of one number of this type."""
    size: int = dtype().itemsize
    return size


def bf2f(bits: Array) -> Array:
    """bfloat16 bits as float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def f2bf(values: Array) -> Array:
    """float32 as bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=F32).view(U32)
    rounded = ((bits + (((bits >> U32(16)) & U32(1)) + U32(0x7FFF))) >> U32(16)).astype(U16)
    return np.where(_is_nan(bits), U16(0x7FFF), rounded)


def f2bf_rz(values: Array) -> Array:
    """float32 as bfloat16 bits, rounded towards zero."""
    bits = np.ascontiguousarray(values, dtype=F32).view(U32)
    return np.where(_is_nan(bits), U16(0x7FFF), (bits >> U32(16)).astype(U16))


def _is_nan(bits: Array) -> Array:
    nan: Array = (bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
    return nan


def _fp8_values(mantissa_bits: int, bias: int, has_infinity: bool) -> Array:
    """The float32 value of each of the 256 codes."""
    values = np.zeros(256, F32)
    top_exponent = 127 >> mantissa_bits
    for code in range(256):
        sign = -1.0 if code & 128 else 1.0
        exponent = (code & 127) >> mantissa_bits
        mantissa = code & ((1 << mantissa_bits) - 1)
        if has_infinity and exponent == top_exponent:
            value = np.inf if mantissa == 0 else np.nan
        elif not has_infinity and code & 127 == 127:
            value = np.nan
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        values[code] = sign * value
    return values


E4M3 = _fp8_values(3, 7, has_infinity=False)
E5M2 = _fp8_values(2, 15, has_infinity=True)


def _finite(table: Array) -> Array:
    """The finite values from zero up: their places are their codes."""
    positive = table[:128].astype(F64)
    return positive[np.isfinite(positive)]


_E4M3_FINITE = _finite(E4M3)
_E5M2_FINITE = _finite(E5M2)


def f2e4m3(values: Array) -> Array:
    """float32 as FP8 bits with 3 bits of mantissa, rounded to nearest even, saturating at 448."""
    return _to_fp8(values, _E4M3_FINITE)


def f2e5m2(values: Array) -> Array:
    """float32 as FP8 bits with 2 bits of mantissa, rounded to nearest even, saturating at 57344."""
    return _to_fp8(values, _E5M2_FINITE)


def _to_fp8(values: Array, finite: Array) -> Array:
    """The nearer of two neighbours, or the even one."""
    exact = np.asarray(values, F32).astype(F64)
    nan = np.isnan(exact)
    magnitude = np.where(nan, 0, np.minimum(np.abs(exact), finite[-1]))
    above = np.clip(np.searchsorted(finite, magnitude, side="left"), 0, len(finite) - 1)
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitude - finite[below], finite[above] - magnitude
    nearest = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    code = np.where(nan, U8(0x7F), nearest.astype(U8))
    return np.where(np.signbit(exact) & ~nan, code | U8(0x80), code).astype(U8)


def to_float32(raw: Array, kind: str) -> Array:
    """Raw unsigned elements of a matrix operand as float32.

    Raises:
        Unsupported: no such kind of element.
    """
    if kind == "bf16":
        return bf2f(raw)
    if kind == "f16":
        return raw.view(F16).astype(F32)
    if kind == "e4m3":
        return E4M3[raw]
    if kind == "e5m2":
        return E5M2[raw]
    if kind == "tf32":
        return (raw & U32(0xFFFFE000)).view(F32)
    if kind == "s8":
        return raw.view(I8).astype(F32)
    if kind == "u8":
        return raw.astype(F32)
    raise Unsupported(f"operand type {kind}")
