"""The integrations on a GPU: what PyTorch's flash operator is given there, and what only a GPU takes.

`python -m pytest tests/gpu/test_integrations.py -n 8` takes under a minute on a warm machine.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashtile
from tests import conformance
from tests.integrations.rule import assert_close, ran

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def activated() -> Iterator[None]:
    flashtile.activate_sdpa()
    yield
    flashtile.deactivate_sdpa()


def _leaves(heads_kv: int, dtype: torch.dtype, headdim: int = 64) -> list[Tensor]:
    shapes = ((2, 4, 70, headdim), (2, heads_kv, 70, headdim), (2, heads_kv, 70, headdim))
    return [torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]


def _results(function: object, leaves: list[Tensor], **options: object) -> list[Tensor]:
    out = function(*leaves, **options)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.usefixtures("activated")
class TestActivated:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("headdim", [64, 40])
    def test_results(self, dtype: torch.dtype, causal: bool, headdim: int) -> None:
        leaves = _leaves(4, dtype, headdim)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), ran() as plans:
            found = _results(F.scaled_dot_product_attention, leaves, is_causal=causal)
        assert [plan.problem.backward for plan in plans] == [False, True]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            textbook = _results(F.scaled_dot_product_attention, leaves, is_causal=causal)
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            truth = _results(F.scaled_dot_product_attention, exact, is_causal=causal)
        for name, *three in zip(("out", "dq", "dk", "dv"), found, textbook, truth, strict=True):
            assert_close(*three, name)

    def test_grouped_queries(self) -> None:
        leaves = _leaves(2, torch.bfloat16)
        with ran() as plans:
            F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True).sum().backward()
        assert {plan.problem.heads_kv for plan in plans} == {2}

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled(self, backend: str) -> None:
        leaves = _leaves(4, torch.bfloat16)

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True) * 2

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            with ran() as plans:
                found = _results(torch.compile(layer, fullgraph=True, backend=backend), leaves)
            expected = _results(layer, leaves)
        assert [plan.problem.backward for plan in plans] == [False, True]
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)

    def test_dropout_runs_pytorchs_kernel(self) -> None:
        leaves = _leaves(4, torch.bfloat16)
        with conformance.watched() as plans:
            found = _results(F.scaled_dot_product_attention, leaves, dropout_p=0.5)
        assert plans == []
        assert all(tensor.isfinite().all() for tensor in found)

    def test_restored_between_the_passes(self) -> None:
        """PyTorch's backward kernel takes what our forward kernel returned."""
        leaves = _leaves(4, torch.bfloat16)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            expected = _results(F.scaled_dot_product_attention, leaves)
            out = F.scaled_dot_product_attention(*leaves)
            flashtile.deactivate_sdpa()
            with conformance.watched() as plans:
                found = torch.autograd.grad(out.float().square().sum(), leaves)
        assert plans == []
        for ours, theirs in zip(expected[1:], found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_masked_calls() -> None:
    leaves = _leaves(4, torch.bfloat16)
    bias = torch.randn(4, 70, 70, device="cuda", requires_grad=True)
    with flashtile.replace_sdpa(), ran() as plans:
        F.scaled_dot_product_attention(*leaves, attn_mask=bias).float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == bias.shape
    assert {plan.backend for plan in plans} <= {"hopper", "portable"}
