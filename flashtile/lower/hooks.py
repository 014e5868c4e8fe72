"""The hooks that kernels call, and why a function has none."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import trace
from flashtile.lower import graphs
from flashtile.lower.masks import MaskWriter
from flashtile.lower.rules import Unsupported, without_ones
from flashtile.lower.source import Source
from flashtile.lower.values import BOTH, Value


class Hook(NamedTuple):
    """A function for kernels to call, and what it gets as its last argument."""

    function: Any
    arguments: tuple[Any, ...]


def score_hook(key: str, tensors: Sequence[Tensor], quick: bool = False) -> Hook:
    """`function(b_scores, i_batch, i_head, o_query, o_key, b_apart, arguments)`: modified scores, natural base.

    b_apart: query less key; both in float32.

    quick: q and k are of half precision, whose rounding hides what a quicker tanh and quicker divisions add.
    """
    return Hook(_score_function(key, quick), _arguments(tensors))


def derivative_hook(key: str, totals: Sequence[Tensor | None], quick: bool = False) -> Hook | None:
    """`function(b_scores, i_batch, i_head, o_query, o_key, score_arguments, arguments, b_grad, m_valid, COLLECT)`.

    It returns the score's gradient; `score_arguments` are those of `score_hook`. If COLLECT, what the tile gives to the
    gradients of captured tensors is added to `totals`, contiguous float32 or float64 tensors in their shapes (None: not
    wanted), where `m_valid`; in no fixed order.
    None: the gradient stays as it is, and nothing is to be added.
    """
    wanted = tuple(total is not None for total in totals)
    if not any(wanted) and only_adds(key):
        return None
    return Hook(_derivative_function(key, wanted, quick), tuple(total for total in totals if total is not None))


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
        _score_function(key, False)
        _derivative_function(key, (False,) * len(traced.captures), False)
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
            graphs.write(Source(), traced.forward, graphs.mask_inputs(traced, 0))
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
def _score_function(key: str, quick: bool) -> Any:
    traced = trace.graph(key)
    source = Source(quick, apart="apart")
    result = graphs.write(source, traced.forward, graphs.score_inputs(traced))
    source.line(f"return spread({source.text(result, 'f')}, score)")
    return source.function(f"score_{key}", "score, b, h, q, k, apart, arguments")


@cache
def only_adds(key: str) -> bool:
    """Whether the function only adds to the score: then the gradient passes as it is."""
    traced = trace.graph(key)
    if traced.places is None or traced.backward is None:
        return False
    reads = [Value("read", torch.float32) for _ in traced.reads_of]
    grad = Value("grad", torch.float32, axes=BOTH)
    found, *_ = graphs.write(Source(), traced.backward, [*graphs.score_inputs(traced), *reads, grad])
    return found is grad


@cache
def _derivative_function(key: str, wanted: tuple[bool, ...], quick: bool) -> Any:
    """Reads first, then the graph of the derivative, then sums for the captured tensors."""
    traced = trace.graph(key)
    if traced.places is None or traced.backward is None:
        raise Unsupported("its derivative is not a graph of single elements")
    source = Source(quick)
    inputs = graphs.score_inputs(traced)
    captures = inputs[graphs.FIRST_CAPTURE :]
    places = [graphs.operands(at) for at in graphs.write(source, traced.places, inputs)]
    reads = [source.read(captures[capture], at) for capture, at in zip(traced.reads_of, places, strict=True)]
    outputs = graphs.write(source, traced.backward, [*inputs, *reads, Value("grad", torch.float32, axes=BOTH)])
    grad_score, *parts = outputs
    source.line("if COLLECT:")
    source.indent += 1
    source.line("KEYS: tl.constexpr = 1 if k.shape[0] == 1 else 0")
    for capture, at, part in zip(traced.reads_of, places, parts, strict=True):
        if wanted[capture]:
            source.collect(f"totals[{sum(wanted[:capture])}]", capture, at, part)
    source.indent -= 1
    source.line(f"return spread({source.text(grad_score, 'f')}, score)")
    return source.function(
        f"derivative_{key}", "score, b, h, q, k, arguments, totals, grad, valid, COLLECT: tl.constexpr"
    )


@cache
def _mask_function(token: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]) -> Any:
    """The text follows from the token and the shapes; `dtypes` only keep apart what is called with other tensors."""
    source = Source()
    result = MaskWriter(source, shapes).expression(json.loads(token))
    source.line(f"return (q == q) & {result}")
    return source.function("mask", "b, h, q, k, shift, arguments")
