"""Dropout whose bits depend only on (seed, batch, head, query, key).

Every backend, tiling and rank therefore drops the same entries, the backward pass regenerates what the forward pass
dropped, and a test can ask for the mask. The generator is Philox4x32 with 7 rounds, the fewest that pass BigCrush
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4):

    counter = (key // 4, query, head, batch), Philox key = (seed mod 2^32, seed div 2^32), lane = key mod 4.

An entry is kept when its 32-bit number is at least round(dropout_p * 2^32).
"""

import torch
from torch import Tensor

from flashtile import check

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Four random 32-bit numbers per counter, as int64 in [0, 2^32).

    Args:
        counter: four broadcastable int64 tensors in [0, 2^32).
        seed: int64 scalar tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        # int64 products wrap around, yet both halves of the unsigned product survive in the bits.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep(seed: Tensor, dropout_p: float, batch: Tensor, head: Tensor, query: Tensor, keys: range) -> Tensor:
    """True where an entry survives: bool (batch, heads, queries, keys).

    `batch`, `head`, `query` are int64 index tensors of shapes (B, 1, 1, 1), (1, H, 1, 1), (1, 1, Q, 1); `keys` is a
    contiguous range. `seed`: a number, or of a part of a larger problem (number, first head, first query, first key):
    where in the whole the part's indices 0 lie, so that a part drops what the whole would.
    """
    if seed.ndim:
        seed, first_head, first_query, first_key = seed.unbind()
        head, query = head + first_head, query + first_query
        keys = range(keys.start + int(first_key), keys.stop + int(first_key))
    first = keys.start // 4
    groups = torch.arange(first, -(-keys.stop // 4), device=seed.device)
    lanes = torch.stack(philox((groups, query, head, batch), seed), dim=-1).flatten(-2)
    return lanes[..., keys.start - 4 * first :][..., : len(keys)] >= round(dropout_p * 2**32)


def dropout_mask(seed: int | Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_kv: int) -> Tensor:
    """The entries that `attention(..., dropout_p=dropout_p, seed=seed)` keeps.

    Args:
        seed: the int or int64 scalar tensor given to `attention`.
        dropout_p: the probability of dropping, in [0, 1).

    Returns:
        Tensor: bool (batch, heads, seqlen_q, seqlen_kv), True where kept, on the seed's device (CPU for an int).

    Raises:
        TypeError, ValueError: an argument is not as described.

    For packed sequences, `batch` counts sequences, and queries and keys count from 0 within each.
    """
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    check.dropout_mask(seed, dropout_p, sizes)
    seed = torch.as_tensor(seed, dtype=torch.int64).reshape(())
    index = [torch.arange(size, device=seed.device) for size in (batch, heads, seqlen_q)]
    views = index[0].view(-1, 1, 1, 1), index[1].view(-1, 1, 1), index[2].view(-1, 1)
    return keep(seed, dropout_p, *views, keys=range(seqlen_kv))
