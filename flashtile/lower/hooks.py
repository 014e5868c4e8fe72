"""The hooks that kernels call, and why a function has none."""

import hashlib
import json
import linecache
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from flashtile import trace
from flashtile.lower.rules import (
    ARITHMETIC,
    BOUNDS,
    COMPARE,
    FLOATING,
    HELPERS,
    OMITTED,
    SAME,
    TRUTH,
    WHOLE,
    Bounds,
    without_ones,
)
from flashtile.scalar_graph import Traced
from flashtile.spans import FULL, PARTIAL

_INT32: Bounds = (-(2**31), 2**31 - 1)
_INT64: Bounds = (-(2**63), 2**63 - 1)
LONGEST = 2**24
_INDICES: dict[str, Bounds] = {"b": (0, 2**31 - 1), "h": (0, 2**31 - 1), "q": (0, LONGEST), "k": (0, LONGEST)}
"""What indices can be, from which follows whether an integer step fits into 32 bits."""


class Hook(NamedTuple):
    """A function for kernels to call, and what it gets as its last argument."""

    function: Any
    arguments: tuple[Any, ...]


class Unsupported(Exception):
    """A step for which there is no rule."""


def score_hook(key: str, tensors: Sequence[Tensor]) -> Hook:
    """`function(b_scores, i_batch, i_head, o_query, o_key, arguments)`: modified scores, natural base, float32."""
    return Hook(_score_function(key), _arguments(tensors))


def derivative_hook(key: str, totals: Sequence[Tensor | None]) -> Hook:
    """`function(b_scores, i_batch, i_head, o_query, o_key, score_arguments, arguments, b_grad, m_valid, COLLECT)`.

    It returns the score's gradient; `score_arguments` are those of `score_hook`. If COLLECT, what the tile gives to the
    gradients of captured tensors is added to `totals`, contiguous float32 or float64 tensors in their shapes (None: not
    wanted), where `m_valid`; in no fixed order.
    """
    wanted = tuple(total is not None for total in totals)
    return Hook(_derivative_function(key, wanted), tuple(total for total in totals if total is not None))


def mask_hook(token: str, tensors: Sequence[Tensor]) -> Hook:
    """`function(i_batch, i_head, o_query, o_key, shift, arguments)`: bool; `shift` is seqlen_kv - seqlen_q."""
    shapes = tuple(tuple(min(size, 2) for size in tensor.shape) for tensor in tensors)
    dtypes = tuple(tensor.dtype for tensor in tensors)
    return Hook(_mask_function(token, shapes, dtypes), _arguments(tensors))


@cache
def unsupported(key: str) -> str | None:
    """Why a score function cannot be lowered, or None."""
    traced = trace.graph(key)
    if not traced.elementwise or traced.backward is None:
        return "score_mod computes with whole vectors, not with single elements"
    try:
        _score_function(key)
        _derivative_function(key, (False,) * len(traced.captures))
    except Unsupported as error:
        return f"score_mod: {error}"
    return None


@cache
def unsupported_mask(token: str) -> str | None:
    """Why a mask cannot be lowered, or None."""
    try:
        for key in _custom_keys(json.loads(token)):
            traced = trace.graph(key)
            if not traced.elementwise:
                return "mask_mod computes with whole vectors, not with single elements"
            _Writer().graph(traced.forward, _mask_inputs(traced, 0))
    except Unsupported as error:
        return f"mask_mod: {error}"
    return None


def _custom_keys(expression: list[Any]) -> list[str]:
    inner = [key for part in expression if isinstance(part, list) for key in _custom_keys(part)]
    return [expression[1], *inner] if expression[0] == "custom" else inner


def _arguments(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """(tensor, size, stride, size, stride, ...) of each."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
    places = []
    for tensor in tensors:
        sizes = [n for pair in zip(tensor.shape, tensor.stride(), strict=True) for n in pair]
        places.append((tensor.detach().to(device), *without_ones(*sizes)))
    return tuple(places)


@cache
def _score_function(key: str) -> Any:
    traced = trace.graph(key)
    writer = _Writer()
    result = writer.graph(traced.forward, _score_inputs(traced))
    writer.line(f"return spread({writer.text(result, 'f')}, score)")
    return writer.function(f"score_{key}", "score, b, h, q, k, arguments")


def _score_inputs(traced: Traced) -> list["_Value"]:
    return [_Value("score", torch.float32, axes=_BOTH), *_mask_inputs(traced, 0)]


def _mask_inputs(traced: Traced, first: int) -> list["_Value"]:
    examples = [node.meta["val"] for node in traced.captures]
    captures = [_Value("", t.dtype, capture=first + i, ndim=t.ndim) for i, t in enumerate(examples)]
    return [*_index_values(), *captures]


def _index_values() -> list["_Value"]:
    return [_Value(name, torch.int64, bounds, _BOTH & {name}) for name, bounds in _INDICES.items()]


@cache
def _derivative_function(key: str, wanted: tuple[bool, ...]) -> Any:
    """Reads first, then the graph of the derivative, then sums for the captured tensors."""
    traced = trace.graph(key)
    if traced.places is None or traced.backward is None:
        raise Unsupported("its derivative is not a graph of single elements")
    writer = _Writer()
    inputs = _score_inputs(traced)
    places = [writer.values(at) for at in writer.graph(traced.places, inputs)]
    reads = [writer.read(inputs[INDEX + capture], at) for capture, at in zip(traced.reads_of, places, strict=True)]
    outputs = writer.graph(traced.backward, [*inputs, *reads, _Value("grad", torch.float32, axes=_BOTH)])
    grad_score, *parts = outputs
    writer.line("if COLLECT:")
    writer.indent += 1
    writer.line("KEYS: tl.constexpr = 1 if k.shape[0] == 1 else 0")
    for capture, at, part in zip(traced.reads_of, places, parts, strict=True):
        if wanted[capture]:
            writer.collect(f"totals[{sum(wanted[:capture])}]", capture, at, part)
    writer.indent -= 1
    writer.line(f"return spread({writer.text(grad_score, 'f')}, score)")
    return writer.function(
        f"derivative_{key}", "score, b, h, q, k, arguments, totals, grad, valid, COLLECT: tl.constexpr"
    )


INDEX = 5  # captured tensors come after the score and four indices


@cache
def _mask_function(token: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]) -> Any:
    writer = _MaskWriter(shapes, dtypes)
    result = writer.expression(json.loads(token))
    writer.line(f"return (q == q) & {result}")
    return writer.function("mask", "b, h, q, k, shift, arguments")


_BOTH = frozenset("qk")


@dataclass(frozen=True)
class _Value:
    """A value in the text: its name, PyTorch's type, bounds of an integer, the indices among q and k it depends on.

    `number`: it is this constant. `capture`: it is this captured tensor, of `ndim` dimensions. `floating`: how to get
    the same whole number of a tile in float32 without converting every element, which costs as much as an exponential.
    """

    name: str
    dtype: torch.dtype
    bounds: Bounds = _INT64
    axes: frozenset[str] = frozenset()
    number: float | None = None
    capture: int | None = None
    ndim: int = 0
    floating: str | None = None

    @property
    def kind(self) -> str:
        """How it is held: "f" float32, "b" boolean, or an integer of the width that its bounds ask for."""
        if self.dtype.is_floating_point:
            return "f"
        if self.dtype is torch.bool:
            return "b"
        return "i32" if self.bounds[0] >= _INT32[0] and self.bounds[1] <= _INT32[1] else "i64"


_TYPES = {"f": "tl.float32", "b": "tl.int1", "i32": "tl.int32", "i64": "tl.int64"}


def _constant(number: Any, dtype: torch.dtype | None = None) -> _Value:
    if dtype is None:
        dtype = torch.bool if isinstance(number, bool) else torch.int64 if isinstance(number, int) else torch.float32
    bounds = (int(number), int(number)) if not dtype.is_floating_point else _INT64
    return _Value("", dtype, bounds, number=number)


class _Writer:
    """Writes the text of one function."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = 1
        self.count = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def bind(self, text: str, dtype: torch.dtype, axes: frozenset[str], bounds: Bounds = _INT64) -> _Value:
        """A new name for an expression; half precision rounds, as PyTorch would after each step."""
        if dtype in (torch.float16, torch.bfloat16):
            text = f"({text}).to(tl.{str(dtype).removeprefix('torch.')}).to(tl.float32)"
        self.count += 1
        name = f"v{self.count}"
        self.line(f"{name} = {text}")
        return _Value(name, dtype, bounds, axes)

    def text(self, value: _Value, kind: str) -> str:
        """The value, converted to a kind."""
        if value.capture is not None:
            value = self.read(value, [])
        if value.number is not None:
            return _literal(value.number, kind)
        if value.kind == kind:
            return value.name
        if kind == "f" and value.floating is not None:
            return value.floating
        return f"({value.name} != 0)" if kind == "b" else f"{value.name}.to({_TYPES[kind]})"

    def graph(self, module: fx.GraphModule, inputs: Sequence[_Value]) -> Any:
        """Writes every step; returns what the graph returns, nodes replaced by values."""
        known: dict[fx.Node, _Value] = {}
        rest = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(rest)
            elif node.op == "get_attr":
                tensor = getattr(module, str(node.target))
                if tensor.ndim:
                    raise Unsupported("it makes a table of its own; capture the table instead")
                known[node] = _constant(tensor.item(), tensor.dtype)
            elif node.op == "output":
                return _replaced(node.args[0], known)
            else:
                known[node] = self.step(node, _replaced(node.args, known))
        raise Unsupported("its graph has no end")

    def values(self, parts: Sequence[Any]) -> list[_Value]:
        if not all(isinstance(part, (_Value, bool, int, float)) for part in parts):
            raise Unsupported(f"there is no Triton for a step with the arguments {parts}")
        return [part if isinstance(part, _Value) else _constant(part) for part in parts]

    def step(self, node: fx.Node, arguments: Sequence[Any]) -> _Value:
        """One step, by its name in the tables."""
        name = _name(node)
        _single(node, name)
        dtype = node.meta["val"].dtype
        if name == "index":
            return self.read(arguments[0], self.places(arguments[1]))
        if name == "select":
            return self.read(arguments[0], self.places(arguments[2:]))
        if name in _MAKERS:
            return _constant(_MAKERS[name](arguments), dtype)
        if name == "clamp":
            return self.clamp([*arguments, None][:3], dtype)
        values = self.values(arguments[:1] if name in SAME else arguments)
        if name in ("where", "masked_fill"):
            condition, a, b = values if name == "where" else (values[1], values[2], values[0])
            return self.choose(condition, a, b, dtype)
        if node.kwargs.get("alpha", 1) != 1:
            values[1] = self.apply("mul", [values[1], _constant(node.kwargs["alpha"])], dtype)
        rounding = node.kwargs.get("rounding_mode")
        if rounding == "floor":
            name = "floor_divide"
        elif rounding is not None:
            raise Unsupported(f"there is no Triton for division with rounding_mode={rounding!r}")
        return self.apply(name, values, dtype)

    def places(self, parts: Sequence[Any]) -> list[_Value]:
        """The indices of one element."""
        places = self.values(parts)
        if any(place.dtype.is_floating_point or place.dtype is torch.bool for place in places):
            raise Unsupported("there is no Triton for an index that is not an integer")
        return places

    def clamp(self, arguments: Sequence[Any], dtype: torch.dtype) -> _Value:
        value, low, high = arguments
        for name, bound in (("clamp_min", low), ("clamp_max", high)):
            if bound is not None:
                value = self.apply(name, self.values([value, bound]), dtype)
        return value

    def choose(self, condition: _Value, a: _Value, b: _Value, dtype: torch.dtype) -> _Value:
        kind, bounds = self._integer("where", [a, b], dtype)
        one, other = self.text(a, kind), self.text(b, kind)
        if a.number is not None and b.number is not None:
            one = f"tl.cast({one}, {_TYPES[kind]})"
        chosen = self.text(condition, "b")
        if condition.number is not None:
            chosen = f"tl.cast({chosen}, tl.int1)"
        text = f"tl.where({chosen}, {one}, {other})"
        return self.bind(text, dtype, condition.axes | a.axes | b.axes, bounds)

    def apply(self, name: str, values: list[_Value], dtype: torch.dtype) -> _Value:
        """A step of the tables: its operands are converted to one kind."""
        axes = frozenset().union(*(value.axes for value in values))
        if name == "pow" and values[1].number == 2:
            name, values = "square", values[:1]
        missing = OMITTED.get(name, ())[len(values) - 1 :]
        values = [*values, *map(_constant, missing)]
        half = _half(values)
        if half is not None and name in COMPARE:
            values = [value if value.number is None else _in_half(value, half) for value in values]
        template, kind, bounds = self._template(name, values, dtype)
        if len(values) != len(set(re.findall(r"{(\d)}", template))):
            raise Unsupported(f"there is no Triton for {name} with {len(values)} operands")
        texts = [_rounded(self.text(value, kind), value, half) for value in values]
        # Functions of tensors take no plain number, and something must be one where all operands are numbers.
        for position in range(len(values) if name == "pow" else 1):
            if values[position].number is not None:
                texts[position] = f"tl.cast({texts[position]}, {_TYPES[kind]})"
        text = template.format(*texts, T=_TYPES[kind])
        wrapped = _wrapped(bounds, dtype)
        if wrapped is not None:
            text, bounds = wrapped[0].format(text), wrapped[1]
        elif kind == "i64" and _Value("", dtype, bounds).kind == "i32":
            text = f"({text}).to(tl.int32)"
        return replace(self.bind(text, dtype, axes, bounds), floating=self._floating(name, values, bounds))

    def _floating(self, name: str, values: list[_Value], bounds: Bounds) -> str | None:
        """See `_Value.floating`: sums and differences of rows and columns, where float32 holds every step exactly."""
        if frozenset().union(*(value.axes for value in values)) != _BOTH:
            return None
        exact = all(low >= -LONGEST and high <= LONGEST for low, high in (bounds, *(value.bounds for value in values)))
        if (
            name not in ("add", "sub", "neg", "abs")
            or not exact
            or any(value.dtype.is_floating_point for value in values)
        ):
            return None
        if any(value.axes == _BOTH and value.floating is None for value in values):
            return None
        return "(" + ARITHMETIC[name].format(*(self.text(value, "f") for value in values)) + ")"

    def _template(self, name: str, values: list[_Value], dtype: torch.dtype) -> tuple[str, str, Bounds]:
        """(text, kind of the operands, bounds of the result)."""
        if name in COMPARE:
            promoted = torch.float32 if any(value.dtype.is_floating_point for value in values) else torch.int64
            return COMPARE[name], self._integer("where", [values[0], values[-1]], promoted)[0], _INT64
        if name.startswith("logical_") or (dtype is torch.bool and name in TRUTH):
            return TRUTH[name], "b", _INT64
        table = ARITHMETIC if name in ARITHMETIC else FLOATING if dtype.is_floating_point else WHOLE
        if name not in table or dtype is torch.bool:
            raise Unsupported(f"there is no Triton for {name} on {str(dtype).removeprefix('torch.')}")
        kind, bounds = self._integer(name, values, dtype)
        return table[name], kind, bounds

    def _integer(self, name: str, values: list[_Value], dtype: torch.dtype) -> tuple[str, Bounds]:
        """(kind to compute in, bounds of the result)."""
        if dtype.is_floating_point:
            return "f", _INT64
        if dtype is torch.bool:
            return "b", _INT64
        rule = BOUNDS.get(name)
        operands = [(0, 1) if value.dtype is torch.bool else value.bounds for value in values]
        bounds = rule(*operands) if rule is not None else _INT64
        bounds = (max(bounds[0], _INT64[0]), min(bounds[1], _INT64[1]))
        wide = any(_Value("", torch.int64, one).kind == "i64" for one in (*operands, bounds))
        return ("i64" if wide else "i32"), bounds

    def read(self, tensor: _Value, at: Sequence[_Value]) -> _Value:
        """One element of a captured tensor for each element of the tile."""
        if tensor.capture is None:
            raise Unsupported("it indexes a tensor that it has computed")
        if len(at) != tensor.ndim:
            raise Unsupported("it computes with a whole captured tensor")
        offset = self.offset(tensor.capture, at, strided=True)
        loaded = f"tl.load(arguments[{tensor.capture}][0] + {offset})"
        axes = frozenset().union(*(index.axes for index in at)) if at else frozenset()
        if tensor.dtype.is_floating_point:
            return replace(self.bind(f"{loaded}.to(tl.float32)", torch.float32, axes), dtype=tensor.dtype)
        if tensor.dtype is torch.bool:
            return self.bind(f"({loaded} != 0)", torch.bool, axes)
        limits = torch.iinfo(tensor.dtype)
        bounds = (limits.min, limits.max)
        kind = _Value("", tensor.dtype, bounds).kind
        return self.bind(f"{loaded}.to({_TYPES[kind]})", tensor.dtype, axes, bounds)

    def offset(self, capture: int, at: Sequence[_Value], strided: bool) -> str:
        """Where an element lies: by the tensor's strides, or in a contiguous tensor of the same shape."""
        terms = []
        for dim, index in enumerate(at):
            size, stride = (f"whole(arguments[{capture}][{1 + 2 * dim + part}])" for part in range(2))
            if index.number is not None:
                place = f"{index.number}" if index.number >= 0 else f"({size} + {index.number})"
            else:
                place = f"wrapped({self.text(index, index.kind)}, {size})"
            terms.append((place, size, stride))
        if strided:
            return " + ".join(f"{place} * {stride}" for place, _, stride in terms) or "0"
        text = "0"
        for place, size, _ in terms:
            text = f"({text} * {size} + {place})"
        return text

    def collect(self, pointer: str, capture: int, at: Sequence[_Value], part: _Value) -> None:
        """Adds a tile's part to a gradient: first summed over what the place does not depend on."""
        axes = frozenset().union(*(index.axes for index in at)) if at else frozenset()
        value = f"tl.where(valid, spread({self.text(part, 'f')}, score), 0.0)"
        if not axes:
            value = f"tl.sum({value})"
        elif axes != _BOTH:
            value = f"tl.sum({value}, axis={'KEYS' if axes == {'q'} else '1 - KEYS'}, keep_dims=True)"
        self.line(f'tl.atomic_add({pointer} + {self.offset(capture, at, strided=False)}, {value}, sem="relaxed")')

    def function(self, name: str, parameters: str) -> Any:
        """The function, compiled when a kernel calls it; its text is where `inspect` looks for it."""
        text = "\n".join(["@triton.jit", f"def {name}({parameters}):", *self.lines, ""])
        place = f"<flashtile {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
        linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
        names: dict[str, Any] = {"__name__": __name__, "triton": triton, "tl": tl, **HELPERS}
        exec(compile(text, place, "exec"), names)
        return names[name]


def _name(node: fx.Node) -> str:
    """The step's name; one in place is the plain one, for nobody reads what it overwrote."""
    name: str = getattr(getattr(node.target, "overloadpacket", None), "__name__", str(node.target))
    if not name.endswith("_") or name.endswith("__"):
        return name
    overwritten: Any = node.args[0]
    if any(user is not node and user > node for user in overwritten.users):
        raise Unsupported(f"{name} overwrites what is read again")
    return name[:-1]


def _single(node: fx.Node, name: str) -> None:
    """A step must take numbers to a number, but for reads, and say nothing that no rule here understands."""
    sources = [] if name in ("index", "select") else node.all_input_nodes
    if any(step.op != "placeholder" and step.meta["val"].ndim for step in (node, *sources) if "val" in step.meta):
        raise Unsupported(f"{name} computes with vectors")
    unknown = set(node.kwargs) - _UNDERSTOOD - ({"alpha"} if name in ("add", "sub") else set())
    if unknown:
        raise Unsupported(f"there is no Triton for {name} with {', '.join(sorted(unknown))}")


_UNDERSTOOD = {"rounding_mode", "dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking"}


def _half(values: Sequence[_Value]) -> torch.dtype | None:
    """The half-precision type, if any, that all operands are taken to before they are computed with."""
    floating = {value.dtype for value in values if value.dtype.is_floating_point and value.number is None}
    half = floating.pop() if len(floating) == 1 else None
    return half if half in (torch.float16, torch.bfloat16) else None


def _in_half(value: _Value, half: torch.dtype) -> _Value:
    return _constant(torch.tensor(value.number, dtype=half).item())


def _rounded(text: str, value: _Value, half: torch.dtype | None) -> str:
    """An integer beside half precision rounds to it, a plain number does not."""
    if half is None or value.dtype.is_floating_point or value.number is not None:
        return text
    return f"{text}.to(tl.{str(half).removeprefix('torch.')}).to(tl.float32)"


def _wrapped(bounds: Bounds, dtype: torch.dtype) -> tuple[str, Bounds] | None:
    """(template, bounds) for an integer that may leave the range of its type, and then comes in at the other end."""
    if dtype.is_floating_point or dtype in (torch.bool, torch.int64):
        return None
    limits = torch.iinfo(dtype)
    if bounds[0] >= limits.min and bounds[1] <= limits.max:
        return None
    return f"({{}}).to(tl.{str(dtype).removeprefix('torch.')}).to(tl.int32)", (limits.min, limits.max)


def _replaced(arguments: Any, known: dict[fx.Node, _Value]) -> Any:
    """Arguments of a step, nodes replaced by their values."""
    if isinstance(arguments, fx.Node):
        return known[arguments]
    if isinstance(arguments, (list, tuple)):
        return [_replaced(argument, known) for argument in arguments]
    return arguments


def _literal(number: float, kind: str) -> str:
    if kind == "f":
        value = float(number)
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    return repr(bool(number)) if kind == "b" else repr(int(number))


_MAKERS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "full": lambda arguments: arguments[1],
    "full_like": lambda arguments: arguments[1],
    "new_full": lambda arguments: arguments[2],
    "scalar_tensor": lambda arguments: arguments[0],
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda _: 1),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda _: 0),
}
"""Steps whose result is a constant."""


class _MaskWriter(_Writer):
    """Writes a mask: the leaves by templates, functions by their graphs, in the order in which tensors are given."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.shapes, self.dtypes, self.next = shapes, dtypes, 0

    def expression(self, parts: list[Any]) -> str:
        kind, *rest = parts
        return getattr(self, f"_{kind}")(*rest)

    def _take(self, *at: str) -> str:
        """One element of the next tensor: `at` its last indices, dimensions of size 1 read at 0."""
        index, shape = self.next, self.shapes[self.next]
        self.next += 1
        terms = [
            f"wrapped({place}, whole(arguments[{index}][{1 + 2 * dim}])) * whole(arguments[{index}][{2 + 2 * dim}])"
            for dim, place in enumerate(at[len(at) - len(shape) :])
            if shape[dim] > 1
        ]
        return f"tl.load(arguments[{index}][0] + {' + '.join(terms) or '0'})"

    def _and(self, left: list[Any], right: list[Any]) -> str:
        return f"({self.expression(left)} & {self.expression(right)})"

    def _or(self, left: list[Any], right: list[Any]) -> str:
        return f"({self.expression(left)} | {self.expression(right)})"

    def _full(self) -> str:
        return "(k == k)"

    def _causal(self, alignment: str) -> str:
        return self._window(-1, 0, alignment)

    def _window(self, left: int, right: int, alignment: str) -> str:
        diagonal = _diagonal(alignment)
        limits = [f"(k <= {diagonal} + {right})"] if right >= 0 else []
        limits += [f"(k >= {diagonal} - {left})"] if left >= 0 else []
        return f"({' & '.join(limits) or '(k == k)'})"

    def _chunk(self, size: int, alignment: str) -> str:
        return f"(floor_divide({_diagonal(alignment)}, {size}) == k // {size})"

    def _prefix(self, length: int) -> str:
        return f"(k < {self._take('b') if length < 0 else length})"

    def _document(self) -> str:
        return f"({self._take('b', 'q')} == {self._take('b', 'k')})"

    def _dense(self) -> str:
        return f"({self._take('b', 'h', 'q', 'k')} != 0)"

    def _block(self, block_q: int, block_kv: int, inner: list[Any]) -> str:
        self.count += 1
        state = f"state{self.count}"
        self.line(f"{state} = {self._take('b', 'h', f'(q // {block_q})', f'(k // {block_kv})')}")
        return f"(({state} == {FULL}) | (({state} == {PARTIAL}) & {self.expression(inner)}))"

    def _custom(self, key: str, arity: int) -> str:
        traced = trace.graph(key)
        result = self.graph(traced.forward, _mask_inputs(traced, self.next))
        self.next += arity
        return self.text(result, "b")


def _diagonal(alignment: str) -> str:
    return "(q + shift)" if alignment == "bottom_right" else "q"
