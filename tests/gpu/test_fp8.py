"""8-bit floats on a GPU: rounding, every kernel against its oracle, tapes and gradients."""

import pytest
import torch

import flashtile
from flashtile import fp8, plan
from flashtile.backends.pytorch import quantize as eager
from tests import eight
from tests.conformance import watched
from tests.problems import dense

LSE = 2.0**-8
"""What the log-sum-exp may carry: Hopper's sums of 8-bit products hold 14 bits, and scores here reach some tens."""

LONG = eight.Eight("long", dense(1, 1000, 2000, 4, 2, 128), "block", {"causal": True})
BACKENDS = [name for name in ("hopper", "portable") if dict(plan.available()).get(name, "") is None]


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
@pytest.mark.parametrize("incoherent", [False, True])
def test_rounding_is_that_of_pytorch(granularity: str, incoherent: bool) -> None:
    """But for one unit where sums of the rotation are rounded otherwise; the third call is a tape's."""
    for seed in range(4):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(2, n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (300, 500, 500))
        found = fp8.quantize(q, k, v, granularity, incoherent, dtype=torch.float8_e4m3fn)
        wanted = eager.quantize(q, k, v, granularity, incoherent, torch.float8_e4m3fn, 0)
        for part, (data, scale) in zip(found, wanted, strict=True):
            torch.testing.assert_close(part.scale, scale, rtol=1e-5, atol=0.0)
            a, b = part.data.float(), data.float()
            assert float((a != b).float().mean()) < (0.01 if incoherent else 1e-9)
            torch.testing.assert_close(a, b, rtol=2**-3, atol=2**-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*eight.CASES, LONG], ids=lambda case: case.name)
def test_matches_reference(case: eight.Eight, backend: str) -> None:
    quantized = case.quantized("cuda")
    with watched() as ran:
        # The first is planned, the second written down, the third done again.
        states = [flashtile.attention(*quantized, return_lse=True, backend=backend, **case.options) for _ in range(3)]
    assert {chosen.backend for chosen in ran} == {backend}
    for state in states:
        eight.check(case, quantized, state, LSE)


def test_gradients_err_as_the_output_does() -> None:
    leaves = [tensor.requires_grad_() for tensor in LONG.tensors("cuda")]
    out = flashtile.attention(*fp8.quantize(*leaves), causal=True)
    grad = torch.randn_like(out)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in leaves]
    exact_out = flashtile.attention(*doubles, causal=True)
    exact = [exact_out.detach(), *torch.autograd.grad(exact_out, doubles, grad.cpu().double())]
    error, *errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert error < 0.12
    assert max(errors) < 2 * error


def test_packed_sequences_leave_the_hopper_backend() -> None:
    q, k, v = (tensor.flatten(0, 1) for tensor in LONG.tensors("cuda"))
    offsets_q = torch.tensor([0, 300, 1000], device="cuda", dtype=torch.int32)
    offsets_k = torch.tensor([0, 900, 2000], device="cuda", dtype=torch.int32)
    quantized = fp8.quantize(q, k, v)
    found, expected = (
        flashtile.attention_varlen(*quantized, offsets_q, offsets_k, causal=True, backend=backend).float()
        for backend in ("portable", "pytorch")
    )
    assert float((found - expected).norm() / expected.norm()) < 0.04
