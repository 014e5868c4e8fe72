"""The entries that a backend's dropout keeps, bit by bit, forward and backward, beside what `dropout_mask` says."""

import torch

import flashtile

SEED = 0x0123_4567_89AB_CDEF


def check(backend: str, device: str, size: int, dropout_p: float = 0.35) -> None:
    """Of `size` queries, keys and columns. With q = 0 all weights are alike; values are unit vectors, so the output is
    the weights; gradients of the output are unit vectors too, so dV is the weights of the backward pass, transposed."""
    shape = (2, size, 2, size)
    q = torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
    k = torch.ones(shape, dtype=torch.bfloat16, device=device)
    units = torch.eye(size, dtype=torch.bfloat16, device=device)[:, None].expand(shape).contiguous()
    v = units.clone().requires_grad_()
    out = flashtile.attention(q, k, v, dropout_p=dropout_p, seed=SEED, backend=backend)
    (dv,) = torch.autograd.grad(out, [v], units)
    kept = flashtile.dropout_mask(SEED, dropout_p, 2, 2, size, size).to(device)
    weight = 1 / (1 - dropout_p) / size
    for found, expected in ((out.transpose(1, 2), kept), (dv.transpose(1, 2), kept.transpose(2, 3))):
        assert torch.equal(found > 0, expected)
        torch.testing.assert_close(found.float(), expected * weight, rtol=2**-8, atol=0.0)
