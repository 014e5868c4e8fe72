"""Dropout of the Hopper kernels, emulated: the same entries as everywhere, in a whole problem and in its parts."""

import pytest
import torch

from tests import kept, oracle, partwise
from tests.conformance import watched
from tests.emulated.hopper import emulated
from tests.problems import dense, make
from tools.ptx_emulation import SWEEP


@pytest.mark.one_triton
def test_keeps_what_the_mask_says() -> None:
    with emulated(SWEEP[0]) as device:
        kept.check("hopper", "cpu", 128)
    assert device.complaints == []


@pytest.mark.one_triton
def test_parts_drop_what_the_whole_does() -> None:
    """Their first keys are no multiples of 4, so that four keys share two counters."""
    call = make("parts", dense(1, 20, 28, 2, 1, 16), ("dropout",), torch.bfloat16)
    with emulated(SWEEP[0]) as device, watched() as ran:
        found = partwise.results(call, 2, "hopper")
    assert device.complaints == []
    assert {(chosen.backend, chosen.problem.backward) for chosen in ran} == {("hopper", False), ("hopper", True)}
    oracle.compare(found, call)
