"""The Hopper kernels as the compiler leaves them: products in flight, spills within what is written down."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from flashtile.backends import hopper
from flashtile.backends.hopper import launch
from flashtile.kernels import aot
from flashtile.problem import Inputs, Options, describe
from flashtile.tuning.hopper import spills_allowed

MASKS = {"plain": '["full"]', "causal": '["causal","bottom_right"]'}


def _compiled(headdim: int, mask: str, backward: bool) -> Any:
    """The kernel of one pass."""
    found: list[Any] = []

    def build(kernel: Any, programs: int, given: Sequence[Any], options: dict[str, Any]) -> None:
        found.append(aot.build(kernel, given, **options))

    tensors = [torch.zeros(1, 256, 2, headdim, dtype=torch.bfloat16) for _ in range(3)]
    inputs, options = Inputs(*tensors), Options(mask=MASKS[mask], out_dtype=torch.bfloat16)
    problem = describe(inputs, options, backward=backward)
    machine = launch.Machine(build, 1)
    config: Any = hopper.configure(problem)
    if backward:
        lse = torch.zeros(1, 2, 256)
        launch.backward(inputs, problem, config, tensors[0], lse, tensors[0], None, machine)
    else:
        launch.forward(inputs, problem, config, machine)
    return found[0]


def _instructions(compiled: Any) -> str:
    """The machine code as text, by NVIDIA's disassembler, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("headdim", "backward"), [(64, False), (128, False), (256, False), (64, True), (128, True)], ids=str
)
@pytest.mark.parametrize("mask", MASKS)
def test_products_overlap_and_spills_do_not_grow(headdim: int, mask: str, backward: bool) -> None:
    compiled = _compiled(headdim, mask, backward)
    text = _instructions(compiled)
    products = len(re.findall(r"\bHGMMA\.", text))
    batches = len(re.findall(r"WARPGROUP\.ARRIVE", text))
    # Were every product waited for by itself, there would be one batch to each.
    assert products >= 4 * batches > 0
    assert compiled.metadata.shared <= 232448
    assert len(re.findall(r"\bSTL\b", text)) <= spills_allowed(headdim, mask, backward)
