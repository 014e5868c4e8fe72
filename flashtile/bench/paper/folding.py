"""Rows of protein folding: a whole Evoformer block, at sizes that AlphaFold 2 is trained and run with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.bench.paper.evoformer import AbsentAttention, EvoformerBlock, TextbookAttention
from flashtile.bench.paper.experiment import (
    Call,
    Figures,
    Note,
    Pair,
    Row,
    Setting,
    timed,
    with_busy,
    with_peaks,
)
from flashtile.integrations.evoformer import GatedAttention

FULL = {"c_m": 256, "c_z": 128, "c_hidden": 32, "heads": (8, 4)}
TOY = {"c_m": 32, "c_z": 16, "c_hidden": 8, "heads": (4, 2)}


class Inputs(NamedTuple):
    """What a block takes."""

    m: Tensor
    z: Tensor
    mask: Tensor
    pair_mask: Tensor


def random_inputs(sequences: int, residues: int, sizes: dict[str, Any], setting: Setting) -> Inputs:
    """An eighth of all entries is missing, but no line is missing whole: there attention has no meaning."""
    with torch.device(setting.device):
        m = torch.randn(1, sequences, residues, sizes["c_m"], dtype=setting.dtype, requires_grad=True)
        z = torch.randn(1, residues, residues, sizes["c_z"], dtype=setting.dtype, requires_grad=True)
        places = torch.arange(residues)
        masks = [(torch.arange(rows)[:, None] + places) % 8 > 0 for rows in (sequences, residues)]
    return Inputs(m, z, *(mask[None].to(setting.dtype) for mask in masks))


def blocks(sizes: dict[str, Any], setting: Setting) -> list[EvoformerBlock]:
    """Three with the same parameters: the formula, flashtile's kernels, no attention."""
    with torch.device(setting.device):
        made = [EvoformerBlock(kind, **sizes) for kind in (TextbookAttention, GatedAttention, AbsentAttention)]
    for block in made[1:]:
        block.load_state_dict(made[0].state_dict())
    return [block.to(setting.dtype) for block in made]


def variant(block: EvoformerBlock, inputs: Inputs, seeds: tuple[Tensor, Tensor], training: bool) -> tuple[Call, Call]:
    """(the call to be timed, the same with all of its results but for what residual connections pass on unchanged).

    training: forward and backward, of parameters too; the results are the gradients of m and z. Else m and z.
    """

    def results() -> Sequence[Tensor]:
        if not training:
            with torch.no_grad():
                found: tuple[Tensor, Tensor] = block(*inputs)
            return found
        # Without attention nothing reads the pair bias, whose parameters then have no gradient.
        leaves = [inputs.m, inputs.z, *block.parameters()]
        return torch.autograd.grad(block(*inputs), leaves, seeds, allow_unused=True)[:2]

    def compared() -> Tensor:
        passed = seeds if training else inputs[:2]
        changed = [after - before for after, before in zip(results(), passed, strict=True)]
        return torch.cat([each.detach().flatten() for each in changed])

    return lambda: results()[0], compared


def _row(residues: int, sequences: int, training: bool) -> Any:
    def measure(setting: Setting, note: Note) -> Figures:
        note("building the block")
        sizes = setting.pick(FULL, TOY)
        inputs = random_inputs(setting.pick(sequences, 4), setting.pick(residues, 24), sizes, setting)
        seeds = (torch.randn_like(inputs.m), torch.randn_like(inputs.z))
        (theirs, expected), (ours, found), (without, _) = (
            variant(block, inputs, seeds, training) for block in blocks(sizes, setting)
        )
        pair = Pair(theirs, ours, probes=(expected, found), without=without)
        return with_peaks(with_busy(timed(pair, setting, note), pair, setting, note), pair, setting)

    return measure


ROWS = tuple(
    Row(
        f"evoformer-block-{'training' if training else 'forward'}-{residues}",
        f"An Evoformer block, {residues} residues, {sequences} sequences, {'training' if training else 'forward'}",
        "3x (OpenFold), 2.6x (Uni-Fold)",
        2.6,
        "the same block with the formula in PyTorch, as OpenFold has it",
        "the claims are of whole models, and of more than attention; this is one of the blocks that they repeat, "
        "without chunks or checkpoints, plain PyTorch in both columns but for its four attentions",
        _row(residues, sequences, training),
        rehearsed=training,
    )
    for residues, sequences in ((256, 128), (384, 512), (768, 128))
    for training in (False, True)
)
