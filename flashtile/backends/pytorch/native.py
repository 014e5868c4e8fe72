"""PyTorch's own CPU flash operator, where it computes exactly what was asked."""

import torch
from torch import Tensor

from flashtile import masks
from flashtile.backends.pytorch import sweep
from flashtile.problem import Inputs, Problem
from flashtile.scores import Grads
from flashtile.tuning.cpu import SweepConfig

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_CAUSAL = {f'["causal","{alignment}"]': alignment for alignment in ("bottom_right", "top_left")}
PLAIN = '["full"]'


def causal(mask: str) -> bool:
    """Whether a mask is causal and nothing else."""
    return mask in _CAUSAL


def refuses(problem: Problem) -> str | None:
    """Takes plain and causal attention with one head dimension and the output in the input's dtype."""
    if problem.device != "cpu":
        return f"it runs on the CPU, the tensors are on {problem.device}"
    if problem.mask != PLAIN and problem.mask not in _CAUSAL:
        return f"the mask is {masks.readable(problem.mask)}; it takes none or causal"
    if problem.modified:
        return f"it has no {', '.join(problem.modified)}"
    if problem.headdim != problem.headdim_v:
        return f"headdim {problem.headdim} and headdim_v {problem.headdim_v} differ"
    if problem.out_dtype != problem.dtype:
        return f"the output is wanted in {problem.out_dtype}; it returns the input's dtype"
    lengths = (problem.seqlen_q, problem.seqlen_kv)
    if not problem.varlen and not _diagonal_fits(problem.mask, *lengths):
        return f"its diagonal starts at the top left, and it reads every key; seqlen_q, seqlen_kv are {lengths}"
    return None


def _diagonal_fits(mask: str, seqlen_q: int, seqlen_kv: int) -> bool:
    """The operator's diagonal starts at the top left, and NaN in keys beyond its last row would reach the output."""
    alignment = _CAUSAL.get(mask)
    return alignment is None or seqlen_q == seqlen_kv or (alignment == "top_left" and seqlen_q > seqlen_kv)


def _fits(inputs: Inputs, problem: Problem) -> bool:
    """Whether the operator takes these very shapes: of packed sequences only now each one's length is known."""
    if 0 in inputs.q.shape or 0 in inputs.k.shape:
        return False
    return _diagonal_fits(problem.mask, problem.seqlen_q, problem.seqlen_kv)


def _trustworthy(lse: Tensor) -> bool:
    """Whether the operator's result shows every NaN: a row whose scores are all NaN comes back as out 0 with lse 0."""
    return bool((torch.isfinite(lse) & (lse != 0)).all())


def _heads_second(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, heads, seqlen, headdim), which is how PyTorch lays attention out."""
    return _laid_out(inputs.q), _laid_out(inputs.k), _laid_out(inputs.v)


def _laid_out(tensor: Tensor) -> Tensor:
    """A view where the last dimension is contiguous, as the operator takes for granted; else a copy."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)


def forward(inputs: Inputs, problem: Problem, config: SweepConfig, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense problem."""
    if not _fits(inputs, problem):
        return sweep.forward(inputs, problem, config, first_batch)
    out, lse = _FORWARD(*_heads_second(inputs), 0.0, problem.mask in _CAUSAL, scale=problem.scale)
    if not _trustworthy(lse):
        return sweep.forward(inputs, problem, config, first_batch)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def backward(
    inputs: Inputs,
    problem: Problem,
    config: SweepConfig,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: Grads,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); a gradient of the log-sum-exp is the sweep's business, the operator has no place for it."""
    if grad_lse is not None or not (_fits(inputs, problem) and _trustworthy(lse)):
        return sweep.backward(inputs, problem, config, out, lse, grad_out, grad_lse, grads, first_batch)
    dq, dk, dv = _BACKWARD(
        _laid_out(grad_out),
        *_heads_second(inputs),
        out.transpose(1, 2),
        lse,
        0.0,
        problem.mask in _CAUSAL,
        scale=problem.scale,
    )
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()
