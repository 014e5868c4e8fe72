"""Functions written in Triton compute what the traced graphs compute, step by step; Triton interpreted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashtile import lower, masks, trace
from tests import functions, test_masks


@pytest.mark.parametrize("name", functions.SCORES)
def test_a_score_function_and_its_derivative(name: str) -> None:
    functions.check_score(functions.SCORES[name], "cpu")


@pytest.mark.parametrize("name", functions.QUICK)
def test_for_half_precision(name: str) -> None:
    functions.check_score(functions.SCORES[name], "cpu", quick=functions.QUICK[name])


@pytest.mark.parametrize("name", ["large_products", "large_minimum", "distance", "half_beside_integers"])
def test_far_indices(name: str) -> None:
    functions.check_score(functions.SCORES[name], "cpu", first_q=2**22 - 7, first_k=2**23 + 11)


@pytest.mark.parametrize("kind", test_masks.KINDS, ids=str)
def test_a_mask(kind: test_masks.Kind) -> None:
    functions.check_mask(kind.mask(), "cpu", kind.sizes)


@pytest.mark.parametrize(
    ("function", "sizes"),
    [pytest.param(function, sizes, id=name) for name, function, sizes in test_masks.FUNCTIONS if name != "transfusion"],
)
def test_a_function_as_mask(function: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    functions.check_mask(masks.custom(function), "cpu", sizes)
    joined = masks.custom(function) & masks.window(11, 3) | masks.prefix(2) & masks.custom(function)
    functions.check_mask(joined, "cpu", sizes)


@pytest.mark.parametrize("far", [0, 2**22 - 30])
@pytest.mark.parametrize("name", functions.MASKS)
def test_awkward_masks(name: str, far: int) -> None:
    functions.check_mask(masks.custom(functions.MASKS[name]), "cpu", (2, 3, 60, 50), far, 2 * far)


VECTORS: dict[str, Callable[..., Any]] = {
    "sum_of_a_table": lambda s, b, h, q, k: s + functions.TABLE.sum(),
    "row_of_a_table": lambda s, b, h, q, k: s + functions.GRID[q].sum(),
    "made_inside": lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 3.0])[h],
    "stacked": lambda s, b, h, q, k: torch.stack([s, -s]).amax(0),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_refused(name: str) -> None:
    reason = lower.unsupported(trace.lift(VECTORS[name], "score").key)
    assert reason is not None
    assert reason.startswith("score_mod")


@pytest.mark.parametrize(
    "function",
    [
        lambda s, b, h, q, k: s + torch.special.bessel_j0(s),
        lambda s, b, h, q, k: s + torch.div(q, 3, rounding_mode="trunc"),
        lambda s, b, h, q, k: s % 0.7,
        lambda s, b, h, q, k: torch.round(s, decimals=2),
    ],
)
def test_steps_without_a_rule_are_refused_by_name(function: Callable[..., Any]) -> None:
    reason = lower.unsupported(trace.lift(function, "score").key)
    assert reason is not None
    assert "there is no Triton for" in reason


def test_masks_over_vectors_are_refused() -> None:
    for function in (
        lambda b, h, q, k: k < functions.SMALL.sum(),
        test_masks.transfusion(functions.SMALL.view(1, 2, 2)),
    ):
        reason = lower.unsupported_mask(masks.custom(function).token)
        assert reason is not None
        assert reason.startswith("mask_mod")
