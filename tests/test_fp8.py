"""8-bit floats on the CPU: rounding, what attention makes of it, gradients, and every message."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import check, facts, fp8, plan, scaled
from flashtile.backends import portable
from flashtile.fp8 import Scaled
from tests import eight
from tests.conformance import watched
from tests.problems import dense
from tests.raises import lines_run, raises

CASE = eight.Eight("cpu", dense(2, 70, 200, 4, 2, 48, 40), "block", {"causal": True})
LOWS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@pytest.mark.parametrize("low", LOWS, ids=str)
@pytest.mark.parametrize("granularity", scaled.GRANULARITIES)
def test_rounding_errs_by_half_a_unit(granularity: str, low: torch.dtype) -> None:
    q, k, v = CASE.tensors(dtype=torch.float32)
    quantized = fp8.quantize(q, k, v, granularity, False, dtype=low)
    # What PyTorch tells of the formats of CDNA3 is not what they are.
    digits = 2.0**-3 if "e4m3" in str(low) else 2.0**-2
    least = 2.0**-9 if "e4m3" in str(low) else 2.0**-16
    for tensor, part, rows in zip((q, k, v), quantized, (64, 128, 128), strict=True):
        assert part.shape == tuple(tensor.shape)
        scale = part.scale.repeat_interleave(rows, -1) if granularity == "block" else part.scale
        unit = scale[..., : tensor.shape[1]].transpose(1, 2)[..., None]
        allowed = torch.maximum(tensor.abs() * digits / 2, unit * least / 2) * (1 + 1e-5)
        assert bool(((part.dequantize() - tensor).abs() <= allowed).all())
        assert float(part.data.float().abs().max()) == scaled.largest(low)


@pytest.mark.parametrize("headdim", [1, 40, 96, 256])
def test_the_rotation_is_orthogonal(headdim: int) -> None:
    turn = scaled.rotation(headdim, 3, torch.device("cpu"), torch.float32)
    matrix = turn.apply(torch.eye(headdim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(headdim), rtol=0.0, atol=1e-5)
    assert len(turn.matrix) >= scaled.NARROWEST


def test_incoherence_spreads_what_is_large() -> None:
    """One column far larger than the others costs the others their digits."""
    q = torch.randn(1, 128, 1, 64, generator=torch.Generator().manual_seed(0))
    q[..., 5] *= 100
    errors = []
    for incoherent in (False, True):
        part = fp8.quantize(q, q, q, "block", incoherent, dtype=torch.float8_e4m3fnuz).q
        errors.append((part.dequantize() @ part.dequantize().mT - q @ q.mT).abs().median())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("case", eight.CASES, ids=lambda case: case.name)
def test_attention_is_that_of_what_the_numbers_stand_for(case: eight.Eight) -> None:
    quantized = case.quantized()
    with watched() as ran:
        state = flashtile.attention(*quantized, return_lse=True, **case.options)
    assert [(plan.backend, plan.kernel) for plan in ran] == [("pytorch", "tiled")]
    assert state.out.dtype is case.options.get("out_dtype", torch.bfloat16)
    eight.check(case, quantized, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_output_has_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    quantized = CASE.quantized()
    assert flashtile.attention(*quantized, out_dtype=dtype).dtype is dtype


def test_packed_sequences() -> None:
    q, k, v = (tensor.flatten(0, 1) for tensor in CASE.tensors(dtype=torch.float16))
    offsets_q, offsets_k = torch.tensor([0, 30, 140]), torch.tensor([0, 190, 400])
    quantized = fp8.quantize(q, k, v)
    found = flashtile.attention_varlen(*quantized, offsets_q, offsets_k, causal=True)
    for i in range(2):
        rows, keys = slice(*offsets_q[i : i + 2].tolist()), slice(*offsets_k[i : i + 2].tolist())
        parts = [part.dequantize(torch.float32) for part in quantized]
        alone = flashtile.attention(parts[0][None, rows], parts[1][None, keys], parts[2][None, keys], causal=True)
        torch.testing.assert_close(found[rows], alone[0].half(), rtol=2e-3, atol=2e-3)


def _gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in CASE.tensors()]
    grad = torch.randn(2, 70, 4, 40, generator=torch.Generator().manual_seed(5))
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def test_gradients_are_those_of_the_tensors_that_were_rounded() -> None:
    """They err as the output does: what they are made of, (out, lse), is the 8-bit pass's."""

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flashtile.attention(*fp8.quantize(q, k, v), causal=True)
        return out

    with watched() as ran:
        found = _gradients(rounded, torch.bfloat16)
    assert [(plan.problem.dtype, plan.problem.backward) for plan in ran] == [
        (torch.float8_e4m3fn, False),
        (torch.bfloat16, True),
    ]
    exact = _gradients(functools.partial(flashtile.attention, causal=True), torch.float64)
    out, *errors = [
        float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(found, exact, strict=True)
    ]
    assert out < 0.1
    assert max(errors) < 2 * out


def test_it_compiles_with_gradients() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flashtile.attention(*fp8.quantize(q, k, v), causal=True)
        return out

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for found, eager in zip(_gradients(compiled, torch.bfloat16), _gradients(step, torch.bfloat16), strict=True):
        assert torch.equal(found, eager)


def test_without_gradients_nothing_else_is_kept() -> None:
    assert all(part.source is None for part in CASE.quantized())


def test_explain_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    plan = flashtile.explain(*CASE.quantized(), causal=True)
    assert plan.problem.scaled == "block"
    assert "float8_e4m3fn on cpu" in capsys.readouterr().out


Q = torch.randn(1, 70, 4, 32)
K = torch.randn(1, 150, 2, 32)
EIGHT = fp8.quantize(Q, K, K)


def _attend(q: Any = EIGHT.q, k: Any = EIGHT.k, v: Any = EIGHT.v, **options: Any) -> Any:
    return flashtile.attention(q, k, v, **options)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fp8.quantize(Q.double(), K.double(), K.double()), TypeError, "q: got torch.float64, need float16"),
    (lambda: fp8.quantize(Q, K, K, "row"), ValueError, "granularity: got 'row', need one of 'tensor', 'head', 'block'"),
    (lambda: fp8.quantize(Q, K, K, incoherent=1), TypeError, "incoherent: got int, need True or False"),  # type: ignore[arg-type]
    (lambda: fp8.quantize(Q, K, K, dtype=torch.int8), ValueError, "dtype: got torch.int8, need torch.float8_e4m3fn"),
    (lambda: fp8.quantize(Q, K, K, seed=0.5), TypeError, "seed: got float, need an int"),  # type: ignore[arg-type]
    (lambda: _attend(k=K), TypeError, "k: got Tensor, need flashtile.fp8.Scaled as the others"),
    (lambda: _attend(q=replace(EIGHT.q, data=Q)), TypeError, "q.data: got torch.float32, need torch.float8_e4m3fn"),
    (
        lambda: _attend(k=fp8.quantize(Q, K, K, dtype=torch.float8_e5m2).k),
        TypeError,
        "k.data: got torch.float8_e5m2, need torch.float8_e4m3fn as q",
    ),
    (lambda: _attend(k=fp8.quantize(Q, K, K, "head").k), ValueError, "k.granularity: got 'head', need 'block' as q"),
    (lambda: _attend(q=replace(EIGHT.q, data=EIGHT.q.data[0])), ValueError, r"q: got shape \(70, 4, 32\), need"),
    (lambda: _attend(k=_doubled()), ValueError, "k: got batch 2, need 1 as q"),
    (lambda: _attend(q=replace(EIGHT.q, scale=EIGHT.q.scale[..., :1])), ValueError, "q.scale: got torch.float32 of"),
    (lambda: _attend(v=EIGHT.k), ValueError, "turned: got False, False, False of q, k, v, need values on their side"),
    (lambda: _attend(out_dtype=torch.float64), ValueError, "out_dtype: got torch.float64, need torch.float16"),
]


def _doubled() -> Scaled:
    return replace(EIGHT.k, data=EIGHT.k.data.repeat(2, 1, 1, 1), scale=EIGHT.k.scale.repeat(2, 1, 1))


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=[message[:30] for _, _, message in WRONG])
def test_wrong_calls(wrong: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        wrong()
    assert re.search("[,;] need ", str(caught.value)), str(caught.value)


def test_every_message_is_in_the_table() -> None:
    file = Path(check.__file__).parent / "scaled.py"
    calls = [(wrong, kind) for wrong, kind, _ in WRONG]
    assert sorted(raises([file]) - lines_run(file.parent, calls)) == []


@pytest.mark.parametrize(
    ("arch", "dtype", "multiplied"),
    [
        ("sm_80", torch.float8_e4m3fn, False),
        ("sm_89", torch.float8_e4m3fn, True),
        ("sm_90", torch.float8_e5m2, True),
        ("sm_90", torch.float8_e4m3fnuz, False),
        ("sm_100", torch.float8_e4m3fn, True),
        ("gfx90a", torch.float8_e4m3fn, False),
        ("gfx942", torch.float8_e4m3fn, False),
        ("gfx942", torch.float8_e4m3fnuz, True),
        ("gfx950", torch.float8_e4m3fn, True),
        ("gfx1100", torch.float8_e4m3fn, False),
    ],
)
def test_which_gpus_multiply_which_formats(arch: str, dtype: torch.dtype, multiplied: bool) -> None:
    """By the GPU that the tensors lie on."""
    assert portable.multiplies_eight_bits(dtype, arch) == multiplied


def test_the_usual_format_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "arch", lambda device: "gfx942" if device.index == 1 else "gfx950")
    assert plan.eight_bits(torch.device("cuda", 0)) is torch.float8_e4m3fn
    assert plan.eight_bits(torch.device("cuda", 1)) is torch.float8_e4m3fnuz
