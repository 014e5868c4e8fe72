"""`batch_invariant=True` with the portable kernels, interpreted."""

import pytest
import torch

from tests import invariance


@pytest.mark.parametrize("name", invariance.OPTIONS)
def test_a_sequence_gets_the_same_bits_everywhere(name: str) -> None:
    invariance.check(name, torch.float16, "portable")
