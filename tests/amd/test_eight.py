"""8 bits on four AMD GPUs, emulated: rounding, and forward passes in each GPU's own format or, where it has none, in 16
bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile import State, fp8, scaled
from flashtile.backends import portable
from flashtile.backends.portable import launch, quantize
from flashtile.compiling.targets import TARGETS
from flashtile.fp8 import Quantized
from flashtile.problem import describe
from flashtile.request import Arguments, build
from flashtile.tuning.portable import PortableConfig, Tiles
from tests import eight
from tests.amd.machine import EMULATED, Emulated, missing
from tests.eight import Eight
from tests.problems import dense

if (lacking := missing()) is not None:
    pytest.skip(lacking, allow_module_level=True)

OWN = {
    "gfx942": {torch.float8_e4m3fn: torch.float8_e4m3fnuz, torch.float8_e5m2: torch.float8_e5m2fnuz},
    "gfx950": {torch.float8_e4m3fn: torch.float8_e4m3fn, torch.float8_e5m2: torch.float8_e5m2},
}
"""The formats that matrix instructions multiply where a call names PyTorch's."""
SMALL = Tiles(32, 32, 4, 1)
CONFIG = PortableConfig(SMALL, SMALL, SMALL)
CASES = (
    Eight("plain_heads", dense(1, 50, 75, 2, 2, 64), "head"),
    Eight("causal_gqa", dense(1, 45, 70, 2, 1, 64), "block", {"causal": True}),
    Eight("tensor_window", dense(1, 60, 60, 1, 1, 32), "tensor", {"window": (30, 3)}),
    Eight("softcap", dense(1, 45, 70, 1, 1, 32), "block", {"causal": True, "softcap": 10.0}),
    Eight("document", dense(1, 100, 100, 1, 1, 32), "block", {"mask": lambda b, h, q, k: q // 40 == k // 40}),
    Eight("e5m2", dense(1, 35, 70, 1, 1, 64), "block", {}, torch.float8_e5m2, False),
    Eight("odd_columns", dense(1, 35, 70, 1, 1, 96, 48), "block", {"causal": True}),
)


def _run(quantized: Quantized, device: Emulated, options: dict[str, Any]) -> State:
    """The forward pass that the backend would choose on the GPU."""
    inputs, chosen = build(*quantized, Arguments(**options))
    problem = describe(inputs, chosen)
    products = portable.multiplies_eight_bits(problem.dtype, device.arch)
    assert products == (device.arch in OWN) == bool(TARGETS[device.arch].eight_bits)
    launch.forget_fitting()
    how = "products" if products else "halves"
    state = State(*launch.forward(inputs, problem, CONFIG, device.machine, eight=how))
    assert device.ran == {"forward_kernel": 1}
    return state


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("arch", EMULATED)
def test_matches_reference(arch: str, case: Eight, request: pytest.FixtureRequest) -> None:
    device = Emulated(arch)
    case = replace(case, dtype=OWN.get(arch, {}).get(case.dtype, case.dtype))
    quantized = case.quantized()
    eight.check(case, quantized, _run(quantized, device, case.options))
    device.note(request.node)


@pytest.mark.parametrize("arch", EMULATED)
def test_no_barrier_is_missing(arch: str, request: pytest.FixtureRequest) -> None:
    """Between barriers it does not matter which wave goes first."""
    case = replace(CASES[1], dtype=OWN.get(arch, {}).get(CASES[1].dtype, CASES[1].dtype))
    quantized = case.quantized()
    found = _run(quantized, device := Emulated(arch), case.options)
    reverse = _run(quantized, Emulated(arch, reverse_waves=True), case.options)
    assert torch.equal(found.out, reverse.out)
    assert torch.equal(found.lse, reverse.lse)
    device.note(request.node)


@pytest.mark.parametrize("arch", EMULATED)
def test_nan_of_padding_does_not_spread(arch: str, request: pytest.FixtureRequest) -> None:
    """The pass that is made again where sums hold NaN; 45 is in the middle of a group of values."""
    low = OWN.get(arch, {}).get(torch.float8_e4m3fn, torch.float8_e4m3fn)
    q, k, v = Eight("padding", dense(1, 35, 70, 1, 1, 32)).tensors()
    found, device = [], Emulated(arch)
    for poison in (0.0, torch.nan):
        k[:, 45:], v[:, 45:] = poison, poison
        device = Emulated(arch)
        quantized = fp8.quantize(q, k, v, dtype=low)
        found.append(_run(quantized, device, {"mask": lambda b, h, q_idx, kv_idx: kv_idx < 45}).out.float())
    torch.testing.assert_close(found[1], found[0], rtol=2**-8, atol=2**-8 * float(found[0].abs().max()))
    device.note(request.node)


ROUNDED = (
    ((1, 70, 2, 64), (1, 50, 1, 64), 64, "block", True, torch.bfloat16),
    ((50, 1, 40), (30, 1, 40), 24, "head", True, torch.bfloat16),
    ((2, 50, 1, 40), (2, 20, 1, 40), 40, "tensor", False, torch.float16),
)
"""Shapes of queries and of keys, columns of values, and how they are rounded."""


@pytest.mark.parametrize(("queries", "keys", "columns", "granularity", "incoherent", "dtype"), ROUNDED, ids=str)
@pytest.mark.parametrize("arch", OWN)
def test_rounding(
    arch: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    columns: int,
    granularity: str,
    incoherent: bool,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    """The bits that PyTorch gives, but for the last of some where a rotation sums in another order."""
    low, device = OWN[arch][torch.float8_e4m3fn], Emulated(arch)
    tensors = eight.with_nan(queries, keys, columns, dtype)

    def run(kernel: Any, programs: int, given: dict[str, Any], warps: int) -> None:
        ordered = tuple(given[parameter.name] for parameter in kernel.params)
        device.execute(kernel, programs, Tiles(0, 0, warps, 1), ordered, {})

    found = quantize.quantize(*tensors, granularity, incoherent, low, 0, run)
    for (data, scale), (expected, expected_scale) in zip(
        found, eight.rounded(tensors, granularity, incoherent, low), strict=True
    ):
        torch.testing.assert_close(scale, expected_scale, rtol=2**-22, atol=0)
        assert torch.equal(data.float().isnan(), expected.float().isnan())
        assert bool(data.float().isnan().any())
        wrong = (data.float().nan_to_num() - expected.float().nan_to_num()).abs()
        assert float((wrong > 0).float().mean()) < (0.01 if incoherent else 1e-9)
        assert float(wrong.max()) <= scaled.largest(low) / 14
    assert device.ran == {"quantize_kernel": 1 if granularity == "block" else 2}
    device.note(request.node)
