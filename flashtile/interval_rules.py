"""Interval arithmetic: how each aten step of a mask maps intervals of its operands to an interval of its result.

A rule may widen, never lose a value that the step can take. Steps without a rule make their result unknown.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """All values lie in [low, high]; of booleans, low means "always true" and high "maybe true".

    Bounds of integers are int64, whatever the type of the step that they bound.
    """

    low: Tensor
    high: Tensor


Value = Interval | None  # None: nothing is known


def cast(value: Interval, dtype: torch.dtype) -> Value:
    """Conversions that keep order and value; integers beyond 2^24 may round as floats, or wrap in a narrow type."""
    known = value.low.dtype
    if known is dtype and (dtype is torch.bool or dtype.is_floating_point):
        return value
    if dtype is torch.bool:
        if known.is_floating_point:
            return None
        zero = (value.low == 0) & (value.high == 0)
        return Interval((value.low > 0) | (value.high < 0), ~zero)
    if dtype.is_floating_point:
        exact = known.is_floating_point or value.low.numel() == 0
        return _to(value, dtype) if exact or max(-int(value.low.min()), int(value.high.max())) < 2**24 else None
    if known.is_floating_point or dtype is torch.uint64:
        return None
    return _wrapped(_to(value, torch.int64), dtype)


def _to(value: Interval, dtype: torch.dtype) -> Interval:
    """Both bounds converted; one tensor where they are one."""
    low = value.low.to(dtype)
    return Interval(low, low if value.low is value.high else value.high.to(dtype))


def _wrapped(value: Interval, dtype: torch.dtype) -> Interval:
    """An integer that does not fit its type wraps around: it may become anything."""
    limits = torch.iinfo(dtype)
    if dtype is torch.int64 or value.low.numel() == 0:
        return value
    if int(value.low.min()) >= limits.min and int(value.high.max()) <= limits.max:
        return value
    outside = (value.low < limits.min) | (value.high > limits.max)
    return Interval(torch.where(outside, limits.min, value.low), torch.where(outside, limits.max, value.high))


def may_overflow(values: Sequence[Interval]) -> bool:
    """Whether a sum, difference or product of such integers may wrap around in 64 bits."""
    if any(value.low.dtype.is_floating_point or value.low.numel() == 0 for value in values):
        return False
    # A product of factors of at least 2 is at least their sum, so one bound serves all three.
    return math.prod(max(2, -int(value.low.min()), int(value.high.max())) for value in values) >= 2**63


def _exact_only(rule: Callable[..., Value]) -> Callable[..., Value]:
    """Integers only: floats would round differently here and there."""

    def guarded(*values: Interval) -> Value:
        return None if any(value.low.dtype.is_floating_point for value in values) else rule(*values)

    return guarded


def _corners(rule: Callable[[Tensor, Tensor], Tensor], a: Interval, b: Interval) -> Interval:
    """Extremes of a rule that is monotone in either operand lie at the ends."""
    ends = [rule(x, y) for x in _ends(a) for y in _ends(b)]
    return Interval(functools.reduce(torch.minimum, ends), functools.reduce(torch.maximum, ends))


def _ends(a: Interval) -> tuple[Tensor, ...]:
    return (a.low,) if a.low is a.high else (a.low, a.high)


def _reversed_subtract(a: Interval, b: Interval, alpha: Interval | None = None) -> Interval:
    a = a if alpha is None else _corners(torch.mul, a, alpha)
    return Interval(b.low - a.high, b.high - a.low)


def _floor_divide(a: Interval, b: Interval) -> Value:
    if bool((b.low <= 0).any()):
        return None
    return _corners(lambda x, y: torch.div(x, y, rounding_mode="floor"), a, b)


def _remainder(a: Interval, b: Interval) -> Value:
    quotient = _floor_divide(a, b)
    if quotient is None:
        return None
    within = (quotient.low == quotient.high) & (b.low == b.high)
    return Interval(
        torch.where(within, a.low - quotient.low * b.low, 0),
        torch.where(within, a.high - quotient.low * b.low, b.high - 1),
    )


def _shift_right(a: Interval, b: Interval) -> Value:
    if bool(((b.low < 0) | (b.high > 62)).any()):
        return None
    one = torch.ones_like(b.low)
    return _floor_divide(a, Interval(*((one << b.low,) * 2 if b.low is b.high else (one << b.low, one << b.high))))


def _bitwise_and(a: Interval, b: Interval) -> Value:
    """Of booleans; of an integer with 2^n - 1, which is a remainder."""
    if a.low.dtype is torch.bool and b.low.dtype is torch.bool:
        return _and(a, b)
    if b.low is not b.high or bool(((b.low < 0) | ((b.low & (b.low + 1)) != 0)).any()):
        return None
    limit = b.low + 1
    return _remainder(a, Interval(limit, limit))


def _power(a: Interval, exponent: Interval) -> Value:
    if exponent.low is not exponent.high or exponent.low.numel() != 1 or float(exponent.low) != 2:
        return None
    size = _absolute(a)
    return Interval(size.low * size.low, size.high * size.high)


def _absolute(a: Interval) -> Interval:
    return Interval(torch.maximum(a.low, -a.high).clamp_(min=0), torch.maximum(a.high, -a.low))


def _equal(a: Interval, b: Interval) -> Interval:
    one = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Interval(one, (a.high >= b.low) & (a.low <= b.high))


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    low = torch.where(condition.low, a.low, torch.where(condition.high, torch.minimum(a.low, b.low), b.low))
    high = torch.where(condition.low, a.high, torch.where(condition.high, torch.maximum(a.high, b.high), b.high))
    return Interval(low, high)


def _not(a: Interval) -> Interval:
    return Interval(~a.high, ~a.low)


def _truth(rule: Callable[..., Interval]) -> Callable[..., Value]:
    """Rules of booleans; bit operations on integers are not known."""

    def guarded(*values: Interval) -> Value:
        return rule(*values) if all(value.low.dtype is torch.bool for value in values) else None

    return guarded


def _and(a: Interval, b: Interval) -> Interval:
    return Interval(a.low & b.low, a.high & b.high)


def _or(a: Interval, b: Interval) -> Interval:
    return Interval(a.low | b.low, a.high | b.high)


def _clamp(a: Interval, low: Interval | None = None, high: Interval | None = None) -> Interval:
    for bound, pick in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            a = Interval(pick(a.low, bound.low), pick(a.high, bound.high))
    return a


RULES: dict[str, Callable[..., Value]] = {
    "add": _exact_only(lambda a, b: Interval(a.low + b.low, a.high + b.high)),
    "sub": _exact_only(lambda a, b: Interval(a.low - b.high, a.high - b.low)),
    "rsub": _exact_only(_reversed_subtract),
    "mul": _exact_only(lambda a, b: _corners(torch.mul, a, b)),
    "pow": _exact_only(_power),
    "neg": lambda a: Interval(-a.high, -a.low),
    "abs": _absolute,
    "minimum": lambda a, b: Interval(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "maximum": lambda a, b: Interval(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "relu": lambda a: Interval(a.low.clamp(min=0), a.high.clamp(min=0)),
    "sign": lambda a: Interval(a.low.sign(), a.high.sign()),
    "clamp_max": lambda a, high: _clamp(a, None, high),
    "floor_divide": _exact_only(_floor_divide),
    "remainder": _exact_only(_remainder),
    "__rshift__": _exact_only(_shift_right),
    "bitwise_right_shift": _exact_only(_shift_right),
    "__and__": _exact_only(_bitwise_and),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "lt": lambda a, b: Interval(a.high < b.low, a.low < b.high),
    "le": lambda a, b: Interval(a.high <= b.low, a.low <= b.high),
    "gt": lambda a, b: Interval(a.low > b.high, a.high > b.low),
    "ge": lambda a, b: Interval(a.low >= b.high, a.high >= b.low),
    "where": _where,
    "bitwise_and": _exact_only(_bitwise_and),
    "logical_and": _truth(_and),
    "bitwise_or": _truth(_or),
    "logical_or": _truth(_or),
    "bitwise_not": _truth(_not),
    "logical_not": _truth(_not),
    "bitwise_xor": _truth(lambda a, b: _or(_and(a, _not(b)), _and(_not(a), b))),
    "_to_copy": lambda a: a,
    "clone": lambda a: a,
    "lift_fresh_copy": lambda a: a,
    "alias": lambda a: a,
    "detach": lambda a: a,
}
"""How each aten step maps intervals; a step that is not here makes its result unknown."""

GROWING = frozenset({"add", "sub", "rsub", "mul", "neg", "abs", "pow"})
"""Steps whose result may leave the range of int64 where the operands are within."""
