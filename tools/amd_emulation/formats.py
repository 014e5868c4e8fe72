"""Number formats of matrix operands."""

import numpy as np


def _fp8_table(exponent_bits: int, mantissa_bits: int, fnuz: bool) -> np.ndarray:
    """The values of all 256 bytes. fnuz: one NaN, where negative zero would be, no infinity, the bias one higher."""
    bias = (1 << exponent_bits - 1) - 1 + fnuz
    values = np.empty(256)
    for byte in range(256):
        exponent, mantissa = byte >> mantissa_bits & (1 << exponent_bits) - 1, byte & (1 << mantissa_bits) - 1
        fraction = mantissa / (1 << mantissa_bits)
        value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        if fnuz:
            value = np.nan if byte == 0x80 else value
        elif exponent_bits == 4:
            value = np.nan if byte & 0x7F == 0x7F else value
        elif exponent == 31:
            value = np.nan if mantissa else np.inf
        values[byte] = -value if byte >> 7 else value
    return values


_FP8 = {
    (kind, fnuz): _fp8_table(exponent, mantissa, fnuz)
    for kind, exponent, mantissa in (("fp8", 4, 3), ("bf8", 5, 2))
    for fnuz in (False, True)
}

PER_REGISTER = {"f32": 1, "f16": 2, "bf16": 2, "i8": 4, "fp8": 4, "bf8": 4}


def f32(words: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of NaN that signals
        return np.ascontiguousarray(words, np.uint32).view(np.float32).astype(np.float64)


def bf16(words: np.ndarray) -> np.ndarray:
    """Of the low halves of words."""
    return f32((words & 0xFFFF).astype(np.uint32) << 16)


def f16(words: np.ndarray) -> np.ndarray:
    return (words & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 values rounded to the nearest, ties to even."""
    words = np.asarray(values, np.float32).view(np.uint32)
    return (words + 0x7FFF + (words >> 16 & 1) >> 16).astype(np.uint16)


def to_eight(values: np.ndarray, kind: str, fnuz: bool, saturates: bool) -> np.ndarray:
    """Bytes of float values rounded to the nearest, ties to even; past the largest number: that, or NaN (infinity where
    the format has one)."""
    table = _FP8[kind, fnuz]
    finite = table[:128][np.isfinite(table[:128])]
    sizes = np.abs(values)
    middle = (finite[1:] + finite[:-1]) / 2
    code = np.searchsorted(middle, sizes).astype(np.uint8)
    code += (code % 2 == 1) & np.isin(sizes, middle)
    if not saturates:
        past = finite[-1] + (finite[-1] - finite[-2]) / 2
        code[sizes >= past] = 0x80 if fnuz else 0x7F if kind == "fp8" else 0x7C
    sign = np.where(np.signbit(values) & ~(fnuz & np.isin(code, (0, 0x80))), 0x80, 0).astype(np.uint8)
    return np.where(np.isnan(values), 0x80 if fnuz else 0x7F, code | sign).astype(np.uint8)


def unpack(words: np.ndarray, kind: str, fnuz: bool) -> np.ndarray:
    """(registers, lanes) -> (elements, lanes), in the order in which they lie."""
    per, lanes = PER_REGISTER[kind], words.shape[1]
    if kind == "f32":
        return f32(words)
    parts = np.stack([words >> (32 // per * i) for i in range(per)], 1).reshape(-1, lanes)
    if per == 2:
        return (f16 if kind == "f16" else bf16)(parts)
    parts = parts & 0xFF
    return parts.astype(np.uint8).view(np.int8).astype(np.int64) if kind == "i8" else _FP8[kind, fnuz][parts]
