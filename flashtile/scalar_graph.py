"""A traced function of scalars, run on tiles: its values and its vector-Jacobian products.

Everything that happens to a scalar happens to a tile of scalars by broadcasting, if each step that depends on an index
is pointwise or reads one element of a captured tensor. For those graphs the derivative is a graph too, in which the
reads are inputs; what flows back to a read is added up where it was read. Other graphs (vectors inside) are mapped by
`torch.vmap` and differentiated by autograd.
"""

from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Kind = Literal["score", "mask"]
_MAKES = ("alias", "clone", "detach", "lift_fresh_copy", "_to_copy", "full_like", "ones_like", "zeros_like")
_MAKES_OTHERS = ("new_full", "new_ones", "new_zeros")
_ELEMENT_BY_ELEMENT = {
    **{getattr(torch.ops.aten, name).default: 0 for name in (*_MAKES, *_MAKES_OTHERS)},
    torch.ops.aten.bucketize.Tensor: 0,
    torch.ops.aten.floor_divide.Scalar: 0,
    torch.ops.aten.isin.Tensor_Tensor: 0,
    torch.ops.aten.searchsorted.Tensor: 1,
    torch.ops.aten.take.default: 1,
}
"""Steps that act on each element of one operand, at that place, beside those that PyTorch tags as pointwise."""


class Traced:
    """The graph of one function. `forward`: [score,] b, h, q_idx, kv_idx, *captures -> score or bool, all scalars."""

    def __init__(
        self, key: str, kind: Kind, forward: fx.GraphModule, examples: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> None:
        self.key, self.kind, self.forward = key, kind, forward
        self.inputs = len(examples)
        self.captures = [node for node in forward.graph.nodes if node.op == "placeholder"][self.inputs :]
        self.elementwise = self._is_elementwise()
        self._example = list(examples)
        self.double: Traced | None = None  # the same function of a float64 score, where that is another graph
        self._scalar = _beside_inputs(forward)
        self._tiled = _beside_inputs(_on_tiles(forward, self.captures))
        reads = self._reads() if kind == "score" and self.elementwise else None
        self.reads_of = [self.captures.index(node) for node, _ in reads or ()]
        self.places: fx.GraphModule | None = None
        self.backward: fx.GraphModule | None = None
        self._tiled_backward: fx.GraphModule | None = None
        if reads is not None:
            self.places, self.backward = self._derive(reads, tensors)
            inputs = [node for node in self.backward.graph.nodes if node.op == "placeholder"]
            captures = inputs[self.inputs : self.inputs + len(self.captures)]
            self._tiled_backward = _beside_inputs(_on_tiles(self.backward, captures))

    def evaluate(
        self, score: Tensor | None, b: Tensor, h: Tensor, q: Tensor, k: Tensor, tensors: Sequence[Tensor]
    ) -> Tensor:
        """The function on a tile.

        Args:
            score: (batch, heads, queries, keys), None for a mask.
            b, h, q, k: int64 indices of shapes (B, 1, 1, 1), (1, H, 1, 1), (1, 1, Q, 1), (1, 1, 1, K).
            tensors: the captured tensors, as in `Lifted`.

        Returns:
            Tensor: broadcastable to (batch, heads, queries, keys), in the score's dtype; a mask's is bool.
        """
        if self.double is not None and score is not None and score.dtype is torch.float64:
            return self.double.evaluate(score, b, h, q, k, tensors)
        if self.elementwise:
            result: Tensor = self._tiled(*([] if score is None else [score]), b, h, q, k, *tensors)
        else:
            result = self._mapped(score, b, h, q, k, tensors)
        return result if score is None else result.to(score.dtype)

    def _mapped(
        self, score: Tensor | None, b: Tensor, h: Tensor, q: Tensor, k: Tensor, tensors: Sequence[Tensor]
    ) -> Tensor:
        """The function under torch.vmap, for graphs with vectors inside."""
        leading = [] if score is None else [0]
        mapped: Callable[..., Tensor] = self._scalar
        for place in (3, 2, 1, 0):
            index = [0 if place == position else None for position in range(4)]
            mapped = torch.vmap(mapped, in_dims=(*leading, *index, *(None for _ in tensors)))
        scores = [] if score is None else [score]
        return mapped(*scores, *(part.flatten() for part in (b, h, q, k)), *tensors)

    def derivative(
        self,
        score: Tensor,
        b: Tensor,
        h: Tensor,
        q: Tensor,
        k: Tensor,
        tensors: Sequence[Tensor],
        grad: Tensor,
        wanted: Sequence[bool],
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The vector-Jacobian product on a tile.

        Args:
            grad: (batch, heads, queries, keys), the gradient of `evaluate`'s result. The rest as there.
            wanted: one flag a captured tensor.
            hidden: bool, broadcastable to the tile: where `grad` is 0 and the derivative, even NaN, counts for nothing
                (graphs with vectors inside add 0 * NaN to their captures all the same).

        Returns:
            The gradient of the score, and for each wanted capture its gradient summed over the tile, in its own shape
            and the score's dtype. Sums run in a fixed order, so they repeat bit for bit.
        """
        if self.double is not None and score.dtype is torch.float64:
            return self.double.derivative(score, b, h, q, k, tensors, grad, wanted, hidden)
        # A derivative that was traced with a float32 score has casts that would round what a float64 call computes.
        rounds = score.dtype is torch.float64 and self._example[0].dtype is not torch.float64
        if self._tiled_backward is None or self.places is None or rounds:
            return self._mapped_derivative((score, b, h, q, k), tensors, grad, wanted)
        places = self.places(score, b, h, q, k, *tensors)
        reads = [
            tensors[c][tuple(at)] if at else tensors[c].view(1, 1, 1, 1)
            for c, at in zip(self.reads_of, places, strict=True)
        ]
        grad_score, *grad_reads = self._tiled_backward(score, b, h, q, k, *tensors, *reads, grad)
        totals = [
            torch.zeros(tensor.shape, dtype=score.dtype, device=tensor.device) if want else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ]
        for capture, at, part in zip(self.reads_of, places, grad_reads, strict=True):
            total = totals[capture]
            if total is not None:
                part = part.to(score.dtype).expand(score.shape)
                _scatter_add(total, at, part if hidden is None else part.masked_fill(hidden, 0.0))
        return grad_score.to(score.dtype).expand(score.shape), totals

    def _mapped_derivative(
        self, arguments: tuple[Tensor, ...], tensors: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """By autograd, in a thread of its own: inside an operator this thread's autograd is switched off."""

        def run() -> tuple[Tensor, list[Tensor | None]]:
            with torch.enable_grad():
                score = arguments[0].detach().requires_grad_()
                leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
                b, h, q, k = arguments[1:]
                result = self.evaluate(score, b, h, q, k, leaves).expand(score.shape)
                sources = [score, *(leaf for leaf, want in zip(leaves, wanted, strict=True) if want)]
                if not result.requires_grad:
                    zeros = [torch.zeros_like(t) if want else None for t, want in zip(leaves, wanted, strict=True)]
                    return torch.zeros_like(score), zeros
                found = torch.autograd.grad(result, sources, grad, allow_unused=True, materialize_grads=True)
            rest = iter(found[1:])
            return found[0], [next(rest) if want else None for want in wanted]

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    def _is_elementwise(self) -> bool:
        """Whether all that depends on an index or a score is pointwise on scalars, so that broadcasting maps the graph.

        A scalar's sum is itself, a tile's is not: no step counts but those known to act on each element by itself.
        """
        free = _dependent(self.forward.graph, self.captures)
        for node in free:
            value = node.meta.get("val")
            if node.target is torch.ops.aten.index.Tensor:
                if _unread(node):
                    return False
            elif node.op == "call_function" and not (
                isinstance(value, Tensor) and value.ndim == 0 and _acts(node, free)
            ):
                return False
        return True

    def _reads(self) -> list[tuple[fx.Node, fx.Node]] | None:
        """(capture, node that reads one element of it) for the floating captures; None if one is used otherwise."""
        reads = []
        for capture in self.captures:
            value = capture.meta["val"]
            if not value.dtype.is_floating_point:
                continue
            if value.ndim == 0:
                reads.append((capture, capture))
                continue
            for user in capture.users:
                if user.target is not torch.ops.aten.index.Tensor or user.args[0] is not capture or _unread(user):
                    return None
                reads.append((capture, user))
        return reads

    def _derive(
        self, reads: list[tuple[fx.Node, fx.Node]], tensors: Sequence[Tensor]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """(where each read reads, the derivative): inputs as `forward`, the derivative's followed by reads and grad."""
        places = [[] if node is capture else node.args[1] for capture, node in reads]
        where = _with_output(self.forward, places)
        core = self._core([node for _, node in reads])
        examples = [*self._example, *(tensor.detach() for tensor in tensors)]
        device = self._example[0].device
        values = [torch.zeros((), dtype=node.meta["val"].dtype, device=device) for _, node in reads]

        def derivative(*arguments: Tensor) -> list[Tensor]:
            inputs, grad = arguments[:-1], arguments[-1]
            first = len(inputs) - len(values)
            with torch.enable_grad():
                score, *read = (x.detach().requires_grad_() for x in (inputs[0], *inputs[first:]))
                result = core(score, *inputs[1:first], *read).to(grad.dtype)
                sources = [score, *read]
                if not result.requires_grad:
                    return [torch.zeros_like(source) for source in sources]
                return list(torch.autograd.grad(result, sources, grad, allow_unused=True, materialize_grads=True))

        backward = make_fx(derivative)(*examples, *values, torch.zeros((), device=device))
        backward.graph.eliminate_dead_code()
        backward.recompile()
        return where, backward

    def _core(self, reads: list[fx.Node]) -> fx.GraphModule:
        """The forward graph with each read replaced by an input."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        nodes = list(self.forward.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                copies[node] = graph.node_copy(node)
        for position, read in enumerate(reads):
            copies[read] = graph.placeholder(f"read_{position}")
        for node in nodes:
            if node not in copies and node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        output = next(node for node in nodes if node.op == "output")
        graph.output(fx.node.map_arg(output.args[0], copies.__getitem__))
        graph.eliminate_dead_code()
        return fx.GraphModule(self.forward, graph)


def _dependent(graph: fx.Graph, captures: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that depend on any input but the captured tensors, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        own_input = node.op == "placeholder" and node not in captures
        if own_input or (node.op == "call_function" and any(source in found for source in node.all_input_nodes)):
            found[node] = None
    return found


def _acts(node: fx.Node, free: Container[fx.Node]) -> bool:
    """Whether a step acts on each element by itself."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target is torch.ops.aten.floor_divide.default:
        return True
    place = _ELEMENT_BY_ELEMENT.get(node.target)
    return place is not None and all(
        position == place or source not in free
        for position, source in enumerate(node.args)
        if isinstance(source, fx.Node)
    )


def _on_tiles(module: fx.GraphModule, captures: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph as it runs on tiles: single numbers get the tile's number of dimensions.

    A tensor without dimensions gives way to one that has some when PyTorch chooses a type: a bfloat16 tile times a
    float32 number is bfloat16, where on scalars, and so here, it is float32.
    """
    free = _dependent(module.graph, captures)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        value = node.meta.get("val")
        if node in free or not isinstance(value, Tensor) or value.ndim > 0:
            continue
        if any(user in free for user in node.users):
            copies[node] = graph.call_function(torch.ops.aten.view.default, (copies[node], [1, 1, 1, 1]))
    return fx.GraphModule(module, graph)


def _beside_inputs(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its constants on the device of its inputs, wherever it was traced."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    first = None
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        elif first is not None and "device" in node.kwargs and not node.all_input_nodes:
            rest = {name: value for name, value in node.kwargs.items() if name != "device"}
            copies[node] = graph.call_function(_made_beside, (first, node.target, *node.args), rest)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            first = copies[node] if first is None else first
            if node.op == "get_attr":
                copies[node] = graph.call_function(_moved_beside, (first, copies[node]))
    return fx.GraphModule(module, graph)


def _made_beside(other: Tensor, make: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    return make(*arguments, **options, device=other.device)


def _moved_beside(other: Tensor, constant: Tensor) -> Tensor:
    return constant.to(other.device)


def _with_output(module: fx.GraphModule, output: Any) -> fx.GraphModule:
    """The same graph with another output, made of its nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.node.map_arg(output, copies.__getitem__))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _unread(node: fx.Node) -> bool:
    """Whether an aten.index gives more than one element."""
    source: Any = node.args[0]
    parts: Any = node.args[1]
    value = source.meta.get("val")
    return not isinstance(value, Tensor) or value.ndim != len(parts) or any(part is None for part in parts)


def _scatter_add(total: Tensor, at: Sequence[Tensor], part: Tensor) -> None:
    """total[at] += part, summed over all that reads the same element; `part` covers the tile, `at` broadcasts to it."""
    if not at:
        total += part.sum()
        return
    shape = torch.broadcast_shapes(*(index.shape for index in at))
    shape = (1,) * (part.ndim - len(shape)) + tuple(shape)
    summed = [dim for dim, size in enumerate(shape) if size == 1 and part.shape[dim] != 1]
    part = part.sum(summed, keepdim=True) if summed else part
    flat = torch.zeros((), dtype=torch.int64, device=part.device)
    for index, size, stride in zip(at, total.shape, total.stride(), strict=True):
        flat = flat + (index % size) * stride
    # One-dimensional index_add_ runs in order on the CPU, so the sum repeats bit for bit.
    total.view(-1).index_add_(0, flat.expand(part.shape).reshape(-1), part.reshape(-1))
