"""Lengths of all kinds with a mask, a bias and causality together, and logits far from zero."""

from collections.abc import Iterable

import torch

from tests import oracle
from tests.problems import Shape, make


def check(
    shapes: Iterable[Shape], dtype: torch.dtype, shift: float, device: str = "cpu", backend: str | None = None
) -> None:
    """Logits are shifted; the mask leaves rows without any key. All is finite and right, gradients too.

    The tolerance rule holds for the largest error over all these shapes: a short problem by itself is one throw of the
    dice for either side.
    """
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for shape in shapes:
        call = make(f"odd {shape}", shape, ("causal", "dense_mask", "bias"), dtype, device, shift=shift)
        truth, textbook = oracle.truth_and_textbook(call)
        for name, found in oracle.ours(call, backend).items():
            wanted = truth[name]
            assert torch.equal(found == -torch.inf, wanted == -torch.inf), (name, shape)
            hidden = wanted == -torch.inf
            error = (found.double() - wanted).masked_fill(hidden, 0)
            assert bool(error.isfinite().all()), (name, shape)
            largest = wanted.masked_fill(hidden, 0).abs()
            sizes = (error.abs(), torch.stack(textbook[name]).abs(), largest)
            errors.setdefault(name, []).append(tuple(float(t.max()) if t.numel() else 0.0 for t in sizes))
    for name, rows in errors.items():
        error, allowed, largest = (max(column) for column in zip(*rows, strict=True))
        rounding = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        tiny = rounding * largest + oracle.ROUNDINGS * torch.finfo(torch.float32).eps * max(1.0, largest)
        assert error <= 2 * allowed + tiny, name
