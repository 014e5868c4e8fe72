"""`batch_invariant=True` on the CPU."""

import pytest
import torch

from tests import invariance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", invariance.OPTIONS)
def test_a_sequence_gets_the_same_bits_everywhere(name: str, dtype: torch.dtype) -> None:
    invariance.check(name, dtype, "pytorch")
