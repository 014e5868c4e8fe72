"""From a function to a pure aten graph over scalars: run once on proxies, watched, captured tensors as inputs."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from flashtile.check import modifiers as check
from flashtile.scalar_graph import Kind

_INDICES = ("b", "h", "q_idx", "kv_idx")
_BAKED = 64  # largest constant made inside a function, in elements, that becomes part of the graph


class Watch(TorchFunctionMode):
    """Watches a function run on proxies.

    `table[h, q_idx]` with 0-d tensors becomes one aten.index, where PyTorch would read the indices as numbers. Tensors
    that come from outside of the function are noted: they are captured, others are its own constants. So are calls of
    modules.
    """

    def __init__(self, function: Any, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.made: dict[int, Tensor] = {id(tensor): tensor for tensor in arguments}
        self.captured: dict[int, Tensor] = {}
        self.called = False
        self._hook: Any = None

    def __enter__(self) -> "Watch":
        self._hook = register_module_forward_pre_hook(self._note_call)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _note_call(self, module: torch.nn.Module, _: Any) -> None:
        self.called |= module is not self.function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(args)
        self.note(tuple((kwargs or {}).values()))
        read = _read(*args) if func is torch.Tensor.__getitem__ else None
        result = func(*args, **(kwargs or {})) if read is None else read
        for tensor in _tensors(result):
            if id(tensor) not in self.captured:
                self.made[id(tensor)] = tensor
        return result

    def note(self, value: Any) -> None:
        for tensor in _tensors(value):
            if id(tensor) not in self.made:
                self.captured[id(tensor)] = tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _read(table: Tensor, index: Any) -> Tensor | None:
    """`table[index]` as aten.index, if all tensors in it are 0-d integers; None if it is anything else."""
    index = index if isinstance(index, tuple) else (index,)
    points = [isinstance(part, Tensor) and part.dtype not in (torch.bool, torch.uint8) for part in index]
    if not any(points) or any(isinstance(part, (bool, list)) for part in index):
        return None
    if all(point or isinstance(part, int) for point, part in zip(points, index, strict=True)):
        return torch.ops.aten.index.Tensor(table, [_as_index(part, table) for part in index])
    if any(
        isinstance(part, Tensor) and (part.ndim > 0 or not point) for point, part in zip(points, index, strict=True)
    ):
        return None
    picked = table[tuple(slice(None) if point else part for point, part in zip(points, index, strict=True))]
    named = sum(part is not None and part is not Ellipsis for part in index)
    parts: list[Tensor | None] = []
    for part in index:
        if part is Ellipsis:
            parts += [None] * (table.ndim - named)
        elif not isinstance(part, int):
            parts.append(_as_index(part, table) if isinstance(part, Tensor) else None)
    return torch.ops.aten.index.Tensor(picked, parts)


def _as_index(part: Tensor | int, table: Tensor) -> Tensor:
    if not isinstance(part, Tensor):
        return torch.tensor(part, device=table.device)
    return part if part.dtype in (torch.int32, torch.int64) else part.long()


def run(
    function: Callable[..., Any],
    kind: Kind,
    device: torch.device,
    dtype: torch.dtype,
    captured: Sequence[Tensor] = (),
) -> tuple[fx.GraphModule, list[Tensor], Watch]:
    """(every step that the function takes, example inputs, what was seen on the way), for scores of that dtype.

    captured: tensors that count as captured however the function reads them; graphs read them unseen.
    """
    watches: list[Watch] = []

    def call(*arguments: Tensor) -> Tensor:
        watches.append(Watch(function, arguments))
        watches[-1].note(tuple(captured))
        with watches[-1]:
            result = function(*arguments)
        watches[-1].note(result)
        check.result(function, kind, result)
        return torch.as_tensor(result)

    examples = [torch.zeros((), dtype=torch.int64, device=device) for _ in _INDICES]
    if kind == "score":
        examples.insert(0, torch.zeros((), dtype=dtype, device=device))
    try:
        with torch.no_grad():
            module = make_fx(call)(*examples)
    except (RuntimeError, IndexError) as error:
        check.untraceable(function, kind, error)
    check.no_randomness(function, kind, module.graph)
    return module, examples, watches[-1]


def finish(
    module: fx.GraphModule, function: Callable[..., Any], kind: Kind, watch: Watch
) -> tuple[tuple[Tensor, ...], str]:
    """The graph in its final form: pure, captured tensors as inputs. Returns them, and the constants as text."""
    tensors, text = _lift_captures(module, watch.captured.keys())
    if not _without_mutation(module):
        check.mutates(function, kind)
    _merge_reads(module)
    return tensors, text


def _lift_captures(module: fx.GraphModule, captured: Container[int]) -> tuple[tuple[Tensor, ...], str]:
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
        if id(tensor) not in captured and tensor.numel() <= _BAKED and not tensor.requires_grad:
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


def _without_mutation(module: fx.GraphModule) -> bool:
    """Turns `x.add_(y)` into `x.add(y)`, whose result already stands for x in later steps.

    False where more than this one name would change: x is captured, a view, or has views.
    """
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        changed: Any = node.args[0]
        packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        overload = getattr(packet, schema.overload_name or "default", None)
        captured = changed.op == "placeholder" and str(changed.target).startswith("capture_")
        if overload is None or captured or _is_view(changed) or any(map(_is_view, changed.users)):
            return False
        node.target = overload
        with module.graph.inserting_after(node):
            kept = module.graph.call_function(
                torch.ops.aten._to_copy.default, (node,), {"dtype": node.meta["val"].dtype}
            )
        kept.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
    module.recompile()
    return True


def _is_view(node: fx.Node) -> bool:
    """Whether a step returns memory of its operand."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return any(returned.alias_info is not None for returned in schema.returns)


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
