"""Attention of protein folding: the Evoformer's operator, gated attention and triangle attention.

`evoformer_attention` takes what DeepSpeed4Science's `DS4Sci_EvoformerAttention` takes (Song et al. 2023,
arXiv:2310.04610); the modules have the parameters of OpenFold's (Ahdritz et al. 2022; AlphaFold 2, algorithms 7, 8, 13
and 14), so that its state dicts load.

Two biases are added to the scores, one over keys and one over pairs that all rows share. Neither is expanded: the pair
bias goes in as `bias`, the other as a function of the score that reads it, and both get gradients in their own shapes.
Batch entries and their rows are one dimension to the kernels, a view of the two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashtile.api import attention
from flashtile.check import guests as check

_INFINITY = 1e9


def evoformer_attention(q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor | None] = ()) -> Tensor:
    """softmax(headdim ** -0.5 q k^T + biases) v for every row of a batch.

    Args:
        q: (..., rows, seqlen_q, heads, headdim), any strides; one leading dimension in DeepSpeed4Science.
        k, v: (..., rows, seqlen_kv, heads, headdim).
        biases: at most two, each one of these or None, floating, in any dtype:
            (..., rows, 1, 1, seqlen_kv), a bias of keys, mostly a mask of large negative numbers;
            (..., 1, heads, seqlen_q, seqlen_kv), a bias of pairs, shared by all rows.

    Returns:
        (..., rows, seqlen_q, heads, headdim_v).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Nothing is copied but a bias of pairs whose keys do not lie side by side, as projections leave it: each row reads it
    whole, and one copy takes less time than that. (With several batch entries, q, k and v in whose memory entries and
    rows are no one dimension are copied too.) Unlike the original it takes every dtype, head dimension and length that
    `attention` takes, and leaves the list of biases as it is. The bias of keys beside one of pairs is captured by a
    function, whose kernel is built once for each of its shapes; within a compiled function it must come from outside.
    """
    check.evoformer(q, k, v, biases)
    over_keys, over_pairs = _sorted(q, k, biases)
    rows = [tensor.flatten(0, -4) for tensor in (q, k, v)]
    out: Tensor
    if over_pairs is None:
        out = attention(*rows, bias=None if over_keys is None else over_keys.flatten(0, -4))
    elif over_keys is None:
        out = attention(*rows, bias=_pairs(over_pairs))
    elif not over_keys.numel():
        # Nothing reads it, and a function of no entries cannot be traced; its gradient is as empty.
        out = attention(*rows, bias=_pairs(over_pairs)) + 0 * over_keys.sum()
    else:
        out = attention(*rows, bias=_pairs(over_pairs), score_mod=_adding(over_keys.flatten(0, -2)))
    return out.unflatten(0, q.shape[:-3])


DS4Sci_EvoformerAttention = evoformer_attention


def triangle_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """cuEquivariance's triangle attention: softmax(scale q k^T + bias) v, for the keys that `mask` leaves.

    Args:
        q, k, v: (batch, rows, heads, seqlen, headdim).
        bias: (batch, 1, heads, seqlen, seqlen), shared by all rows; has a gradient.
        mask: bool (batch, rows, 1, 1, seqlen), True where a key may be seen. A row without any gets 0.
        scale: default headdim ** -0.5.

    Returns:
        (batch, rows, heads, seqlen, headdim), stored with the sequence before the heads.
    """
    check.triangle(q, k, v, bias, mask)
    rows = [tensor.transpose(2, 3).flatten(0, 1) for tensor in (q, k, v)]
    allowed = None if mask is None else mask.flatten(0, 1)
    out: Tensor = attention(*rows, bias=_pairs(bias), mask=allowed, scale=scale)
    return out.unflatten(0, q.shape[:2]).transpose(2, 3)


class GatedAttention(nn.Module):
    """OpenFold's `Attention`: projections, `evoformer_attention`, a gate, and a projection back.

    Args:
        c_q, c_k, c_v: the sizes of what queries, keys and values are made from.
        c_hidden: the head dimension; no_heads: the number of heads.
        gating: whether the output is multiplied by sigmoid(linear_g(q_x)).
    """

    def __init__(self, c_q: int, c_k: int, c_v: int, c_hidden: int, no_heads: int, gating: bool = True) -> None:
        super().__init__()
        self.no_heads = no_heads
        width = c_hidden * no_heads
        self.linear_q = nn.Linear(c_q, width, bias=False)
        self.linear_k = nn.Linear(c_k, width, bias=False)
        self.linear_v = nn.Linear(c_v, width, bias=False)
        self.linear_o = nn.Linear(width, c_q)
        self.linear_g = nn.Linear(c_q, width) if gating else None

    def forward(self, q_x: Tensor, kv_x: Tensor, biases: Sequence[Tensor | None] = ()) -> Tensor:
        """q_x (..., rows, seqlen_q, c_q), kv_x (..., rows, seqlen_kv, c_k), biases as above -> like q_x."""
        projections = ((self.linear_q, q_x), (self.linear_k, kv_x), (self.linear_v, kv_x))
        q, k, v = (linear(x).unflatten(-1, (self.no_heads, -1)) for linear, x in projections)
        out = evoformer_attention(q, k, v, biases).flatten(-2)
        if self.linear_g is not None:
            out = out * torch.sigmoid(self.linear_g(q_x))
        result: Tensor = self.linear_o(out)
        return result


class TriangleAttention(nn.Module):
    """OpenFold's `TriangleAttention`: gated attention over the rows, or the columns, of a pair representation.

    Args:
        c_in: the size of a pair's representation; c_hidden, no_heads: as in `GatedAttention`.
        starting: around the starting node (rows) or the ending node (columns).
    """

    def __init__(self, c_in: int, c_hidden: int, no_heads: int, starting: bool = True) -> None:
        super().__init__()
        self.starting = starting
        self.layer_norm = nn.LayerNorm(c_in)
        self.linear = nn.Linear(c_in, no_heads, bias=False)
        self.mha = GatedAttention(c_in, c_in, c_in, c_hidden, no_heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (..., rows, columns, c_in), mask (..., rows, columns) of 1 for what is there, else 0 -> like x."""
        if not self.starting:
            x, mask = x.transpose(-2, -3), None if mask is None else mask.transpose(-1, -2)
        x = self.layer_norm(x)
        keys = None if mask is None else (_INFINITY * (mask.to(x.dtype) - 1))[..., None, None, :]
        pairs = self._projected(x).unsqueeze(-4)
        out: Tensor = self.mha(x, x, [keys, pairs])
        return out if self.starting else out.transpose(-2, -3)

    def _projected(self, x: Tensor) -> Tensor:
        """`linear` with the heads in front: (..., heads, rows, columns), written so by the product itself. As a layer
        applies it heads lie side by side, and `evoformer_attention` would copy them."""
        *leading, rows, columns, size = x.shape
        entries, heads = math.prod(leading), self.linear.out_features
        weight = self.linear.weight.expand(entries, heads, size)
        product = torch.bmm(weight, x.reshape(entries, rows * columns, size).transpose(1, 2))
        return product.view(*leading, heads, rows, columns)


def _sorted(q: Tensor, k: Tensor, biases: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """(the bias of keys, the bias of pairs); a bias that could be either is one of pairs."""
    pairs = (1, q.shape[-2], q.shape[-3], k.shape[-3])
    over_keys = over_pairs = None
    for bias in biases:
        if bias is not None and over_pairs is None and bias.shape[-4:] == pairs:
            over_pairs = bias
        elif bias is not None:
            over_keys = bias
    return over_keys, over_pairs


def _pairs(bias: Tensor) -> Tensor:
    """A bias of pairs as `attention` takes it, with adjacent keys: a projection of pairs leaves heads side by side, and
    whoever loads one loads all."""
    bias = bias if bias.stride(-1) <= 1 else bias.contiguous()
    return bias.reshape(bias.shape[-4:]) if math.prod(bias.shape[:-4]) == 1 else bias.flatten(0, -5)


def _adding(table: Tensor) -> Callable[..., Any]:
    """A score function that adds the entry of the row and key."""
    return lambda score, b, h, q_idx, kv_idx: score + table[b, kv_idx]
