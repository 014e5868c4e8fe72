"""Rung 7: the sweep that ships.

Nothing new: `flashtile/backends/pytorch/sweep.py` is rungs 3, 4 and 5 in one forward and one backward loop, and
`flashtile/state.py` is rung 6. What the sweep adds is engineering, all of it visible there:

- query heads that share a key/value head are packed into one tile (GQA), so keys and values are never repeated;
- (batch, head) pairs share a pass, as many as keep the scores in the caches (`flashtile/tuning/cpu.py`);
- score modifiers, dropout and sinks are hooks on a tile of scores, in the forward and the backward loop alike;
- 16-bit inputs are summed in float32.

This file imports it and calls it twice: through the public function, and as the planner does, with a `Problem`. Where
PyTorch's own CPU operator computes exactly what was asked, the planner prefers that kernel (`aten_flash`): those are
the rows named flashtile.attention.

On a GPU a loop in PyTorch starts a kernel for each of its lines, and every tile of scores goes out to memory and back.
There the shipped sweep is the same loop inside a kernel, so that a tile of scores never leaves the processor that made
it: in Triton, `flashtile/backends/portable/forward.py` and `backward.py`. The planner prefers the backend made for the
GPU at hand where there is one (`flashtile/backends/hopper`): those are the rows named flashtile.attention.

Run me: python docs/ladder/rung7_shipped.py [--quick] [--device cuda]
"""

from collections.abc import Iterator, Sequence

import rung1_naive
import rung3_online_softmax
import rung4_backward
import torch
from measure import Row, agree, here, inputs, main, row, trained
from torch import Tensor

import flashtile
from flashtile.backends.pytorch import sweep
from flashtile.problem import Inputs, Options, describe


def shipped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) by the package's own forward loop, on a CPU called as the planner calls it."""
    if q.is_cuda:
        return tuple(flashtile.attention(q, k, v, backend="portable", return_lse=True))
    call = Inputs(q, k, v)
    problem = describe(call, Options(scale=q.shape[-1] ** -0.5, out_dtype=q.dtype))
    return sweep.forward(call, problem, sweep.configure(problem))


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The public function, made to use that loop: a mask that hides nothing, and that `aten_flash` does not take."""
    if q.is_cuda:
        return flashtile.attention(q, k, v, backend="portable")
    return flashtile.attention(q, k, v, mask=flashtile.masks.full() & flashtile.masks.full())


def chosen(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The public function as a title; on a GPU with the kernel that it takes."""
    if not q.is_cuda:
        return "flashtile.attention"
    plan = flashtile.explain(q, k, v)
    return f"flashtile.attention ({plan.backend}/{plan.kernel})"


def check() -> None:
    q, k, v = inputs(300)
    wanted = flashtile.reference.attention(q, k, v)
    out, lse = shipped(q, k, v)
    agree("out, the sweep itself", out, wanted.out)
    agree("lse, the sweep itself", lse, wanted.lse)
    agree("out, flashtile.attention", flashtile.attention(q, k, v), wanted.out)
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    true = torch.autograd.grad(flashtile.reference.attention(*exact).out, exact, torch.ones_like(exact[2]))
    for name, function in (("the sweep itself", tiled), ("flashtile.attention", flashtile.attention)):
        for which, found, gradient in zip(("dq", "dk", "dv"), trained(function, (q, k, v))()[1:], true, strict=True):
            agree(f"{which}, {name}", found, gradient, size=max(1.0, float(gradient.abs().max())))
    if here().device == "cpu":
        kernel = flashtile.explain(q, k, v, mask=flashtile.masks.full() & flashtile.masks.full()).kernel
        if kernel != "tiled":
            raise AssertionError(f"tiled(): runs {kernel}")


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    seqlen = seqlens[-1]
    q, k, v = inputs(seqlen)
    best = chosen(q, k, v)
    yield row("forward, formula (rung 1)", seqlen, lambda: rung1_naive.attention(q, k, v))
    yield row("forward, online softmax (rung 3)", seqlen, lambda: rung3_online_softmax.attention(q, k, v))
    yield row("forward, shipped sweep", seqlen, lambda: shipped(q, k, v))
    yield row(f"forward, {best}", seqlen, lambda: tuple(flashtile.attention(q, k, v, return_lse=True)))
    training = (
        ("formula (rung 1)", lambda *qkv: rung1_naive.attention(*qkv)[0]),
        ("recomputation (rung 4)", lambda *qkv: rung4_backward.attention(*qkv)[0]),
        ("shipped sweep", tiled),
        (best, flashtile.attention),
    )
    for name, function in training:
        yield row(f"training, {name}", seqlen, trained(function, (q, k, v)))


if __name__ == "__main__":
    main("Rung 7: the sweep that ships", check, measure, devices=("cpu", "cuda"))
