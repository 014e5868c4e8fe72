"""What a score_mod or mask_mod may be."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

ARGUMENTS = {"score": "score, b, h, q_idx, kv_idx", "mask": "b, h, q_idx, kv_idx"}


def _got(function: Callable[..., Any], kind: str) -> str:
    """score_mod: got 'name' (file:line)."""
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{kind}_mod: got {getattr(function, '__name__', type(function).__name__)!r}{place}"


def signature(function: Callable[..., Any], kind: str) -> None:
    """It can be called with the indices, by position."""
    names = ARGUMENTS[kind].split(", ")
    try:
        inspect.signature(function).bind(*names)
    except ValueError:  # a builtin that does not tell
        return
    except TypeError as error:
        raise TypeError(
            f"{_got(function, kind)} with {error}, need a function {kind}_mod({ARGUMENTS[kind]}); try *_ for what it "
            "does not use"
        ) from error


def result(function: Callable[..., Any], kind: str, value: Any) -> None:
    """One number; of a mask, one boolean."""
    if not isinstance(value, (Tensor, bool, int, float)):
        raise TypeError(
            f"{_got(function, kind)} that returned {type(value).__name__}, need a tensor; try returning one"
        )
    if isinstance(value, Tensor) and value.ndim > 0:
        raise ValueError(
            f"{_got(function, kind)} that returned shape {tuple(value.shape)}, need one number; it is called with "
            "single indices, try indexing captured tensors down to one element"
        )
    boolean = value.dtype is torch.bool if isinstance(value, Tensor) else isinstance(value, bool)
    if kind == "mask" and not boolean:
        kinds = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{_got(function, kind)} that returned {kinds}, need a boolean (True: may attend); try a comparison"
        )
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{_got(function, kind)} that returned {value.dtype}, need a real score; try its .real")
    if kind == "score" and boolean:
        raise TypeError(f"{_got(function, kind)} that returned a boolean, need a score; try the argument mask")


def mutates(function: Callable[..., Any], kind: str) -> NoReturn:
    """Steps of a graph are run on whole tiles: they must not write into what others read."""
    raise ValueError(
        f"{_got(function, kind)} that changes a captured tensor or a view in place, need new tensors; "
        "try x = x + 1 for x += 1 and torch.where for x[i] = y"
    )


def untraceable(function: Callable[..., Any], kind: str, error: Exception) -> NoReturn:
    """The function failed while it was traced."""
    reason = str(error).split("\n")[0]
    raise ValueError(
        f"{_got(function, kind)} that cannot be traced: {reason}, need PyTorch operations on 0-d tensors; where it "
        "branches on a value, try torch.where"
    ) from error


def no_randomness(function: Callable[..., Any], kind: str, graph: fx.Graph) -> None:
    """Random numbers would differ when the backward pass recomputes the scores."""
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(
                f"{_got(function, kind)} that draws random numbers ({node.target}), need a function of its arguments; "
                "try dropout_p, or capture a tensor of random numbers"
            )


def without_path(function: Callable[..., Any], kind: str) -> NoReturn:
    """Under torch.compile, captured tensors are found through closures, globals, defaults and attributes."""
    raise ValueError(
        f"{_got(function, kind)} that captures a tensor which cannot be found from the function, need one held by a "
        "closure, global, default or attribute when compiling; try binding it to a name outside the function"
    )


def known(key: str, graphs: Mapping[str, Any]) -> None:
    """An operator names a graph that this process must have traced."""
    if key not in graphs:
        raise ValueError(
            f"score_mod or mask: got the key {key!r} of a function that this process has not traced, need it traced "
            "first; after loading an exported program, try flashtile.trace.lift(function, kind) with the same function"
        )
