"""Equal bits for a sequence alone, in a batch and in a packing, at another place in each."""

from typing import Any

import torch
from torch import Tensor

import flashtile
from tests.oracle import assert_equal_bits

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "softcap_alibi": {"causal": True, "softcap": 5.0, "alibi_slopes": torch.tensor([0.5, 0.1])},
    "mask_mod": {"mask": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 < 2},
    "score_mod": {"score_mod": lambda score, b, h, q_idx, kv_idx: score + 0.1 * (q_idx - kv_idx)},
    "sinks": {"sinks": torch.tensor([0.5, -1.0])},
}

LENGTHS = (90, 37, 150)


def check(name: str, dtype: torch.dtype, backend: str, headdim: int = 32, gradients: bool = True) -> None:
    """The middle one of some sequences: alone; last of a batch, whose others differ; packed between the others."""
    options = {**OPTIONS[name], "backend": backend, "batch_invariant": True, "return_lse": True}
    generator = torch.Generator().manual_seed(0)
    total, length = sum(LENGTHS), LENGTHS[1]
    packed = [torch.randn(total, 2, headdim, generator=generator).to(dtype) for _ in range(4)]
    offsets = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    place = slice(LENGTHS[0], LENGTHS[0] + length)
    alone = [tensor[place][None] for tensor in packed]
    others = [torch.randn(2, length, 2, headdim, generator=generator).to(dtype) for _ in range(4)]
    batch = [torch.cat(pair) for pair in zip(others, alone, strict=True)]

    first = _results(alone, options, gradients)
    in_batch = _results(batch, options, gradients)
    assert_equal_bits([tensor[2:] for tensor in in_batch], first)
    in_packing = _results(packed, options, gradients, offsets)
    lse = in_packing.pop(1)[:, place][None]
    found = [tensor[place][None] for tensor in in_packing]
    assert_equal_bits([found[0], lse, *found[1:]], first)


def _results(
    tensors: list[Tensor], options: dict[str, Any], gradients: bool, offsets: Tensor | None = None
) -> list[Tensor]:
    """out, lse and the gradients of q, k and v."""
    *leaves, grad = [tensor.detach().clone().requires_grad_(gradients) for tensor in tensors]
    if offsets is None:
        state = flashtile.attention(*leaves, **options)
    else:
        state = flashtile.attention_varlen(*leaves, offsets, offsets, **options)
    found = torch.autograd.grad(state.out, leaves, grad.detach()) if gradients else ()
    return [state.out.detach(), state.lse.detach(), *found]
