"""Rows of protein folding: the Evoformer's gated row attention, with the biases of its mask and of pairs."""

from typing import Any

import torch
from torch import Tensor

from flashtile.bench.paper.experiment import (
    Call,
    Figures,
    Note,
    Pair,
    Row,
    Setting,
    no_attention,
    timed,
    with_busy,
    with_peaks,
)

CHANNELS, HEADDIM, HEADS = 256, 32, 8


def _textbook(module: Any, x: Tensor, biases: list[Tensor], attend: bool = True) -> Tensor:
    """What OpenFold computes without a fused operator, on the same parameters; attend=False: all but attention."""
    q, k, v = (
        linear(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
        for linear in (module.linear_q, module.linear_k, module.linear_v)
    )
    out = _formula(q, k, v, biases) if attend else no_attention(q, k, v)
    found: Tensor = module.linear_o(out.transpose(-2, -3).flatten(-2) * torch.sigmoid(module.linear_g(x)))
    return found


def _formula(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor]) -> Tensor:
    scores = (q * HEADDIM**-0.5) @ k.transpose(-1, -2)
    for bias in biases:
        scores = scores + bias
    return torch.softmax(scores, dim=-1) @ v


def _row(residues: int, sequences: int, training: bool) -> Any:
    def measure(setting: Setting, note: Note) -> Figures:
        from flashtile.integrations.evoformer import GatedAttention

        note("building the block")
        length, rows = setting.pick((residues, sequences), (24, 4))
        with torch.device(setting.device):
            module = GatedAttention(CHANNELS, CHANNELS, CHANNELS, HEADDIM, HEADS).to(setting.dtype)
            x = torch.randn(1, rows, length, CHANNELS, dtype=setting.dtype, requires_grad=True)
            mask = torch.zeros(1, rows, 1, 1, length, dtype=setting.dtype)
            mask[..., -length // 8 :] = -1e4
            pairs = torch.randn(1, 1, HEADS, length, length, dtype=setting.dtype, requires_grad=True)
            seed = torch.randn(1, rows, length, CHANNELS, dtype=setting.dtype)

        def variant(forward: Any) -> Call:
            def inference() -> Tensor:
                with torch.no_grad():
                    out: Tensor = forward()
                return out

            def step() -> Tensor:
                leaves = [x, pairs, *module.parameters()]
                grads = torch.autograd.grad(forward(), leaves, seed, allow_unused=True)
                return torch.cat([grad.flatten() for grad in grads[:2] if grad is not None])

            return step if training else inference

        biases = [mask, pairs]
        theirs, ours, without = (
            variant(forward)
            for forward in (
                lambda: _textbook(module, x, biases),
                lambda: module(x, x, biases),
                lambda: _textbook(module, x, biases, attend=False),
            )
        )
        pair = Pair(theirs, ours, without=without)
        return with_peaks(with_busy(timed(pair, setting, note), pair, setting, note), pair, setting)

    return measure


ROWS = tuple(
    Row(
        f"evoformer-{'training' if training else 'forward'}-{residues}",
        f"Evoformer's row attention, {residues} x {sequences} residues, {'training' if training else 'forward'}",
        "3x (OpenFold), 2.6x (Uni-Fold)",
        2.6,
        "the formula in PyTorch, as OpenFold has it",
        "the claims are of whole models; this is one block of them, projections and gate included. In training the "
        "scores are computed again for the gradient of the pair bias, which the formula has kept",
        _row(residues, sequences, training),
        rehearsed=training,
    )
    for residues, sequences in ((256, 128), (384, 512), (768, 128))
    for training in (False, True)
)
