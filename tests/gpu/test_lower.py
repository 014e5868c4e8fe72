"""Functions written in Triton compute what the traced graphs compute, compiled for the GPU that is there."""

import pytest
import torch

from flashtile import masks
from tests import functions, test_masks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", functions.SCORES)
def test_a_score_function_and_its_derivative(name: str) -> None:
    functions.check_score(functions.SCORES[name], "cuda")


@pytest.mark.parametrize("name", functions.QUICK)
def test_for_half_precision(name: str) -> None:
    functions.check_score(functions.SCORES[name], "cuda", quick=functions.QUICK[name])


@pytest.mark.parametrize("name", functions.BRAINS_SCORES)
def test_a_score_function_in_bfloat16(name: str) -> None:
    functions.check_score(functions.BRAINS_SCORES[name], "cuda")


@pytest.mark.parametrize("name", functions.MASKS)
def test_a_mask_function(name: str) -> None:
    functions.check_mask(masks.custom(functions.MASKS[name]), "cuda", (2, 3, 60, 50))


@pytest.mark.parametrize("kind", test_masks.KINDS, ids=str)
def test_a_mask(kind: test_masks.Kind) -> None:
    functions.check_mask(kind.mask(), "cuda", kind.sizes)
