"""FlexAttention-style functions, traced once to a small graph of scalar operations and its derivative.

`score_mod(score, b, h, q_idx, kv_idx)` and `mask_mod(b, h, q_idx, kv_idx)` are ordinary PyTorch functions of scalars.
Each is traced with 0-d tensors to an aten graph in which captured tensors are inputs (see `scalar_graph` for what is
done with it). Graphs live in a process-wide registry under a key made of their content.
"""

import functools
import hashlib
import os
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from flashtile import captures, glance, recording
from flashtile.check import modifiers as check
from flashtile.forgetting import make_room
from flashtile.scalar_graph import Kind, Traced

_ROUTES_KEPT = 1024


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


_Paths = tuple[captures.Path, ...]
_graphs: dict[str, Traced] = {}
_routes: dict[Any, _Route] = {}
# torch.fx patches the whole process while it traces: one thread at a time, and no process is forked meanwhile, for the
# child would keep the patches, and a lock that nobody opens.
_tracing = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_tracing.acquire, after_in_parent=_tracing.release, after_in_child=_tracing.release)
_composed: dict[Any, tuple[str, tuple[int | Tensor, ...]]] = {}
_calling: set[types.CodeType] = set()  # code of functions that call modules


def lift(function: Callable[..., Any], kind: Kind) -> Lifted:
    """Traces `function`, or finds what an equal function was traced to.

    Raises:
        TypeError, ValueError: it cannot be called with scalars, branches on a value, draws random numbers, or does
            not return one number (a mask: one boolean).
    """
    if torch.compiler.is_compiling():
        return _lift_compiled(function, kind)
    seen = glance.known(function, kind)
    if seen is not None:
        return Lifted(*seen)
    route, leaves = _route(function, kind)
    if route.paths is None:
        return Lifted(route.key, route.tensors)
    glance.note(function, kind, route.key, route.paths, leaves)
    by_path = {leaf.path: leaf.value for leaf in leaves}
    return Lifted(route.key, tuple(by_path[path] for path in route.paths))


def _lift_compiled(function: Any, kind: Kind) -> Lifted:
    """The compiler runs `_constant_route` and follows the rest, so that tensors are inputs of its graph.

    Methods and partials go in pieces, for the compiler cannot hand them over whole.
    """
    if isinstance(function, types.MethodType):
        key, paths, numbers = _constant_route(function.__func__, kind, "method", function.__self__)
    elif isinstance(function, functools.partial):
        given = function.keywords
        pieces = (len(function.args), tuple(given), *function.args, *given.values())
        key, paths, numbers = _constant_route(function.func, kind, "partial", *pieces)
    else:
        key, paths, numbers = _constant_route(function, kind)
    # They are equal; comparing them makes the compiler watch them, so that a changed number is compiled anew.
    all(captures.fetch(function, path) == number for path, number in numbers)
    return Lifted(key, tuple([captures.fetch(function, path) for path in paths]))


def _constant_route(
    function: Any, kind: Kind, form: str = "plain", *pieces: Any
) -> tuple[str, _Paths, tuple[tuple[captures.Path, Any], ...]]:
    """Called by the compiler while it traces: the function is real, the result becomes a constant of the graph."""
    if form == "method":
        function = types.MethodType(function, *pieces)
    elif form == "partial":
        count, names, *given = pieces
        function = functools.partial(function, *given[:count], **dict(zip(names, given[count:], strict=True)))
    route, leaves = _route(function, kind)
    if route.paths is None:
        check.without_path(function, kind)
    numbers = [(leaf.path, leaf.value) for leaf in leaves if type(leaf.value) in (bool, int, float)]
    return route.key, route.paths or (), tuple(number for number in numbers if _followed(*number))


def _followed(path: captures.Path, number: float) -> bool:
    """Whether the compiler can read a number by its path and compare it."""
    steps = [argument for step, argument in path if step == "attr"]
    return number == number and all(step in ("__func__", "__self__") or not step.startswith("__") for step in steps)


# What torch.compiler.assume_constant_result sets, without importing the compiler.
_constant_route._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _route(function: Callable[..., Any], kind: Kind) -> tuple[_Route, list[captures.Leaf]]:
    body = captures.code(function)
    leaves = captures.leaves(function, body in _calling)
    content = captures.content(leaves)
    route = None if content is None else _routes.get((kind, content))
    if route is None:
        with _tracing:
            trace = _trace_apart if torch.compiler.is_compiling() else _trace
            traced, tensors, watch = trace(function, kind, leaves)
        if watch.called and body is not None and body not in _calling:
            _calling.add(body)
            return _route(function, kind)
        known = {id(leaf.value) for leaf in leaves}
        found = all(id(tensor) in known for tensor in tensors)
        _graphs.setdefault(traced.key, traced)
        places = {id(leaf.value): leaf.path for leaf in leaves}
        paths = tuple(places[id(tensor)] for tensor in tensors) if found else None
        route = _Route(traced.key, paths, () if found else tensors)
        if found and content is not None:
            _remember((kind, content), route)
    return route, leaves


def _remember(content: Any, route: _Route) -> None:
    """Keeps the newest routes; an evicted function is traced again and finds its graph by key."""
    make_room(_routes, _ROUTES_KEPT)
    _routes[content] = route


def compose(name: str, kind: Kind, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Lifted:
    """Traces a function of the package's own, made of graphs and tables: `function(tensors, *indices)`.

    `name` says all that the function does; calls with equal names and tensors alike share one graph.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    alike = tuple((tensor.dtype, tuple(tensor.shape), tensor.device, places[id(tensor)]) for tensor in tensors)
    known = (name, kind, alike)
    made = _composed.get(known)
    if made is None:
        leaves = [captures.Leaf((), tensor) for tensor in tensors]
        with _tracing:
            traced, found, _ = _trace(functools.partial(function, tensors), kind, leaves, tensors)
        _graphs.setdefault(traced.key, traced)
        make_room(_composed, _ROUTES_KEPT)
        made = traced.key, tuple(places.get(id(tensor), tensor) for tensor in found)
        _composed[known] = made
    key, order = made
    return Lifted(key, tuple(tensors[place] if isinstance(place, int) else place for place in order))


def graph(key: str) -> Traced:
    """The graph of that key.

    Raises:
        ValueError: this process has not traced it.
    """
    check.known(key, _graphs)
    return _graphs[key]


def _trace_apart(*arguments: Any) -> tuple[Traced, tuple[Tensor, ...], recording.Watch]:
    """In a thread of its own: `torch.export` watches this one and would take the steps for the caller's."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_trace, *arguments).result()


def _trace(
    function: Callable[..., Any], kind: Kind, leaves: Sequence[captures.Leaf], captured: Sequence[Tensor] = ()
) -> tuple[Traced, tuple[Tensor, ...], recording.Watch]:
    """(the graph, its captured tensors, what was seen on the way); `captured`: see `recording.run`."""
    check.signature(function, kind)
    device = next((leaf.value.device for leaf in leaves if isinstance(leaf.value, Tensor)), torch.device("cpu"))
    module, examples, watch = recording.run(function, kind, device, torch.float32, captured)
    tensors, text = recording.finish(module, function, kind, watch)
    metadata = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]
    key = hashlib.sha256(f"{kind}{module.code}{metadata}{text}".encode()).hexdigest()[:16]
    traced = Traced(key, kind, module, examples, tensors)
    if kind == "score" and ("float32" in module.code + text or any(tensor.is_floating_point() for tensor in tensors)):
        # `.to(score.dtype)` and constants in the score's type would round what a float64 call computes.
        module, examples, watch = recording.run(function, kind, device, torch.float64, captured)
        same, _ = recording.finish(module, function, kind, watch)
        if [id(tensor) for tensor in same] == [id(tensor) for tensor in tensors]:
            traced.double = Traced(key, kind, module, examples, tensors)
    return traced, tensors, watch
