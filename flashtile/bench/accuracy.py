"""Error against float64, and the gate: no peer is timed whose results are not right.

The truth is `flashtile.reference.attention` in float64 on the very inputs that are timed; the yardstick is the same
formula in the inputs' own dtype, the error that rounding alone makes. The rule is the one that the tests hold: twice
the yardstick's error, one unit in the last place of the dtype, and a few roundings of the accumulator, which a result
that cancels to almost nothing carries whatever the yardstick does. Heads are computed one key/value head at a time,
so that the float64 matrices stay small; of long sequences only some heads are compared.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import reference
from flashtile.bench import cases
from flashtile.bench.cases import Case, Tensors
from flashtile.bench.peers import Bound

NAMES = ("out", "dq", "dk", "dv")

SLACK = 2.0
"""How many times the yardstick's error passes."""

ROUNDINGS = 8
"""Roundings of the float32 accumulator that pass besides."""

ALL_HEADS_UP_TO = 1024
"""Seqlen up to which every head is compared; beyond, the first and the last, and beyond four times this the last."""


class Error(NamedTuple):
    """Largest and root-mean-square difference from the truth."""

    max: float
    rms: float


@dataclass
class Truth:
    """Per key/value head compared: the results in float64; and over all of them the yardstick's errors and sizes."""

    case: Case
    results: dict[int, tuple[Tensor, ...]]
    formula: dict[str, Error]
    largest: dict[str, float]

    def errors(self, bound: Bound) -> dict[str, Error]:
        """The peer's errors: out, dq, dk and dv, or out alone if it does not train."""
        out = bound.forward()
        gradients = bound.backward(out) if bound.peer.trains else ()
        return self.errors_of([bound.common(tensor) for tensor in (out, *gradients)])

    def errors_of(self, found: Sequence[Tensor]) -> dict[str, Error]:
        """The errors of (out, dq, dk, dv), or of the first of them, (batch, seqlen, heads, headdim)."""
        return self._errors({head: _heads(found, head, self.case) for head in self.results})

    def _errors(self, found: dict[int, tuple[Tensor, ...]]) -> dict[str, Error]:
        return {
            name: _error((found[head][i], self.results[head][i]) for head in self.results)
            for i, name in enumerate(NAMES)
            if all(i < len(parts) for parts in found.values())
        }

    def allowed(self, name: str) -> Error:
        """The largest errors that pass the gate."""
        largest = self.largest[name]
        floor = torch.finfo(self.case.torch_dtype).eps * largest
        floor += ROUNDINGS * torch.finfo(torch.float32).eps * max(1.0, largest)
        return Error(*(SLACK * error + floor for error in self.formula[name]))

    def failures(self, errors: dict[str, Error]) -> list[str]:
        """What does not pass, in words; NaN never passes."""
        return [
            f"{name}: {kind} error {error:.2e}, allowed {allowed:.2e}"
            for name in errors
            for kind, error, allowed in zip(Error._fields, errors[name], self.allowed(name), strict=True)
            if not error <= allowed
        ]


def truth(case: Case, inputs: Tensors) -> Truth:
    """The float64 results and the yardstick of a case."""
    results, formula = {}, {}
    for head in _compared(case):
        results[head] = _reference(case, inputs, head, torch.float64)
        formula[head] = _reference(case, inputs, head, None)
    largest = {name: max(float(r[i].abs().max()) for r in results.values()) for i, name in enumerate(NAMES)}
    found = Truth(case, results, {}, largest)
    found.formula = found._errors(formula)
    return found


def _compared(case: Case) -> list[int]:
    """The key/value heads that are compared."""
    if case.seqlen <= ALL_HEADS_UP_TO:
        return list(range(case.heads_kv))
    last = case.heads_kv - 1
    return [last] if case.seqlen > 4 * ALL_HEADS_UP_TO else sorted({0, last})


def _heads(results: Iterable[Tensor], head: int, case: Case) -> tuple[Tensor, ...]:
    """The part of (out, dq, dk, dv) that belongs to one key/value head."""
    return tuple(
        tensor[:, :, head * size : (head + 1) * size]
        for tensor, size in zip(results, (case.group, case.group, 1, 1), strict=False)
    )


def _reference(case: Case, inputs: Tensors, head: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of one key/value head and its query heads by the formula, in `dtype` or the inputs' own."""
    q, grad, k, v = _heads((inputs.q, inputs.grad, inputs.k, inputs.v), head, case)
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (q, k, v)]
    out = reference.attention(leaves[0], leaves[1], leaves[2], **_options(case, head), dtype=dtype).out
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def _options(case: Case, head: int) -> dict[str, Any]:
    """The case's options, cut to the query heads of one key/value head."""
    heads = slice(head * case.group, (head + 1) * case.group)
    options = cases.options(case)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = options[name][heads]
    if "bias" in options:
        options["bias"] = options["bias"][:, heads]
    return options


def _error(pairs: Iterable[tuple[Tensor, Tensor]]) -> Error:
    largest, squares, count = 0.0, 0.0, 0
    for found, true in pairs:
        difference = (found.double() - true).abs()
        # max() would lose a NaN.
        top = float(difference.max())
        largest = math.nan if math.isnan(top) or math.isnan(largest) else max(largest, top)
        squares += float(difference.square().sum())
        count += difference.numel()
    return Error(largest, math.sqrt(squares / count))
