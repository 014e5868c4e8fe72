"""8-bit inputs in Triton's interpreter, which multiplies 16 bits in their place, as GPUs without 8-bit products do."""

import pytest
import torch

import flashtile
from flashtile import fp8
from tests import eight
from tests.conformance import watched

NAMES = ("tensor_window", "softcap", "document", "e5m2", "odd_columns")


@pytest.mark.parametrize("case", [case for case in eight.CASES if case.name in NAMES], ids=lambda case: case.name)
def test_matches_reference(case: eight.Eight) -> None:
    quantized = fp8.quantize(*case.tensors(dtype=torch.float16), case.granularity, case.incoherent, dtype=case.dtype)
    with watched() as ran:
        state = flashtile.attention(*quantized, return_lse=True, backend="portable", **case.options)
    assert [(plan.backend, plan.kernel) for plan in ran] == [("portable", "sweep_halves")]
    eight.check(case, quantized, state)


def test_packed_sequences_of_any_length() -> None:
    """Their values lie upright, and blocks that share a scale begin where no sequence does."""
    q, k, v = (torch.randn(200, 2, 32, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    v[:128] *= 30
    offsets = torch.tensor([0, 37, 150, 200], dtype=torch.int32)
    quantized = fp8.quantize(q, k, v)
    found, expected = (
        flashtile.attention_varlen(*quantized, offsets, offsets, causal=True, backend=backend).float()
        for backend in ("portable", "pytorch")
    )
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2**-9 * float(expected.abs().max()))


def test_nan_of_padding_does_not_spread() -> None:
    q, k, v = (tensor.half() for tensor in eight.Eight("padding", eight.dense(1, 70, 150, 1, 1, 32)).tensors())
    k[:, 90:], v[:, 90:] = 0.0, 0.0
    used, found = torch.tensor([90]), []
    for poison in (0.0, torch.nan):
        k[:, 90:], v[:, 90:] = poison, poison
        quantized = fp8.quantize(q, k, v)
        out = flashtile.attention(*quantized, mask=lambda b, h, q_idx, kv_idx: kv_idx < used[b], backend="portable")
        found.append(out.float())
    torch.testing.assert_close(found[1], found[0], rtol=2**-9, atol=2**-9 * float(found[0].abs().max()))
