"""Moves, arithmetic and logic: each function appends the Python code of one instruction."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tools.ptx_emulation import lane_math
from tools.ptx_emulation.errors import Unsupported
from tools.ptx_emulation.expressions import Expressions
from tools.ptx_emulation.formats import (
    BOOL,
    F16,
    F32,
    F64,
    FLOAT_TYPES,
    I16,
    I32,
    I64,
    TYPE_NAMES,
    U16,
    U32,
    U64,
    UNSIGNED,
    width,
)
from tools.ptx_emulation.memory import SHARED_WINDOW
from tools.ptx_emulation.parse import Discard, Integer, Operand, Pair, Register, Vector

_WIDER = {U16: U32, I16: I32, U32: U64, I32: I64}


def _move(write: Expressions) -> None:
    """mov, also between a register and the parts of it."""
    target, source = write.operands
    dtype = write.type()
    if isinstance(target, Vector):
        _split(write, target, source, UNSIGNED[width(dtype)])
    elif isinstance(source, Vector):
        _join(write, target, source, UNSIGNED[width(dtype)])
    else:
        write.assign(target, write.lanes(source, dtype), dtype)


def _split(write: Expressions, target: Vector, source: Operand, whole: Any) -> None:
    """mov to a vector: the parts of a register."""
    size = width(whole) // len(target.items)
    part = UNSIGNED[size]
    for i, item in enumerate(target.items):
        if isinstance(item, Discard):
            continue
        bits = write.value(source, whole)
        if i:
            bits = f"({bits}>>{write.program.constant(8 * size * i, whole)})"
        write.assign(item, f"{bits}.astype({TYPE_NAMES[part]})", part)


def _join(write: Expressions, target: Operand, source: Vector, whole: Any) -> None:
    """mov from a vector: parts side by side, the first one lowest."""
    size = width(whole) // len(source.items)
    name = TYPE_NAMES[whole]
    parts = []
    for i, item in enumerate(source.items):
        bits = write.value(item, UNSIGNED[size])
        bits = f"{bits}.astype({name})" if isinstance(item, Register) else f"{name}({bits})"
        parts.append(f"({bits}<<{write.program.constant(8 * size * i, whole)})" if i else bits)
    joined = "|".join(parts)
    if not any(isinstance(item, Register) for item in source.items):
        joined = f"filled({joined})"
    write.assign(target, joined, whole)


def _convert_address(write: Expressions) -> None:
    """cvta: generic addresses of global memory are those of global memory."""
    target, source = write.operands
    dtype = write.type()
    address = write.lanes(source, dtype)
    if "shared" in write.parts:
        sign = "-" if "to" in write.parts else "+"
        address = f"({address}{sign}{write.program.constant(SHARED_WINDOW, dtype)})"
    write.assign(target, address, dtype)


def _select(write: Expressions) -> None:
    """selp."""
    target, a, b, predicate = write.operands
    dtype = UNSIGNED[width(write.type())]
    condition = write.value(predicate, BOOL)
    write.assign(target, f"np.where({condition},{write.value(a, dtype)},{write.value(b, dtype)})", dtype)


def _select_by_sign(write: Expressions) -> None:
    """slct."""
    target, a, b, sign = write.operands
    dtype = write.type(-2)
    condition = f"{write.lanes(sign, write.type(-1))}>=0"
    write.assign(target, f"np.where({condition},{write.value(a, dtype)},{write.value(b, dtype)})", dtype)


def _packed(write: Expressions, kind: str, operands: tuple[Operand, ...], formula: Callable[..., str]) -> str:
    """A formula over numbers that come as bf16, bf16x2 or f16x2; the formula takes expressions of floats."""
    if kind == "bf16":
        return f"f2bf({formula(*(f'bf2f({write.lanes(operand, U16)})' for operand in operands))})"
    registers = [write.lanes(operand, U32) for operand in operands]
    halves = []
    for half in ("high_half", "low_half"):
        if kind == "bf16x2":
            halves.append(f"f2bf({formula(*(f'bf2f({half}({each}))' for each in registers))})")
        else:
            halves.append(f"({formula(*(f'{half}({each}).view(F16)' for each in registers))}).view(U16)")
    return f"pack2({halves[0]},{halves[1]})"


_PACKED = {"bf16": U16, "bf16x2": U32, "f16x2": U32}


def _binary(write: Expressions, integer: str, floating: str = "") -> None:
    """Two operands; templates for integers and, where it differs, for floats."""
    target, a, b = write.operands[:3]
    floating = floating or integer
    kind = write.parts[-1]
    if kind == "pred":
        write.assign(target, integer.format(a=write.lanes(a, BOOL), b=write.value(b, BOOL)), BOOL)
        return
    if kind in _PACKED:
        result = _packed(write, kind, (a, b), lambda x, y: floating.format(a=x, b=y))
        write.assign(target, result, _PACKED[kind])
        return
    dtype = write.type()
    is_float = dtype in FLOAT_TYPES
    constant = not isinstance(a, Register) and not isinstance(b, Register)
    left = write.lanes(a, dtype) if constant else write.value(a, dtype)
    result = (floating if is_float else integer).format(a=left, b=write.value(b, dtype))
    if "sat" in write.parts and is_float:
        result = f"np.clip({result},{write.program.constant(0.0, dtype)},{write.program.constant(1.0, dtype)})"
    write.assign(target, result, dtype)


def _extremum(write: Expressions, integer: str, floating: str) -> None:
    """min and max; with .NaN, NaN wins; with .relu, which integers have, 0 is the least."""
    whole = f"relu({integer}({{a}},{{b}}))" if "relu" in write.parts else f"{integer}({{a}},{{b}})"
    _binary(write, whole, "" if "NaN" in write.parts else f"{floating}({{a}},{{b}})")


def _multiply(write: Expressions) -> None:
    """mul; .wide has a result of twice the width, .hi its upper half."""
    if "wide" in write.parts:
        dtype = write.type()
        wide = _WIDER[dtype]
        target, a, b = write.operands
        product = f"multiply_wide({write.value(a, dtype)},{write.value(b, dtype)},{TYPE_NAMES[wide]})"
        write.assign(target, product, wide)
    elif "hi" in write.parts:
        _binary(write, "multiply_high({a},{b})")
    else:
        _binary(write, "({a}*{b})")


def _multiply_add(write: Expressions) -> None:
    """mad."""
    dtype = write.type()
    if dtype in FLOAT_TYPES:
        _fused_multiply_add(write)
        return
    target, a, b, c = write.operands
    if "wide" in write.parts:
        wide = _WIDER[dtype]
        product = f"multiply_wide({write.value(a, dtype)},{write.value(b, dtype)},{TYPE_NAMES[wide]})"
        write.assign(target, f"{product}+{write.value(c, wide)}", wide)
    elif "hi" in write.parts:
        product = f"multiply_high({write.value(a, dtype)},{write.value(b, dtype)})"
        write.assign(target, f"{product}+{write.value(c, dtype)}", dtype)
    else:
        write.assign(target, f"{write.lanes(a, dtype)}*{write.value(b, dtype)}+{write.value(c, dtype)}", dtype)


def _fused_multiply_add(write: Expressions) -> None:
    """fma."""
    target, a, b, c = write.operands
    kind = write.parts[-1]
    if kind == "f32":
        result = f"fma32({write.lanes(a, F32)},{write.value(b, F32)},{write.value(c, F32)})"
        if "sat" in write.parts:
            result = f"np.clip({result},0,1)"
        write.assign(target, result, F32)
        return
    if kind == "f64":
        write.assign(target, f"{write.lanes(a, F64)}*{write.value(b, F64)}+{write.value(c, F64)}", F64)
        return
    after = "relu({})" if "relu" in write.parts else "{}"
    function = "fma16" if kind.startswith("f16") else "fma32"

    def formula(x: str, y: str, z: str) -> str:
        return after.format(f"{function}({x},{y},{z})")

    if kind == "f16":
        write.assign(target, formula(*(write.lanes(each, F16) for each in (a, b, c))), F16)
    elif kind in _PACKED:
        write.assign(target, _packed(write, kind, (a, b, c), formula), _PACKED[kind])
    else:
        raise write.unsupported()


def _unary(write: Expressions, template: str) -> None:
    """One operand; a template for all types."""
    target, a = write.operands
    kind = write.parts[-1]
    if kind in _PACKED:
        result = _packed(write, kind, (a,), lambda x: template.format(a=x))
        write.assign(target, result, _PACKED[kind])
        return
    dtype = write.type()
    write.assign(target, template.format(a=write.lanes(a, dtype)), dtype)


def _invert(write: Expressions) -> None:
    """not."""
    target, a = write.operands
    dtype = write.type()
    write.assign(target, f"~{write.lanes(a, dtype)}", dtype)


def _copy_sign(write: Expressions) -> None:
    """copysign."""
    target, sign, magnitude = write.operands
    dtype = write.type()
    write.assign(target, f"np.copysign({write.lanes(magnitude, dtype)},{write.value(sign, dtype)})", dtype)


def _shift(write: Expressions, operator: str, function: str) -> None:
    """shl and shr; amounts beyond the width are allowed unless they are constant."""
    target, a, amount = write.operands
    dtype = write.type()
    bits = 8 * width(dtype)
    if isinstance(amount, Integer) and 0 <= amount.value < bits:
        result = f"{write.lanes(a, dtype)}{operator}{write.program.constant(amount.value, dtype)}"
    else:
        result = f"{function}({write.lanes(a, dtype)},{write.value(amount, U32)},{bits})"
    write.assign(target, result, dtype)


def _funnel_shift(write: Expressions) -> None:
    """shf."""
    target, low, high, amount = write.operands
    words = ",".join(write.value(each, U32) for each in (low, high, amount))
    write.assign(target, f"funnel_shift({words},{'l' in write.parts},{'wrap' in write.parts})", U32)


def _bit_field(write: Expressions) -> None:
    """bfe; unsigned fields at constant places are a shift and a mask."""
    target, a, start, length = write.operands
    dtype = write.type()
    bits = 8 * width(dtype)
    if (
        dtype in (U32, U64)
        and isinstance(start, Integer)
        and isinstance(length, Integer)
        and 0 < length.value < bits
        and start.value < bits
    ):
        by = write.program.constant(start.value, dtype)
        mask = write.program.constant((1 << length.value) - 1, dtype)
        write.assign(target, f"({write.lanes(a, dtype)}>>{by})&{mask}", dtype)
        return
    places = f"{write.value(start, U32)},{write.value(length, U32)}"
    write.assign(target, f"bit_field({write.lanes(a, dtype)},{places},{bits})", UNSIGNED[bits // 8])


def _bit_insert(write: Expressions) -> None:
    """bfi."""
    target, new, old, start, length = write.operands
    dtype = write.type()
    values = f"{write.value(new, dtype)},{write.value(old, dtype)}"
    places = f"{write.value(start, U32)},{write.value(length, U32)}"
    write.assign(target, f"bit_insert({values},{places},{8 * width(dtype)})", dtype)


def _logic3(write: Expressions) -> None:
    """lop3."""
    target, a, b, c, table = write.operands
    if not isinstance(table, Integer):
        raise write.unsupported()
    values = ",".join(write.lanes(each, U32) for each in (a, b, c))
    write.assign(target, f"logic3({values},{table.value})", U32)


def _permute_bytes(write: Expressions) -> None:
    """prmt."""
    if write.parts[1:] != ["b32"]:
        raise write.unsupported()
    target, *sources = write.operands
    write.assign(target, f"permute_bytes({','.join(write.value(each, U32) for each in sources)})", U32)


def _bit_property(write: Expressions, what: str) -> None:
    target, a = write.operands
    if what == "bfind" and ("shiftamt" in write.parts or write.parts[-1].startswith("s")):
        raise write.unsupported()
    dtype = write.type()
    result_type = UNSIGNED[width(dtype)] if what == "brev" else U32
    write.assign(target, f"bit_property({write.lanes(a, dtype)},{what!r})", result_type)


def _shuffle(write: Expressions) -> None:
    """shfl; constant patterns are worked out here."""
    target, source, distance, clamp = write.operands[:4]
    mode = write.parts[2]
    data, in_range = (target.first, target.second) if isinstance(target, Pair) else (target, Discard())
    write.code.append(f"_data={write.lanes(source, U32)}")
    if isinstance(distance, Integer) and isinstance(clamp, Integer):
        lanes, inside = lane_math.shuffle(mode, distance.value, clamp.value)
        write.assign(in_range, write.program.object(inside), BOOL)
        write.assign(data, f"_data[{write.program.object(lanes)}]", U32)
        return
    write.code.append(f"_lane,_inside=shuffle({mode!r},{write.value(distance, U32)},{write.value(clamp, U32)})")
    write.assign(in_range, "_inside", BOOL)
    write.assign(data, "_data[_lane]", U32)


def _create_policy(write: Expressions) -> None:
    """Cache policies mean nothing here."""
    write.assign(write.operands[0], write.program.object(np.zeros(32, U64)), U64)


def _refuse(write: Expressions) -> None:
    raise Unsupported(f"instruction {write.instruction.op}")


_INVERSE = "(np.array(1,dtype={a}.dtype)/{a})"
_INVERSE_ROOT = "(np.array(1,dtype={a}.dtype)/np.sqrt({a}))"

OPERATIONS: dict[str, Callable[[Expressions], None]] = {
    "mov": _move,
    "cvta": _convert_address,
    "selp": _select,
    "slct": _select_by_sign,
    "add": partial(_binary, integer="({a}+{b})"),
    "sub": partial(_binary, integer="({a}-{b})"),
    "and": partial(_binary, integer="({a}&{b})"),
    "or": partial(_binary, integer="({a}|{b})"),
    "xor": partial(_binary, integer="({a}^{b})"),
    "max": partial(_extremum, integer="np.maximum", floating="np.fmax"),
    "min": partial(_extremum, integer="np.minimum", floating="np.fmin"),
    "div": partial(_binary, integer="divide({a},{b})", floating="{a}/{b}"),
    "rem": partial(_binary, integer="remainder({a},{b})"),
    "mul": _multiply,
    "mul24": _refuse,
    "mad": _multiply_add,
    "fma": _fused_multiply_add,
    "neg": partial(_unary, template="(-{a})"),
    "abs": partial(_unary, template="np.abs({a})"),
    "ex2": partial(_unary, template="np.exp2({a})"),
    "lg2": partial(_unary, template="np.log2({a})"),
    "rcp": partial(_unary, template=_INVERSE),
    "sqrt": partial(_unary, template="np.sqrt({a})"),
    "rsqrt": partial(_unary, template=_INVERSE_ROOT),
    "tanh": partial(_unary, template="np.tanh({a})"),
    "sin": partial(_unary, template="np.sin({a})"),
    "cos": partial(_unary, template="np.cos({a})"),
    "not": _invert,
    "copysign": _copy_sign,
    "shl": partial(_shift, operator="<<", function="shift_left"),
    "shr": partial(_shift, operator=">>", function="shift_right"),
    "shf": _funnel_shift,
    "bfe": _bit_field,
    "bfi": _bit_insert,
    "lop3": _logic3,
    "prmt": _permute_bytes,
    "popc": partial(_bit_property, what="popc"),
    "clz": partial(_bit_property, what="clz"),
    "brev": partial(_bit_property, what="brev"),
    "bfind": partial(_bit_property, what="bfind"),
    "shfl": _shuffle,
    "createpolicy": _create_policy,
    "isspacep": _refuse,
}
