"""The portable backend's 8-bit products for packed sequences, emulated: tiles whose values have several scales.

What Triton compiles for sm_89. Its interpreter multiplies 16 bits in their place, so it rounds no weight to 8 bits.
"""

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from flashtile import State, fp8
from flashtile.backends import portable
from flashtile.backends.portable import launch
from flashtile.fp8 import Quantized
from flashtile.kernels import aot
from flashtile.problem import describe
from flashtile.request import Arguments, Packing, build
from flashtile.tuning.portable import Tiles
from tests import eight
from tests.binding import bind
from tests.eight import Eight
from tests.emulated.hopper import plain
from tests.problems import dense, offsets, packed
from tools.ptx_emulation import SWEEP, emulate_kernel

ADA = GPUTarget("cuda", 89, 32)


def _run(case: Eight, quantized: Quantized) -> State:
    """The forward pass of the case's sequences, with the tiles of the GPU's family."""
    ran: list[str] = []

    def emulate(kernel: Any, programs: int, tiles: Tiles, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        bound, how = bind(kernel, arguments, options)
        compiled = aot.build(kernel, bound, ADA, **how, **tiles.options())
        constants = aot.source(kernel, bound).constants
        values = [plain(leaf) for path, leaf in aot.leaves(tuple(bound.values()), ()) if path not in constants]
        assert emulate_kernel(compiled, (programs, 1, 1), values, **SWEEP[0]).warnings == {}
        assert options["META"].mixed
        ran.append(kernel.fn.__name__)

    bounds = (offsets(lengths or ()) for lengths in (case.shape.lengths_q, case.shape.lengths_kv))
    inputs, chosen = build(*quantized, Arguments(**case.options), Packing(*bounds, None, None, None, None))
    problem = describe(inputs, chosen)
    machine = launch.Machine(emulate, copy_engine=False)
    launch.forget_fitting()
    config = portable.configure(problem, "ampere")
    state = State(*launch.forward(inputs, problem, config, machine, eight="products"))
    assert ran == ["forward_kernel"]
    return state


@pytest.mark.parametrize("case", eight.PACKED[3:5], ids=lambda case: case.name)
def test_matches_reference(case: Eight) -> None:
    quantized = case.quantized()
    eight.check_packed(case, quantized, _run(case, quantized))


@pytest.mark.parametrize("ratio", [0.53, 1.06, 1.89])
def test_the_largest_weight_is_exact(ratio: float) -> None:
    """One key has almost all the weight; other keys of its tile have scales that are so many times its own."""
    case = Eight("peaked", packed((9, 40), (100, 100), 1, 1, 64))
    q, k, v = case.tensors(dtype=torch.float32)
    v[:128] /= v[:128].abs().amax()
    v[128:] *= ratio / v[128:].abs().amax()
    q[:, :, 0], k[:, :, 0], k[125, :, 0] = 8.0, 0.0, 12.0
    quantized = fp8.quantize(q, k, v, "block", False, dtype=case.dtype)
    eight.check_packed(case, quantized, _run(case, quantized))


def test_what_is_small_beside_hidden_values_is_not_lost() -> None:
    """Rows that see, in a tile of two blocks, only keys of the one whose values are a million times smaller."""
    options = {"causal": True, "window": (20, 0)}
    case = Eight("small", packed((9, 100), (70, 100), 1, 1, 64), "block", options)
    q, k, v = case.tensors(dtype=torch.float32)
    v[:128] *= 2.0**20
    quantized = fp8.quantize(q, k, v, "block", False, dtype=case.dtype)
    found = _run(case, quantized)
    # Key 58 of the second sequence is the first of the second block, and row 78 the first that sees none before.
    rows, keys = slice(9 + 78, 9 + 100), slice(70 + 58, 70 + 100)
    q, k, v = (part.dequantize(torch.float64)[None] for part in quantized)
    state = State(found.out[None, rows], found.lse[None, :, rows])
    alone = Eight("alone", dense(1, 22, 42, 1, 1, 64), "block", options)
    eight.check_numbers(alone, q[:, rows], k[:, keys], v[:, keys], state, 0.0)


def test_nan_stays_with_the_rows_that_see_it() -> None:
    """A key of NaN, in a tile of two blocks: rows in front of it have what they had."""
    case = Eight("nan", packed((9, 100), (70, 100), 1, 1, 64), "block", {"causal": True})
    q, k, v = case.tensors()
    k[70 + 60] = 0.0
    found = []
    for poison in (0.0, torch.nan):
        k[70 + 60] = poison
        found.append(_run(case, fp8.quantize(q, k, v, dtype=case.dtype)).out)
    assert bool(found[1][9 + 60 :].isnan().all())
    assert torch.equal(found[1][: 9 + 60], found[0][: 9 + 60])
