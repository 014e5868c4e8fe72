"""How each aten step of a traced function is written in Triton: a table from names to templates.

Floating values are held in float32 (a float64 step too: no GPU kernel here computes in more), integers in 32 bits where
their bounds allow and in 64 otherwise, as `lower` decides; what a rule gets has been converted to one type already.
"""

from collections.abc import Callable

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)
TWICE_LOG2E = tl.constexpr(2.885390081777927)
"""What makes exp(2x) of 2 to the power of x; operands of the step `quick_tanh` have it as a factor."""


class Unsupported(Exception):
    """A step for which there is no rule."""


@triton.jit
def spread(x, like):
    """x in the shape of another tensor; no layout is named, so Gluon takes it too, and nothing is computed."""
    return tl.where(like == like, x, x)


@triton.jit
def tanh(x):
    """From the exponential of -|x|, which never overflows; a series where the difference would cancel."""
    size = tl.abs(x)
    e = tl.exp2(size * -TWICE_LOG2E)
    square = x * x
    series = size * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    value = tl.where(size < 0.1, series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -value, value)


@triton.jit
def tanh_of_power(power):
    """tanh(x) = 1 - 2 / (exp(2x) + 1), given exp(2x), within 2e-7 for a third of the work; one over a number by its
    square, for which there is one instruction."""
    power = power + 1.0
    return 1.0 - 2.0 * tl.rsqrt(power * power)


@triton.jit
def log1p(x):
    """Kahan's form: exact where 1 + x rounds."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))))


@triton.jit
def expm1(x):
    """tanh(x / 2) (exp(x) + 1), which does not cancel near 0."""
    return tl.where(tl.abs(x) < 1.0, tanh(x * 0.5) * (tl.exp(x) + 1.0), tl.exp(x) - 1.0)


@triton.jit
def floor_divide(a, b):
    """Triton divides integers as C does, towards 0."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def remainder(a, b):
    """With the sign of the divisor."""
    rest = a - (a // b) * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def power(x, exponent):
    """x ** exponent for floats, negative x with whole exponents included."""
    size = tl.exp2(exponent * tl.log2(tl.abs(x)))
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(exponent * 0.5) * 2.0 != exponent)
    signed = tl.where(x < 0, tl.where(whole, tl.where(odd, -size, size), float("nan")), size)
    return tl.where(exponent == 0.0, 1.0, signed)


@triton.jit
def softplus(x, beta, threshold):
    """log(1 + exp(beta x)) / beta, and x itself where that is as good as equal."""
    scaled = x * beta
    curve = (tl.maximum(scaled, 0.0, NAN) + log1p(tl.exp(-tl.abs(scaled)))) / beta
    return tl.where(scaled > threshold, x, curve)


@triton.jit
def silu_backward(grad, x):
    gate = 1.0 / (1.0 + tl.exp(-x))
    return grad * gate * (1.0 + x * (1.0 - gate))


@triton.jit
def round_half_even(x):
    low = tl.floor(x)
    rest = x - low
    even = tl.floor(low * 0.5) * 2.0 == low
    return tl.where((rest < 0.5) | ((rest == 0.5) & even), low, low + 1.0)


@triton.jit
def whole(number):
    """A size or stride, where None stands for 1 (Triton 3.6 loses a constant 1 inside of tuples in tuples)."""
    return 1 if number is None else number


@triton.jit
def wrapped(index, size):
    """An index as PyTorch takes it, from the end where negative; kept inside, as tiles reach beyond the end."""
    index = index.to(tl.int64)
    index = tl.where(index < 0, index + size, index)
    return tl.maximum(tl.minimum(index, size - 1), 0)


@triton.jit
def inside(index, size):
    """As `wrapped`, of an index that is never negative."""
    return tl.minimum(index, size - 1).to(tl.int64)


def without_ones(*numbers: int) -> tuple[int | None, ...]:
    """What `whole` reads."""
    return tuple(None if number == 1 else number for number in numbers)


HELPERS = {
    function.__name__: function
    for function in (
        *(tanh, tanh_of_power, log1p, expm1, power, softplus, silu_backward, round_half_even),
        *(floor_divide, remainder, whole, wrapped, inside, spread),
    )
} | {"NAN": NAN}

SAME = ("clone", "alias", "detach", "lift_fresh_copy", "_to_copy", "view", "expand", "squeeze", "sum", "mean")
"""Steps that give a number back, in the result's type; what else they are told says nothing about a number."""

OMITTED: dict[str, tuple[float, ...]] = {"softplus": (1.0, 20.0)}
"""What the last operands of a step are if not given."""

# Steps on one type, {T}, that of the result. {0}, {1}, ... are the operands. PyTorch's extrema pass NaN on.
ARITHMETIC: dict[str, str] = {
    **dict.fromkeys(SAME, "{0}"),
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "rsub": "({1} - {0})",
    "mul": "({0} * {1})",
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "square": "({0} * {0})",
    "minimum": "tl.minimum({0}, {1}, NAN)",
    "maximum": "tl.maximum({0}, {1}, NAN)",
    "clamp_min": "tl.maximum({0}, {1}, NAN)",
    "clamp_max": "tl.minimum({0}, {1}, NAN)",
    "relu": "tl.maximum({0}, 0, NAN)",
    "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, 0)).to({T})",
    "sgn": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, 0)).to({T})",
}

FLOATING: dict[str, str] = {
    "div": "({0} / {1})",
    "reciprocal": "(1.0 / {0})",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log1p": "log1p({0})",
    "expm1": "expm1({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "(1.0 / tl.sqrt({0}))",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "tanh": "tanh({0})",
    "quick_tanh": "tanh_of_power(tl.exp2({0}))",
    "sigmoid": "(1.0 / (1.0 + tl.exp(-{0})))",
    "silu": "({0} / (1.0 + tl.exp(-{0})))",
    "erf": "tl.erf({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "trunc": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    "round": "round_half_even({0})",
    "pow": "power({0}, {1})",
    "softplus": "softplus({0}, {1}, {2})",
    "tanh_backward": "({0} * (1.0 - {1} * {1}))",
    "sigmoid_backward": "({0} * {1} * (1.0 - {1}))",
    "silu_backward": "silu_backward({0}, {1})",
    "softplus_backward": "tl.where({1} * {2} > {3}, {0}, {0} / (1.0 + tl.exp(-{1} * {2})))",
    "threshold_backward": "tl.where({1} <= {2}, 0.0, {0})",
}

WHOLE: dict[str, str] = {
    "floor_divide": "floor_divide({0}, {1})",
    "remainder": "remainder({0}, {1})",
    "bitwise_and": "({0} & {1})",
    "bitwise_or": "({0} | {1})",
    "bitwise_xor": "({0} ^ {1})",
    "__and__": "({0} & {1})",
    "__or__": "({0} | {1})",
    "__xor__": "({0} ^ {1})",
    "bitwise_not": "(~{0})",
    "__lshift__": "({0} << {1})",
    "__rshift__": "({0} >> {1})",
    "bitwise_left_shift": "({0} << {1})",
    "bitwise_right_shift": "({0} >> {1})",
}

COMPARE: dict[str, str] = {
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "isnan": "({0} != {0})",
    "isinf": '(tl.abs({0}) == float("inf"))',
}

TRUTH: dict[str, str] = {
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__", "mul", "minimum"), "({0} & {1})"),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__", "add", "maximum"), "({0} | {1})"),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), "({0} ^ {1})"),
    **dict.fromkeys(("logical_not", "bitwise_not"), "(~{0})"),
    **dict.fromkeys(SAME, "{0}"),
}
"""Steps whose result is a boolean, on booleans."""

Bounds = tuple[int, int]


def _product(a: Bounds, b: Bounds) -> Bounds:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


BOUNDS: dict[str, Callable[..., Bounds]] = {
    **dict.fromkeys(SAME, lambda a, *_: a),
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "rsub": lambda a, b: (b[0] - a[1], b[1] - a[0]),
    "mul": _product,
    "square": lambda a: _product(a, a),
    "neg": lambda a: (-a[1], -a[0]),
    "abs": lambda a: (0, max(abs(a[0]), abs(a[1]))),
    "minimum": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "maximum": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "clamp_max": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "clamp_min": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    **dict.fromkeys(("sign", "sgn"), lambda a: (-1, 1)),
    "relu": lambda a: (max(a[0], 0), max(a[1], 0)),
    "floor_divide": lambda a, b: (-max(abs(a[0]), abs(a[1])) - 1, max(abs(a[0]), abs(a[1])) + 1),
    "remainder": lambda a, b: (-max(abs(b[0]), abs(b[1])), max(abs(b[0]), abs(b[1]))),
    "where": lambda a, b: (min(a[0], b[0]), max(a[1], b[1])),
}
"""Bounds of an integer step from those of its operands; a step that is not here may be anything."""
