"""The Hopper backend: Gluon kernels for sm_90a, with the tensor memory accelerator, wgmma and specialised warps.

So far plain, causal and windowed attention, run in an emulator alone; it is used where it is asked for by name.
"""

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashtile import backends
from flashtile.backends import Gradients, Kernel, Memory
from flashtile.problem import Inputs, Problem
from flashtile.region import region
from flashtile.tuning.hopper import BackwardConfig, HopperConfig, backward_config, forward_config


def unavailable() -> str | None:
    """Triton is installed, and there is a GPU of compute capability 9.0."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() or torch.version.hip:
        return "there is no NVIDIA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is not a Hopper"
    return None


def builds() -> int:
    return backends.compiled((_launch().forward_kernel, _launch().backward_kernel))


def refuses(problem: Problem) -> str | None:
    """Takes dense calls in half precision under a window."""
    largest = 128 if problem.backward else 256
    checks = (
        (problem.device != "cuda", f"it runs on cuda, the tensors are on {problem.device}"),
        (problem.backward and problem.deterministic, "its backward pass adds in any order"),
        (problem.varlen, "it takes no packed sequences"),
        (problem.dtype not in (torch.float16, torch.bfloat16), f"it takes no {problem.dtype}"),
        (problem.out_dtype is not problem.dtype, f"it writes {problem.dtype}, not {problem.out_dtype}"),
        (max(problem.headdim, problem.headdim_v) > largest, f"its {_pass(problem)} takes up to headdim {largest}"),
        (not problem.described, "rows of q, k or v do not begin at multiples of 16 bytes"),
        (bool(problem.modified), f"it has no {', '.join(problem.modified)}"),
        (bool(region(problem.mask).rest), "its only masks are causal and windows"),
        (problem.scale <= 0, "its scale must be positive"),
        (0 in (problem.batch, problem.seqlen_q, problem.seqlen_kv), "it takes no empty tensors"),
    )
    return next((reason for found, reason in checks if found), None)


def _pass(problem: Problem) -> str:
    return "backward pass" if problem.backward else "forward pass"


def configure(problem: Problem) -> HopperConfig | BackwardConfig:
    """The row of the tuning table."""
    headdim = max(problem.headdim, problem.headdim_v)
    return backward_config(headdim) if problem.backward else forward_config(headdim)


@cache
def _launch() -> ModuleType:
    """Imported when first used: importing flashtile must not import triton."""
    from flashtile.backends.hopper import launch

    return launch


def _forward(inputs: Inputs, problem: Problem, config: HopperConfig, memory: Memory) -> tuple[Tensor, Tensor]:
    out_and_lse: tuple[Tensor, Tensor] = _launch().forward(inputs, problem, config)
    return out_and_lse


def _backward(inputs: Inputs, problem: Problem, config: BackwardConfig, *rest: Any) -> Gradients:
    *saved, _memory = rest
    gradients: Gradients = _launch().backward(inputs, problem, config, *saved)
    return gradients


KERNELS = (Kernel("warp_specialized", refuses, configure, _forward, _backward),)
