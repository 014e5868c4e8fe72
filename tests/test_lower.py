"""Triton's compiler takes what `lower` writes: the interpreter, which computes it elsewhere, is less strict."""

import pytest
import torch
from triton.backends.compiler import GPUTarget

from flashtile import lower, masks, trace
from flashtile.kernels import aot
from tests import functions, test_masks

NVIDIA, AMD = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
SIZES = {"ROWS": 16, "COLUMNS": 32}
OUT = torch.empty(1)


@pytest.mark.parametrize("name", [*functions.SCORES, *functions.BRAINS_SCORES])
def test_a_score_function_and_its_derivative(name: str) -> None:
    lifted = trace.lift((functions.SCORES | functions.BRAINS_SCORES)[name], "score")
    totals = [torch.zeros(tensor.shape) if tensor.is_floating_point() else None for tensor in lifted.tensors]
    score, derivative = lower.score_hook(lifted.key, lifted.tensors), lower.derivative_hook(lifted.key, totals)
    arguments = {
        "scores": OUT,
        "grads": OUT,
        "out": OUT,
        "first_q": 5,
        "first_k": 3,
        "arguments": score.arguments or None,
        "totals": derivative and (derivative.arguments or None),
        "DERIVATIVE": derivative and derivative.function,
        "SCORE": score.function,
        **SIZES,
        "TURNED": False,
    }
    for kernel in (functions.score_kernel, *([functions.derivative_kernel] if derivative else [])):
        assert aot.build(kernel, arguments, NVIDIA, enable_fp_fusion=True).asm["cubin"]


@pytest.mark.parametrize("name", functions.MASKS)
def test_a_mask_function(name: str) -> None:
    _compile_mask(masks.custom(functions.MASKS[name]))


def test_every_mask_in_one() -> None:
    whole = masks.full()
    for kind in test_masks.KINDS:
        whole = whole & kind.mask()
    _compile_mask(whole)


def _compile_mask(mask: masks.Mask) -> None:
    hook = lower.mask_hook(mask.token, mask.tensors)
    arguments = {"out": OUT, "first_q": 5, "first_k": 3, "shift": 7, "arguments": hook.arguments or None}
    arguments |= {"MASK": hook.function, **SIZES}
    for target in (NVIDIA, AMD):
        assert aot.build(functions.mask_kernel, arguments, target, enable_fp_fusion=True)


@pytest.mark.parametrize(("name", "adds"), [("add", True), ("distance", True), ("rsub", False), ("tanh", False)])
def test_what_only_adds_needs_no_derivative(name: str, adds: bool) -> None:
    lifted = trace.lift(functions.SCORES[name], "score")
    assert (lower.derivative_hook(lifted.key, [None] * len(lifted.tensors)) is None) == adds


@pytest.mark.parametrize(
    ("name", "quickly"), [("tanh", True), ("tanh_of_all", True), ("tanh_as_factor", False), ("tanh_far_up", False)]
)
def test_which_tanh_may_be_quick(name: str, quickly: bool) -> None:
    """One that is added to scores of half precision: there an absolute error counts, not a relative one."""
    lifted = trace.lift(functions.SCORES[name], "score")
    exact, quick = (lower.score_hook(lifted.key, lifted.tensors, quick).function.src for quick in (False, True))
    assert "tanh_of_power" not in exact
    assert ("tanh_of_power" in quick) == quickly


def test_numbers_that_follow_each_other_are_one() -> None:
    """For half precision: of a softcap, forward and back, two products are left, and none of the gradient."""
    lifted = trace.lift(functions.SCORES["tanh"], "score")
    forward = lower.score_hook(lifted.key, lifted.tensors, True).function.src
    backward = lower.derivative_hook(lifted.key, [], True)
    assert backward is not None
    assert (forward.count(" * "), backward.function.src.count(" * ")) == (2, 3)
