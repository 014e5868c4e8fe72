"""FlexAttention-style functions, traced once to a small graph of scalar operations and its derivative.

`score_mod(score, b, h, q_idx, kv_idx)` and `mask_mod(b, h, q_idx, kv_idx)` are ordinary PyTorch functions of scalars.
Each is traced with 0-d tensors to an aten graph in which captured tensors are inputs (see `scalar_graph` for what is
done with it). Graphs live in a process-wide registry under a key made of their content.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from flashtile import captures
from flashtile.check import modifiers as check
from flashtile.scalar_graph import Kind, Traced

_INDICES = ("b", "h", "q_idx", "kv_idx")
_ROUTES_KEPT = 1024
_BAKED = 64  # largest captured constant, in elements, that becomes part of the graph


@dataclass(frozen=True, eq=False)
class Lifted:
    """A traced function as the operators take it: the key of its graph and the tensors that it captures, live."""

    key: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Route:
    """Where a function's captured tensors are found: one path each; None if some have no path (traced every time)."""

    key: str
    paths: tuple[captures.Path, ...] | None
    tensors: tuple[Tensor, ...] = ()


_graphs: dict[str, Traced] = {}
_routes: dict[Any, _Route] = {}
# torch.fx patches the whole process while it traces: one thread at a time.
_tracing = RLock()


def lift(function: Callable[..., Any], kind: Kind) -> Lifted:
    """Traces `function`, or finds what an equal function was traced to.

    Raises:
        TypeError, ValueError: it cannot be called with scalars, branches on a value, draws random numbers, or does
            not return one number (a mask: one boolean).
    """
    if torch.compiler.is_compiling():
        key, paths = _constant_route(function, kind)
        return Lifted(key, tuple([captures.fetch(function, path) for path in paths]))
    route, leaves = _route(function, kind)
    if route.paths is None:
        return Lifted(route.key, route.tensors)
    by_path = {leaf.path: leaf.value for leaf in leaves}
    return Lifted(route.key, tuple(by_path[path] for path in route.paths))


def _constant_route(function: Callable[..., Any], kind: Kind) -> tuple[str, tuple[captures.Path, ...]]:
    """Called by the compiler while it traces: the function is real, the result becomes a constant of the graph."""
    route, _ = _route(function, kind)
    if route.paths is None:
        check.without_path(function, kind)
    return route.key, route.paths or ()


# What torch.compiler.assume_constant_result sets, without importing the compiler.
_constant_route._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _route(function: Callable[..., Any], kind: Kind) -> tuple[_Route, list[captures.Leaf]]:
    leaves = captures.leaves(function)
    content = captures.content(leaves)
    route = None if content is None else _routes.get((kind, content))
    if route is None:
        with _tracing:
            traced, tensors, found = _trace_apart(function, kind, leaves)
        _graphs.setdefault(traced.key, traced)
        places = {id(leaf.value): leaf.path for leaf in leaves}
        paths = tuple(places[id(tensor)] for tensor in tensors) if found else None
        route = _Route(traced.key, paths, () if found else tensors)
        if found and content is not None:
            _remember((kind, content), route)
    return route, leaves


def _remember(content: Any, route: _Route) -> None:
    """Keeps the newest routes; an evicted function is traced again and finds its graph by key."""
    if len(_routes) >= _ROUTES_KEPT:
        del _routes[next(iter(_routes))]
    _routes[content] = route


def graph(key: str) -> Traced:
    """The graph of that key.

    Raises:
        ValueError: this process has not traced it.
    """
    check.known(key, _graphs)
    return _graphs[key]


class _IndexByTensor(TorchFunctionMode):
    """`table[h, q_idx]` with 0-d tensors becomes one aten.index, where PyTorch would read the indices as numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            plain = all(isinstance(part, (Tensor, int)) and not isinstance(part, bool) for part in index)
            if plain and any(isinstance(part, Tensor) for part in index):
                device = args[0].device
                parts = [part if isinstance(part, Tensor) else torch.tensor(part, device=device) for part in index]
                return torch.ops.aten.index.Tensor(args[0], parts)
        return func(*args, **(kwargs or {}))


def _trace_apart(
    function: Callable[..., Any], kind: Kind, leaves: Sequence[captures.Leaf]
) -> tuple[Traced, tuple[Tensor, ...], bool]:
    """`_trace`; under a compiler in a thread of its own, where the modes with which torch.export records are not on."""
    if not torch.compiler.is_compiling():
        return _trace(function, kind, leaves)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_trace, function, kind, leaves).result()


def _trace(
    function: Callable[..., Any], kind: Kind, leaves: Sequence[captures.Leaf]
) -> tuple[Traced, tuple[Tensor, ...], bool]:
    """(the graph, its captured tensors, whether each of them has a path)."""

    def call(*arguments: Tensor) -> Tensor:
        with _IndexByTensor():
            result = function(*arguments)
        check.result(function, kind, result)
        return torch.as_tensor(result)

    check.signature(function, kind)
    device = next((leaf.value.device for leaf in leaves if isinstance(leaf.value, Tensor)), torch.device("cpu"))
    examples = [torch.zeros((), dtype=torch.int64, device=device) for _ in _INDICES]
    if kind == "score":
        examples.insert(0, torch.zeros((), device=device))
    try:
        with torch.no_grad():
            module = make_fx(call)(*examples)
    except (RuntimeError, IndexError) as error:
        check.untraceable(function, kind, error)
    check.no_randomness(function, kind, module.graph)
    known = {id(leaf.value) for leaf in leaves}
    tensors, text = _lift_captures(module, known)
    _merge_reads(module)
    metadata = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]
    key = hashlib.sha256(f"{kind}{module.code}{metadata}{text}".encode()).hexdigest()[:16]
    return Traced(key, kind, module, examples, tensors), tensors, all(id(tensor) in known for tensor in tensors)


def _lift_captures(module: fx.GraphModule, known: set[int]) -> tuple[tuple[Tensor, ...], str]:
    """Turns captured tensors into inputs, after the indices; small constants made inside the function stay.

    Returns the captured tensors, and the constants as text.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    found: dict[int, tuple[Tensor, list[fx.Node]]] = {}
    text = ""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if id(tensor) not in known and tensor.numel() <= _BAKED and not tensor.requires_grad:
            text += f"{node.target}={tensor.tolist()}{tensor.dtype};"
            continue
        found.setdefault(id(tensor), (tensor, []))[1].append(node)
    last = inputs[-1]
    for position, (_, nodes) in enumerate(found.values()):
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"capture_{position}")
        last.meta["val"] = nodes[0].meta.get("val")
        for node in nodes:
            node.replace_all_uses_with(last)
            module.graph.erase_node(node)
    module.recompile()
    return tuple(tensor for tensor, _ in found.values()), text


def _merge_reads(module: fx.GraphModule) -> None:
    """`table[h][q, k]` reads one element: two index steps become one."""
    index = torch.ops.aten.index.Tensor
    for node in list(module.graph.nodes):
        inner = node.args[0] if node.op == "call_function" and node.target is index else None
        if isinstance(inner, fx.Node) and inner.op == "call_function" and inner.target is index:
            first: Any = inner.args[1]
            second: Any = node.args[1]
            parts = [*first, *second]
            if all(part is not None for part in parts):
                node.args = (inner.args[0], parts)
    module.graph.eliminate_dead_code()
    module.recompile()
