"""The Evoformer block of the benchmark: its parts against their formulas, and with flashtile against the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtile.bench.paper import folding
from flashtile.bench.paper.evoformer import AbsentAttention, EvoformerBlock, TextbookAttention
from flashtile.bench.paper.experiment import Setting
from flashtile.bench.paper.folding import Inputs
from flashtile.integrations.evoformer import GatedAttention
from tests.integrations.rule import assert_close, ran

SEQUENCES, RESIDUES = 5, 13


@pytest.fixture
def inputs() -> Inputs:
    return folding.random_inputs(SEQUENCES, RESIDUES, folding.TOY, Setting("cpu", torch.float32))


def _block(attention: type[GatedAttention], like: nn.Module | None = None) -> EvoformerBlock:
    block = EvoformerBlock(attention, **folding.TOY)
    if like is not None:
        block.load_state_dict(like.state_dict())
    return block


def _run(block: EvoformerBlock, inputs: Inputs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Results and the gradients of everything."""
    block = block.to(dtype)
    m, z, *masks = (each.detach().to(dtype) for each in inputs)
    leaves = {"dm": m.requires_grad_(), "dz": z.requires_grad_(), **dict(block.named_parameters())}
    out = dict(zip(("m", "z"), block(m, z, *masks), strict=True))
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape).to(dtype) for x in out.values()]
    gradients = torch.autograd.grad(list(out.values()), list(leaves.values()), weights)
    return {**out, **dict(zip(leaves, gradients, strict=True))}


def test_flashtile_in_a_block(inputs: Inputs) -> None:
    """Results and all gradients, parameters' too, as accurate as with the formula; all four attentions run kernels."""
    textbook = _block(TextbookAttention)
    ours = _block(GatedAttention, textbook)
    with ran() as plans:
        found = _run(ours, inputs)
    assert len(plans) >= 4
    expected, truth = _run(textbook, inputs), _run(textbook, inputs, torch.float64)
    for name in truth:
        assert_close(found[name], expected[name], truth[name], name)


def test_without_attention(inputs: Inputs) -> None:
    """What stands for it has the same parameters, all of which but the pair bias's still get gradients."""
    block = _block(AbsentAttention, _block(TextbookAttention))
    torch.autograd.backward([x.sum() for x in block(*inputs)])
    missing = {name for name, parameter in block.named_parameters() if parameter.grad is None}
    biases = {"row_attention.linear_z.weight", "starting.linear.weight", "ending.linear.weight"}
    assert missing == {*biases, "row_attention.layer_norm_z.weight", "row_attention.layer_norm_z.bias"}


@pytest.mark.parametrize(("name", "formula"), [("outgoing", "bikc,bjkc->bijc"), ("incoming", "bkic,bkjc->bijc")])
def test_triangle_multiplication(name: str, formula: str, inputs: Inputs) -> None:
    """Algorithms 11 and 12."""
    part: Any = getattr(_block(TextbookAttention), name)
    z = part.layer_norm_in(inputs.z)
    a, b = (
        inputs.pair_mask[..., None] * torch.sigmoid(gate(z)) * linear(z)
        for gate, linear in ((part.linear_a_g, part.linear_a_p), (part.linear_b_g, part.linear_b_p))
    )
    product = part.linear_z(part.layer_norm_out(torch.einsum(formula, a, b)))
    torch.testing.assert_close(part(inputs.z, inputs.pair_mask), torch.sigmoid(part.linear_g(z)) * product)


def test_outer_product_mean(inputs: Inputs) -> None:
    """Algorithm 10: with a single sequence that is there, the outer product of that sequence."""
    part = _block(TextbookAttention).outer_product_mean
    mask = torch.zeros_like(inputs.mask)
    mask[:, 2] = 1
    m = part.layer_norm(inputs.m)[:, 2]
    a, b = part.linear_1(m), part.linear_2(m)
    outer = a[:, :, None, :, None] * b[:, None, :, None, :]
    expected = part.linear_out(outer.flatten(-2)) / 1.001
    torch.testing.assert_close(part(inputs.m, mask), expected)
