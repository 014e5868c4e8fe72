"""Parts of problems by the portable kernels, interpreted: bands, shifted functions and dropout that counts globally."""

import pytest
import torch

from tests import oracle, partwise
from tests.conformance import watched
from tests.problems import dense, make, packed

FEATURES = (("window", "dropout"), ("score_mod", "alibi", "mask_mod"))


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_matches_the_reference(features: tuple[str, ...]) -> None:
    call = make("parts", dense(1, 20, 28, 2, 1, 16), features, torch.float32)
    with watched() as ran:
        found = partwise.results(call, 2, "portable")
    assert {(chosen.backend, chosen.kernel) for chosen in ran} == {("portable", "sweep")}
    oracle.compare(found, call)


def test_packed_matches_the_reference() -> None:
    call = make("packed parts", packed((7, 0, 9), (10, 8, 2), 1, 1, 16), ("causal", "alibi"), torch.float32)
    oracle.compare(partwise.results(call, 2, "portable"), call)
