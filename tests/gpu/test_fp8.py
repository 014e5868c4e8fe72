"""8-bit floats on a GPU: rounding, every kernel against its oracle, tapes and gradients."""

import pytest
import torch

import flashtile
from flashtile import fp8, plan
from flashtile.backends.pytorch import quantize as eager
from tests import eight
from tests.conformance import watched
from tests.problems import dense, packed

LONG_PACKED = tuple(
    eight.Eight(f"long_{granularity}_{headdim}", packed((1000, 1, 700, 0, 333), (2000, 77, 900, 5, 333), 4, 2, headdim),
                granularity, options)
    for headdim in (64, 128, 256)
    for granularity, options in (("tensor", {}), ("head", {"causal": True}), ("block", {"causal": True}),
                                 ("block", {"window": (300, 10)}))
)  # fmt: skip
LONG = eight.Eight("long", dense(1, 1000, 2000, 4, 2, 128), "block", {"causal": True})
COLUMNS = 32
"""Products of 8 bits that an instruction of Hopper's tensor cores sums up."""
BACKENDS = [name for name in ("hopper", "portable") if dict(plan.available()).get(name, "") is None]


def _lse_extra(case: eight.Eight) -> float:
    """What the log-sum-exp may carry beside float32's roundings.

    Hopper's tensor cores keep 14 bits of a sum of 8-bit products, and cut it once an instruction. As scores the sums
    here are below 16, where the last of 14 bits is worth 2^-10: so much each instruction may take. Columns of padding
    add 0 and take nothing.
    """
    return 2.0**-10 * -(-case.shape.headdim // COLUMNS)


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
        states = [
            flashtile.attention(*quantized, return_lse=True, backend=backend, **case.options_on("cuda"))
            for _ in range(3)
        ]
    assert {chosen.backend for chosen in ran} == {backend}
    for state in states:
        eight.check(case, quantized, state, _lse_extra(case))


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*eight.PACKED, *LONG_PACKED], ids=lambda case: case.name)
def test_packed_sequences_match_the_reference(case: eight.Eight, backend: str) -> None:
    quantized = case.quantized("cuda")
    with watched() as ran:
        states = [eight.attend_packed(case, quantized, backend=backend) for _ in range(3)]
    assert {chosen.backend for chosen in ran} == {backend}
    for state in states:
        eight.check_packed(case, quantized, state, _lse_extra(case))


@pytest.mark.skipif("hopper" not in BACKENDS, reason="there is no Hopper")
@pytest.mark.parametrize("granularity", ["head", "block"])
def test_nan_of_other_sequences_does_not_spread(granularity: str) -> None:
    """A sequence between two others, all of it."""
    case = eight.Eight("neighbours", packed((700, 400, 900), (1500, 700, 1000), 4, 2, 128), granularity)
    q, k, v = case.tensors("cuda")
    k[1500:2200], v[1500:2200] = 0.0, 0.0
    found = []
    for poison in (0.0, torch.nan):
        k[1500:2200], v[1500:2200] = poison, poison
        found.append(eight.attend_packed(case, fp8.quantize(q, k, v, granularity), causal=True, backend="hopper"))
    assert bool(found[1].out[700:1100].isnan().all())
    for rows in (slice(0, 700), slice(1100, 2000)):
        # Tiles that are done again multiply 16-bit weights.
        one, other = (state.out[rows].float() for state in found)
        torch.testing.assert_close(other, one, rtol=0.0, atol=2**-4 * float(one.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_written_down_for_other_offsets(backend: str) -> None:
    """Calls of one kind are done again, whatever lengths the device reads."""
    lengths = ((700, 1300), (1999, 1), (0, 2000), (128, 1872), (1001, 999))
    for each in lengths:
        shape = packed(each, each, 4, 2, 64)
        case = eight.Eight("offsets", shape, "block", {"causal": True})
        quantized = case.quantized("cuda")
        eight.check_packed(case, quantized, eight.attend_packed(case, quantized, backend=backend), _lse_extra(case))
