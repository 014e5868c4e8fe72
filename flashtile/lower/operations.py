"""One operation on values: the kind it is computed in, the bounds and the type of its result, its text by the rules."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from flashtile.lower.rules import (
    ARITHMETIC,
    BOUNDS,
    COMPARE,
    FLOATING,
    OMITTED,
    TRUTH,
    TWICE_LOG2E,
    WHOLE,
    Bounds,
    Unsupported,
)
from flashtile.lower.source import Source
from flashtile.lower.values import BOTH, INT64, LONGEST, TYPES, Value, axes_of, constant, width


def choose(source: Source, condition: Value, a: Value, b: Value, dtype: torch.dtype) -> Value:
    """`torch.where`, of numbers too."""
    kind, bounds = _integer("where", [a, b], dtype)
    one, other = source.text(a, kind), source.text(b, kind)
    if a.number is not None and b.number is not None:
        one = f"tl.cast({one}, {TYPES[kind]})"
    chosen = source.text(condition, "b")
    if condition.number is not None:
        chosen = f"tl.cast({chosen}, tl.int1)"
    return source.bind(f"tl.where({chosen}, {one}, {other})", dtype, axes_of((condition, a, b)), bounds)


def apply(source: Source, name: str, values: Sequence[Value], dtype: torch.dtype) -> Value:
    """A step of the tables: its operands are converted to one kind."""
    axes = axes_of(values)
    if name == "pow" and values[1].number == 2:
        name, values = "square", values[:1]
    if source.quick and name == "div" and dtype is torch.float32 and _invertible(values[1]):
        name, values = "mul", [values[0], constant(1.0 / float(values[1].number or 1.0))]
    if source.quick and (product := _multiplied(name, values, dtype)) is not None:
        return product
    if name == "quick_tanh":
        values = [_times(values[0], TWICE_LOG2E.value)]
    # What the first operand is multiplied with, the result is.
    factor = values[0].factor if name == "tanh_backward" else 1.0
    values = [replace(values[0], factor=1.0), *values[1:]] if factor != 1.0 else values
    missing = OMITTED.get(name, ())[len(values) - 1 :]
    values = [*values, *map(constant, missing)]
    half = _half(values)
    if half is not None and name in COMPARE:
        values = [value if value.number is None else _in_half(value, half) for value in values]
    template, kind, bounds = _template(name, values, dtype)
    if len(values) != len(set(re.findall(r"{(\d)}", template))):
        raise Unsupported(f"there is no Triton for {name} with {len(values)} operands")
    text = template.format(*_texts(source, name, values, kind, half), T=TYPES[kind])
    wrapped = _wrapped(bounds, dtype)
    if wrapped is not None:
        text, bounds = wrapped[0].format(text), wrapped[1]
    elif kind == "i64" and width(bounds) == "i32":
        text = f"({text}).to(tl.int32)"
    found = source.bind(text, dtype, axes, bounds)
    return replace(found, floating=_floating(source, name, values, bounds), factor=factor)


def _multiplied(name: str, values: Sequence[Value], dtype: torch.dtype) -> Value | None:
    """A product with a number, written where it is wanted (`Value.factor`); None: of other operands, or by so large or
    small a number that the order of products counts."""
    numbers = [value for value in values if value.number is not None]
    others = [value for value in values if value.number is None and value.dtype is dtype and value.capture is None]
    if name != "mul" or dtype is not torch.float32 or (len(numbers), len(others)) != (1, 1):
        return None
    product = _times(others[0], float(numbers[0].number or 0.0))
    return product if _invertible(constant(product.factor)) else None


def _times(value: Value, number: float) -> Value:
    if value.number is not None:
        return constant(float(value.number) * number)
    return replace(value, factor=value.factor * number)


def _invertible(value: Value) -> bool:
    """Whether a product with 1 / value is as good as a division, by which Triton means one within two roundings."""
    return value.number is not None and 2.0**-100 < abs(value.number) < 2.0**100


def _texts(source: Source, name: str, values: Sequence[Value], kind: str, half: torch.dtype | None) -> list[str]:
    """The operands as they stand in the template."""
    texts = [_rounded(source.text(value, kind), value, half) for value in values]
    # Functions of tensors take no plain number, and something must be one where all operands are numbers.
    for position in range(len(values) if name == "pow" else 1):
        if values[position].number is not None:
            texts[position] = f"tl.cast({texts[position]}, {TYPES[kind]})"
    return texts


def _template(name: str, values: Sequence[Value], dtype: torch.dtype) -> tuple[str, str, Bounds]:
    """(text, kind of the operands, bounds of the result)."""
    if name in COMPARE:
        promoted = torch.float32 if any(value.dtype.is_floating_point for value in values) else torch.int64
        return COMPARE[name], _integer("where", [values[0], values[-1]], promoted)[0], INT64
    if name.startswith("logical_") or (dtype is torch.bool and name in TRUTH):
        return TRUTH[name], "b", INT64
    table = ARITHMETIC if name in ARITHMETIC else FLOATING if dtype.is_floating_point else WHOLE
    if name not in table or dtype is torch.bool:
        raise Unsupported(f"there is no Triton for {name} on {str(dtype).removeprefix('torch.')}")
    kind, bounds = _integer(name, values, dtype)
    return table[name], kind, bounds


def _integer(name: str, values: Sequence[Value], dtype: torch.dtype) -> tuple[str, Bounds]:
    """(kind to compute in, bounds of the result)."""
    if dtype.is_floating_point:
        return "f", INT64
    if dtype is torch.bool:
        return "b", INT64
    rule = BOUNDS.get(name)
    operands = [(0, 1) if value.dtype is torch.bool else value.bounds for value in values]
    bounds = rule(*operands) if rule is not None else INT64
    bounds = (max(bounds[0], INT64[0]), min(bounds[1], INT64[1]))
    return ("i64" if any(width(one) == "i64" for one in (*operands, bounds)) else "i32"), bounds


def _wrapped(bounds: Bounds, dtype: torch.dtype) -> tuple[str, Bounds] | None:
    """(template, bounds) for an integer that may leave the range of its type, and then comes in at the other end."""
    if dtype.is_floating_point or dtype in (torch.bool, torch.int64):
        return None
    limits = torch.iinfo(dtype)
    if bounds[0] >= limits.min and bounds[1] <= limits.max:
        return None
    return f"({{}}).to(tl.{str(dtype).removeprefix('torch.')}).to(tl.int32)", (limits.min, limits.max)


def _floating(source: Source, name: str, values: Sequence[Value], bounds: Bounds) -> str | None:
    """See `Value.floating`: sums and differences of rows and columns, where float32 holds every step exactly."""
    if axes_of(values) != BOTH:
        return None
    exact = all(low >= -LONGEST and high <= LONGEST for low, high in (bounds, *(value.bounds for value in values)))
    if name not in ("add", "sub", "neg", "abs") or not exact or any(value.dtype.is_floating_point for value in values):
        return None
    if any(value.axes == BOTH and value.floating is None for value in values):
        return None
    given = {("q", "k"): source.apart, ("k", "q"): f"(-{source.apart})"}
    if source.apart is not None and name == "sub" and (values[0].name, values[1].name) in given:
        return given[values[0].name, values[1].name]
    return "(" + ARITHMETIC[name].format(*(source.text(value, "f") for value in values)) + ")"


def _half(values: Sequence[Value]) -> torch.dtype | None:
    """The half-precision type, if any, that all operands are taken to before they are computed with."""
    floating = {value.dtype for value in values if value.dtype.is_floating_point and value.number is None}
    half = floating.pop() if len(floating) == 1 else None
    return half if half in (torch.float16, torch.bfloat16) else None


def _in_half(value: Value, half: torch.dtype) -> Value:
    return constant(torch.tensor(value.number, dtype=half).item())


def _rounded(text: str, value: Value, half: torch.dtype | None) -> str:
    """An integer beside half precision rounds to it, a plain number does not."""
    if half is None or value.dtype.is_floating_point or value.number is not None:
        return text
    return f"{text}.to(tl.{str(half).removeprefix('torch.')}).to(tl.float32)"
