"""Conversions and comparisons: each function appends the Python code of one instruction."""

from collections.abc import Callable

import numpy as np

from tools.ptx_emulation.expressions import Expressions
from tools.ptx_emulation.formats import BOOL, F32, FLOAT_TYPES, I32, PTX_TYPES, TYPE_NAMES, U16, U32
from tools.ptx_emulation.parse import Operand, Pair

_COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "b8", "b16", "b32", "b64"}
_FLOATS = {"f16", "f32", "f64", "bf16"}
_FP8_PAIRS = {"e4m3x2": ("f2e4m3", "E4M3"), "e5m2x2": ("f2e5m2", "E5M2")}
_ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _compared(write: Expressions, a: Operand, b: Operand) -> str:
    """The comparison of setp; NaN is unequal to all, or with .u suffixes makes each comparison true."""
    comparison = write.parts[1]
    dtype = write.type()
    is_float = dtype in FLOAT_TYPES
    if write.parts[-1] == "bf16":
        left, right = f"bf2f({write.lanes(a, U16)})", f"bf2f({write.lanes(b, U16)})"
        is_float = True
    else:
        left, right = write.lanes(a, dtype), write.value(b, dtype)
    either_nan = f"np.isnan({left})|np.isnan({right})"
    if is_float and comparison == "num":
        return f"~({either_nan})"
    if is_float and comparison == "nan":
        return f"({either_nan})"
    if is_float and comparison == "neu":
        return f"({left}!={right})"
    if is_float and comparison == "ne":
        return f"(({left}!={right})&~({either_nan}))"
    if is_float and comparison.endswith("u") and comparison[:2] in _COMPARISONS:
        return f"(({left}{_COMPARISONS[comparison[:2]]}{right})|{either_nan})"
    if comparison not in _COMPARISONS:
        raise write.unsupported()
    return f"({left}{_COMPARISONS[comparison]}{right})"


def _set_predicate(write: Expressions) -> None:
    """setp, with a second destination for the opposite and a third operand to combine with."""
    target, a, b = write.operands[:3]
    result = _compared(write, a, b)
    opposite = f"~{result}"
    for name, operator in (("and", "&"), ("or", "|"), ("xor", "^")):
        if name in write.parts[2:]:
            other = write.lanes(write.operands[3], BOOL)
            result, opposite = f"({result}{operator}{other})", f"({opposite}{operator}{other})"
            break
    if isinstance(target, Pair):
        write.code.append(f"_opposite={opposite}")
        write.assign(target.first, result, BOOL)
        write.assign(target.second, "_opposite", BOOL)
    else:
        write.assign(target, result, BOOL)


def _set(write: Expressions) -> None:
    """set: a number for true."""
    target, a, b = write.operands
    dtype, result_type = write.type(-1), write.type(-2)
    if result_type is F32:
        true = write.program.object(F32(1.0))
    else:
        true = write.program.constant(-1 if result_type is I32 else 0xFFFFFFFF, result_type)
    false = write.program.object(result_type(0))
    condition = f"{write.lanes(a, dtype)}{_COMPARISONS[write.parts[1]]}{write.value(b, dtype)}"
    write.assign(target, f"np.where({condition},{true},{false})", result_type)


def _convert(write: Expressions) -> None:
    """cvt."""
    to, source = write.parts[-2:]
    if source in _FP8_PAIRS and to == "f16x2":
        target, a = write.operands
        write.assign(target, f"unpack_fp8({write.lanes(a, U16)},{_FP8_PAIRS[source][1]})", U32)
    elif to in _FP8_PAIRS:
        _to_fp8(write, source, _FP8_PAIRS[to][0])
    elif to in ("bf16x2", "f16x2") and source == "f32":
        _to_pair(write, to)
    elif to == "tf32" and source == "f32":
        write.assign(write.operands[0], f"to_tf32({write.lanes(write.operands[1], F32)})", U32)
    elif to in _INTEGERS and source in _INTEGERS:
        _integer_to_integer(write, to, source)
    elif source in _FLOATS and to in _INTEGERS | _FLOATS:
        _from_float(write, to, source)
    elif source in _INTEGERS and to in _FLOATS:
        _integer_to_float(write, to, source)
    else:
        raise write.unsupported()


def _rectified(write: Expressions, expression: str) -> str:
    return f"relu({expression})" if "relu" in write.parts else expression


def _to_pair(write: Expressions, to: str) -> None:
    """Two floats in one register."""
    target, high, low = write.operands
    halves = []
    for operand in (high, low):
        value = _rectified(write, write.lanes(operand, F32))
        if to == "f16x2":
            halves.append(f"({value}).astype(F16).view(U16)")
        else:
            halves.append(f"f2bf_rz({value})" if "rz" in write.parts else f"f2bf({value})")
    write.assign(target, f"pack2({halves[0]},{halves[1]})", U32)


def _to_fp8(write: Expressions, source: str, encoder: str) -> None:
    """Two floats, or a pair of 16-bit floats, as two FP8 numbers."""
    target, a = write.operands[:2]
    if source == "f32":
        values = [write.lanes(operand, F32) for operand in (a, write.operands[2])]
    elif source in ("f16x2", "bf16x2"):
        pair = write.lanes(a, U32)
        half = "bf2f({}({}))" if source == "bf16x2" else "{}({}).view(F16).astype(F32)"
        values = [half.format(name, pair) for name in ("high_half", "low_half")]
    else:
        raise write.unsupported()
    high, low = (_rectified(write, value) for value in values)
    write.assign(target, f"pack_fp8({high},{low},{encoder})", U16)


def _integer_to_integer(write: Expressions, to: str, source: str) -> None:
    """Extends or truncates; .sat clips."""
    target, a = write.operands
    dtype = PTX_TYPES[to]
    value = write.lanes(a, PTX_TYPES[source])
    if "sat" in write.parts:
        limits = np.iinfo(dtype)
        value = f"np.clip({value}.astype(I64),{limits.min},{min(limits.max, 2**63 - 1)})"
    write.assign(target, f"{value}.astype({TYPE_NAMES[dtype]})", dtype)


def _from_float(write: Expressions, to: str, source: str) -> None:
    """Between floats, or to an integer."""
    target, a = write.operands
    dtype = PTX_TYPES[to]
    value = f"bf2f({write.lanes(a, U16)})" if source == "bf16" else write.lanes(a, PTX_TYPES[source])
    rounding = next((name for name in _ROUNDINGS if name in write.parts), None)
    if to in _INTEGERS:
        if rounding is None:
            raise write.unsupported()
        write.assign(target, f"float_to_int({value},{rounding!r},{TYPE_NAMES[dtype]})", dtype)
        return
    if rounding:
        value = f"{_ROUNDINGS[rounding]}({value})"
    if "sat" in write.parts:
        value = f"np.clip({value},0,1)"
    value = _rectified(write, value)
    if to == "bf16":
        function = "f2bf_rz" if "rz" in write.parts else "f2bf"
        write.assign(target, f"{function}(({value}).astype(F32))", U16)
    else:
        write.assign(target, f"({value}).astype({TYPE_NAMES[dtype]})", dtype)


def _integer_to_float(write: Expressions, to: str, source: str) -> None:
    """Rounded to nearest."""
    target, a = write.operands
    value = write.lanes(a, PTX_TYPES[source])
    if to == "bf16":
        write.assign(target, f"f2bf({value}.astype(F32))", U16)
    else:
        write.assign(target, f"{value}.astype({TYPE_NAMES[PTX_TYPES[to]]})", PTX_TYPES[to])


OPERATIONS: dict[str, Callable[[Expressions], None]] = {"setp": _set_predicate, "set": _set, "cvt": _convert}
