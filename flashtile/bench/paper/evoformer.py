"""AlphaFold 2's Evoformer block (Jumper et al. 2021, supplement, algorithm 6), as OpenFold has it, without dropout.

All of it is plain PyTorch. The class of what its four attentions share is given, so that a block with the formula and
one with flashtile's kernels have the same parameters and differ in nothing else.

m (batch, sequences, residues, c_m) is the alignment's representation, z (batch, residues, residues, c_z) that of pairs;
their masks, without the last dimension, are 1 for what is there, else 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashtile.bench.paper.experiment import no_attention
from flashtile.integrations.evoformer import GatedAttention, TriangleAttention

_INFINITY = 1e9


class TextbookAttention(GatedAttention):
    """`GatedAttention` with the formula that OpenFold computes without a fused operator."""

    def forward(self, q_x: Tensor, kv_x: Tensor, biases: Sequence[Tensor | None] = ()) -> Tensor:
        """As in `GatedAttention`."""
        projections = ((self.linear_q, q_x), (self.linear_k, kv_x), (self.linear_v, kv_x))
        q, k, v = (linear(x).unflatten(-1, (self.no_heads, -1)).transpose(-2, -3) for linear, x in projections)
        out = self.combined(q, k, v, biases).transpose(-2, -3).flatten(-2)
        gate: Tensor = self.linear_g(q_x)  # type: ignore[misc]  # all of an Evoformer's attentions have gates
        result: Tensor = self.linear_o(out * torch.sigmoid(gate))
        return result

    def combined(self, q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        """q, k, v (..., heads, seqlen, headdim) -> like q."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        for bias in biases:
            if bias is not None:
                scores += bias
        return torch.softmax(scores, dim=-1) @ v


class AbsentAttention(TextbookAttention):
    """`GatedAttention` without attention, which nothing that replaces attention alone can beat."""

    def combined(self, q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        """As in `TextbookAttention`."""
        return no_attention(q, k, v)


class EvoformerBlock(nn.Module):
    """The block; `attention`: `GatedAttention` or one of the classes above."""

    def __init__(
        self,
        attention: type[GatedAttention],
        c_m: int = 256,
        c_z: int = 128,
        c_hidden: int = 32,
        heads: tuple[int, int] = (8, 4),
    ) -> None:
        super().__init__()
        self.row_attention = _RowAttention(attention, c_m, c_z, c_hidden, heads[0])
        self.column_attention = _ColumnAttention(attention, c_m, c_hidden, heads[0])
        self.transition = _Transition(c_m)
        self.outer_product_mean = _OuterProductMean(c_m, c_z, c_hidden)
        self.outgoing = _TriangleMultiplication(c_z, outgoing=True)
        self.incoming = _TriangleMultiplication(c_z, outgoing=False)
        self.starting = _triangle_attention(attention, c_z, c_hidden, heads[1], starting=True)
        self.ending = _triangle_attention(attention, c_z, c_hidden, heads[1], starting=False)
        self.pair_transition = _Transition(c_z)

    def forward(self, m: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(m, z), a block later."""
        m = m + self.row_attention(m, z, mask)
        m = m + self.column_attention(m, mask)
        m = m + self.transition(m, mask)
        z = z + self.outer_product_mean(m, mask)
        for part in (self.outgoing, self.incoming, self.starting, self.ending, self.pair_transition):
            z = z + part(z, pair_mask)
        return m, z


def _of_keys(mask: Tensor) -> Tensor:
    """(..., rows, keys) -> the bias (..., rows, 1, 1, keys)."""
    return (_INFINITY * (mask - 1))[..., None, None, :]


class _RowAttention(nn.Module):
    """Algorithm 7: every sequence attends to itself, with a bias of pairs."""

    def __init__(self, attention: type[GatedAttention], c_m: int, c_z: int, c_hidden: int, heads: int) -> None:
        super().__init__()
        self.layer_norm_m, self.layer_norm_z = nn.LayerNorm(c_m), nn.LayerNorm(c_z)
        self.linear_z = nn.Linear(c_z, heads, bias=False)
        self.mha = attention(c_m, c_m, c_m, c_hidden, heads)

    def forward(self, m: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        m = self.layer_norm_m(m)
        pairs = self.linear_z(self.layer_norm_z(z)).movedim(-1, -3).unsqueeze(-4)
        out: Tensor = self.mha(m, m, [_of_keys(mask), pairs])
        return out


class _ColumnAttention(nn.Module):
    """Algorithm 8: every residue attends to itself in the other sequences."""

    def __init__(self, attention: type[GatedAttention], c_m: int, c_hidden: int, heads: int) -> None:
        super().__init__()
        self.layer_norm_m = nn.LayerNorm(c_m)
        self.mha = attention(c_m, c_m, c_m, c_hidden, heads)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        m = self.layer_norm_m(m.transpose(-2, -3))
        out: Tensor = self.mha(m, m, [_of_keys(mask.transpose(-1, -2))])
        return out.transpose(-2, -3)


class _Transition(nn.Module):
    """Algorithms 9 and 15."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)
        self.linear_1, self.linear_2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.linear_2(torch.relu(self.linear_1(self.layer_norm(x))))
        return out * mask[..., None]


class _OuterProductMean(nn.Module):
    """Algorithm 10: what pairs of residues have in common, averaged over the sequences that have both."""

    def __init__(self, c_m: int, c_z: int, c_hidden: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c_m)
        self.linear_1, self.linear_2 = nn.Linear(c_m, c_hidden), nn.Linear(c_m, c_hidden)
        self.linear_out = nn.Linear(c_hidden**2, c_z)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        m = self.layer_norm(m)
        a, b = (linear(m) * mask[..., None] for linear in (self.linear_1, self.linear_2))
        outer = torch.einsum("...sic,...sjd->...ijcd", a, b).flatten(-2)
        out: Tensor = self.linear_out(outer)
        return out / (mask.transpose(-1, -2) @ mask + 1e-3)[..., None]


class _TriangleMultiplication(nn.Module):
    """Algorithms 11 (outgoing: z_ij from z_ik and z_jk) and 12 (incoming: from z_ki and z_kj)."""

    def __init__(self, channels: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.linear_a_p, self.linear_a_g = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.linear_b_p, self.linear_b_g = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.linear_g, self.linear_z = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = self.layer_norm_in(z)
        kept = mask[..., None]
        a = kept * torch.sigmoid(self.linear_a_g(z)) * self.linear_a_p(z)
        b = kept * torch.sigmoid(self.linear_b_g(z)) * self.linear_b_p(z)
        # (..., channels, residues, residues), multiplied as matrices of each channel.
        a, b = a.movedim(-1, -3), b.movedim(-1, -3)
        product = a @ b.transpose(-1, -2) if self.outgoing else a.transpose(-1, -2) @ b
        out: Tensor = self.linear_z(self.layer_norm_out(product.movedim(-3, -1)))
        return out * torch.sigmoid(self.linear_g(z))


def _triangle_attention(
    attention: type[GatedAttention], c_z: int, c_hidden: int, heads: int, starting: bool
) -> TriangleAttention:
    """Algorithms 13 and 14."""
    made = TriangleAttention(c_z, c_hidden, heads, starting)
    made.mha = attention(c_z, c_z, c_z, c_hidden, heads)
    return made
