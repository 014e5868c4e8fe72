"""The tolerance rule of `tests/oracle.py` for results that another library computed: models, operators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flashtile.plan import Plan
from tests import conformance
from tests.oracle import LSE_SHARE

ROUNDINGS = 8


def assert_close(
    found: Tensor,
    textbook: Tensor,
    truth: Tensor,
    name: str = "result",
    inputs: torch.dtype | None = None,
    scale: float = 0.0,
) -> None:
    """`found` errs at most twice as much as the textbook formula in the same dtype, plus a few rounding errors.

    Both against `truth`, which was computed in float64. `inputs`: for log-sum-exps, the dtype that they come from.
    scale: the size of what was added up on the way, where that is more than the result's.
    """
    assert found.shape == truth.shape, (name, found.shape, truth.shape)
    truth = truth.detach().double()
    if truth.numel() == 0:
        return
    finite = truth[truth.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    rounding = ROUNDINGS * torch.finfo(found.dtype).eps * max(largest, scale)
    if inputs is not None:
        rounding += LSE_SHARE * torch.finfo(inputs).eps
    for measure in (lambda error: error.abs().amax(), lambda error: error.square().mean().sqrt()):
        error = measure(_error(found, truth)).item()
        allowed = 2 * measure(_error(textbook, truth)).item() + rounding
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def _error(value: Tensor, truth: Tensor) -> Tensor:
    return torch.where(truth.isfinite(), value.detach().double() - truth, 0.0)


@contextmanager
def ran() -> Iterator[list[Plan]]:
    """The plans that run inside; asserts that some do, so that no test compares a library with itself."""
    with conformance.watched() as plans:
        yield plans
    assert plans, "flashtile ran nothing"
