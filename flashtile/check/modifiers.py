"""What a score_mod or mask_mod may be."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx


def _named(function: Callable[..., Any], kind: str) -> str:
    """score_mod 'name' (file:line)."""
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{kind}_mod {getattr(function, '__name__', type(function).__name__)!r}{place}"


def result(function: Callable[..., Any], kind: str, value: Any) -> None:
    """One number; of a mask, one boolean."""
    if not isinstance(value, (Tensor, bool, int, float)):
        raise TypeError(f"{_named(function, kind)}: returned {type(value).__name__}, need a tensor")
    if isinstance(value, Tensor) and value.ndim > 0:
        raise ValueError(
            f"{_named(function, kind)}: returned shape {tuple(value.shape)}, need one number; it is called with single "
            "indices, so index captured tensors down to one element"
        )
    boolean = value.dtype is torch.bool if isinstance(value, Tensor) else isinstance(value, bool)
    if kind == "mask" and not boolean:
        kinds = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{_named(function, kind)}: returned {kinds}, need a boolean (True: may attend); try `> 0`")
    if kind == "score" and boolean:
        raise TypeError(f"{_named(function, kind)}: returned a boolean, need a score; masks go to the argument mask")


def untraceable(function: Callable[..., Any], kind: str, error: Exception) -> NoReturn:
    """The function failed while it was traced."""
    reason = str(error).split("\n")[0]
    raise ValueError(
        f"{_named(function, kind)}: cannot be traced: {reason}. It is called with 0-d tensors; where it branches on a "
        "value, use torch.where"
    ) from error


def no_randomness(function: Callable[..., Any], kind: str, graph: fx.Graph) -> None:
    """Random numbers would differ when the backward pass recomputes the scores."""
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(
                f"{_named(function, kind)}: draws random numbers ({node.target}), need a function of its arguments; "
                "try dropout_p, or capture a tensor of random numbers"
            )


def without_path(function: Callable[..., Any], kind: str) -> NoReturn:
    """Under torch.compile, captured tensors are found through closures, globals, defaults and attributes."""
    raise ValueError(
        f"{_named(function, kind)}: captures a tensor that cannot be found from the function, need one held by a "
        "closure, global, default or attribute when compiling; try binding it to a name outside the function"
    )


def known(key: str, graphs: Mapping[str, Any]) -> None:
    """An operator names a graph that this process must have traced."""
    if key not in graphs:
        raise ValueError(
            f"modifier {key!r}: this process has not traced it, need its score_mod or mask_mod to be traced first; "
            "after loading an exported program, call flashtile.trace.lift(function, kind) with the same function"
        )
