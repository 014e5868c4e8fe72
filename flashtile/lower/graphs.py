"""A traced graph of scalars, written step by step: what goes into it, and what each aten step asks for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from flashtile.lower import operations
from flashtile.lower.rules import SAME, Unsupported
from flashtile.lower.source import Source
from flashtile.lower.values import BOTH, Value, constant, index_values
from flashtile.scalar_graph import Traced

FIRST_CAPTURE = 5
"""Among a score function's inputs, captured tensors come after the score and four indices."""


def score_inputs(traced: Traced) -> list[Value]:
    """The score, four indices, the captured tensors."""
    return [Value("score", torch.float32, axes=BOTH), *mask_inputs(traced, 0)]


def mask_inputs(traced: Traced, first: int) -> list[Value]:
    """Four indices and the captured tensors, which are the hook's arguments from `first` on."""
    examples = [node.meta["val"] for node in traced.captures]
    captures = [Value("", t.dtype, capture=first + i, ndim=t.ndim) for i, t in enumerate(examples)]
    return [*index_values(), *captures]


def write(source: Source, module: fx.GraphModule, inputs: Sequence[Value]) -> Any:
    """Writes every step; returns what the graph returns, nodes replaced by values."""
    known: dict[fx.Node, Value] = {}
    rest = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(rest)
        elif node.op == "get_attr":
            tensor = getattr(module, str(node.target))
            if tensor.ndim:
                raise Unsupported("it makes a table of its own; capture the table instead")
            known[node] = constant(tensor.item(), tensor.dtype)
        elif node.op == "output":
            return _replaced(node.args[0], known)
        else:
            known[node] = _step(source, node, _replaced(node.args, known))
    raise Unsupported("its graph has no end")


def operands(parts: Sequence[Any]) -> list[Value]:
    """Arguments of a step, or the indices of an element, as values."""
    if not all(isinstance(part, (Value, bool, int, float)) for part in parts):
        raise Unsupported(f"there is no Triton for a step with the arguments {parts}")
    return [part if isinstance(part, Value) else constant(part) for part in parts]


def _replaced(arguments: Any, known: dict[fx.Node, Value]) -> Any:
    """Arguments of a step, nodes replaced by their values."""
    if isinstance(arguments, fx.Node):
        return known[arguments]
    if isinstance(arguments, (list, tuple)):
        return [_replaced(argument, known) for argument in arguments]
    return arguments


def _step(source: Source, node: fx.Node, arguments: Sequence[Any]) -> Value:
    """One step, by its name: those whose arguments are not all operands here, the others by the tables."""
    name = _name(node)
    _single(node, name)
    if source.quick and name == "tanh" and _added(node, 1.0):
        name = "quick_tanh"
    dtype = node.meta["val"].dtype
    if name == "index":
        return source.read(arguments[0], _places(arguments[1]))
    if name == "select":
        return source.read(arguments[0], _places(arguments[2:]))
    if name in _MAKERS:
        return constant(_MAKERS[name](arguments), dtype)
    if name == "clamp":
        return _clamp(source, [*arguments, None][:3], dtype)
    values = operands(arguments[:1] if name in SAME else arguments)
    if name in ("where", "masked_fill"):
        condition, a, b = values if name == "where" else (values[1], values[2], values[0])
        return operations.choose(source, condition, a, b, dtype)
    if node.kwargs.get("alpha", 1) != 1:
        values[1] = operations.apply(source, "mul", [values[1], constant(node.kwargs["alpha"])], dtype)
    rounding = node.kwargs.get("rounding_mode")
    if rounding == "floor":
        name = "floor_divide"
    elif rounding is not None:
        raise Unsupported(f"there is no Triton for division with rounding_mode={rounding!r}")
    return operations.apply(source, name, values, dtype)


_MOST = 1000.0
"""What an error of 2e-7 may be multiplied by: then it is less than what half precision rounds off scores."""


_PASSING = ("add", "sub", "rsub", "neg", "where", *SAME)
"""Steps whose result is as far off as their operand."""


def _added(node: fx.Node, factor: float) -> bool:
    """Whether all that becomes of a number is that it is added to scores, `factor` times; or it is a tanh on the way
    back, where a gradient is multiplied by 1 - tanh^2."""
    if factor > _MOST:
        return False
    for user in node.users:
        name = "" if user.op == "output" else _name(user)
        if name in ("mul", "div") and user.args[0] is node and isinstance(user.args[1], (int, float)) and user.args[1]:
            size = abs(float(user.args[1]))
            if not _added(user, factor * size if name == "mul" else factor / size):
                return False
        elif name in ("", "tanh_backward"):
            continue
        elif name not in _PASSING or user.kwargs.get("alpha", 1) != 1 or not _added(user, factor):
            return False
    return True


_MAKERS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "full": lambda arguments: arguments[1],
    "full_like": lambda arguments: arguments[1],
    "new_full": lambda arguments: arguments[2],
    "scalar_tensor": lambda arguments: arguments[0],
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda _: 1),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda _: 0),
}
"""Steps whose result is a constant."""


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


def _places(parts: Sequence[Any]) -> list[Value]:
    """The indices of one element."""
    places = operands(parts)
    if any(place.dtype.is_floating_point or place.dtype is torch.bool for place in places):
        raise Unsupported("there is no Triton for an index that is not an integer")
    return places


def _clamp(source: Source, arguments: Sequence[Any], dtype: torch.dtype) -> Value:
    value, low, high = arguments
    for name, bound in (("clamp_min", low), ("clamp_max", high)):
        if bound is not None:
            value = operations.apply(source, name, operands([value, bound]), dtype)
    return value
