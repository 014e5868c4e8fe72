"""Calls of `flashtile.integrations.jax.attention`, and their comparison with the textbook formula in PyTorch.

Imported by tests on the CPU and on a GPU, before JAX starts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from tests.integrations.rule import assert_close, ran

LENGTHS, HEADS, HEADS_KV, HEADDIM = (13, 17), 4, 2, 8
Tensors = dict[str, Tensor]

# float64, and four devices for meshes.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)


def leaves(
    *names: str,
    batch: tuple[int, ...] = (2,),
    lengths: tuple[int, int] = LENGTHS,
    headdim: int = HEADDIM,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """q, k, v and those that are named; "shared": a bias without the batch."""
    over = (HEADS, *lengths)
    shapes = {
        "q": (*batch, lengths[0], HEADS, headdim),
        "k": (*batch, lengths[1], HEADS_KV, headdim),
        "v": (*batch, lengths[1], HEADS_KV, headdim),
        "bias": (*batch, *over),
        "shared": over,
        "sinks": (HEADS,),
        "alibi_slopes": (HEADS,),
    }
    made = {name: torch.randn(shapes[name]).to(dtype) for name in ("q", "k", "v", *names)}
    return {"bias" if name == "shared" else name: tensor for name, tensor in made.items()}


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    allowed: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula in the inputs' dtype; causality is aligned to the bottom right."""
    group = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    length_q, length_kv = scores.shape[-2:]
    distance = torch.arange(length_q)[:, None] + (length_kv - length_q) - torch.arange(length_kv)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * distance.abs()
    if causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    joined = scores
    if sinks is not None:
        joined = torch.cat([scores, sinks[..., None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    lse = joined.logsumexp(dim=-1)
    return torch.einsum("...hqk,...khd->...qhd", (scores - lse[..., None]).exp(), v), lse


def _formula(given: Tensors, dtype: torch.dtype, grad: Tensor, **rule: Any) -> Tensors:
    """out, and the gradient of every leaf."""
    used = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in given.items()}
    out, _ = textbook(**used, **rule)
    gradients = torch.autograd.grad(out, list(used.values()), grad.to(dtype))
    return {"out": out, **{f"d{name}": found for name, found in zip(used, gradients, strict=True)}}


def compare(
    function: Callable[..., Any], given: Tensors, where: Any = None, jitted: bool = True, **rule: Any
) -> list[Any]:
    """Asserts that output and gradients err at most as the rule allows; returns the plans that ran.

    function: of JAX arrays, by the names of leaves. where: their device or sharding. rule: what `textbook` takes.
    """
    shape = (*given["q"].shape[:-1], given["v"].shape[-1])
    grad = torch.linspace(-1, 1, given["q"].numel()).sin().reshape(shape).to(given["q"].dtype)

    def results(arrays: dict[str, Array], cotangent: Array) -> dict[str, Array]:
        out, pullback = jax.vjp(lambda known: function(**known), arrays)
        (gradients,) = pullback(cotangent)
        return {"out": out, **{f"d{name}": gradient for name, gradient in gradients.items()}}

    arrays = {name: array(tensor, where) for name, tensor in given.items()}
    with ran() as plans:
        found = jax.block_until_ready((jax.jit(results) if jitted else results)(arrays, array(grad, where)))
    expected, truth = (_formula(given, dtype, grad, **rule) for dtype in (grad.dtype, torch.float64))
    assert set(found) == set(expected)
    for name, result in found.items():
        assert_close(tensor_of(result), expected[name], truth[name], name)
    return plans


def array(tensor: Tensor, where: Any = None) -> Array:
    return jax.device_put(jnp.from_dlpack(tensor.detach().clone()), where or jax.devices("cpu")[0])


def tensor_of(array: Array) -> Tensor:
    return torch.from_dlpack(jax.device_put(array, jax.devices("cpu")[0])).clone()
