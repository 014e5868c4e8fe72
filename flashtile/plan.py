"""Problem -> Plan: which backend, which kernel, which tiles, and why nothing faster."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashtile import backends, facts, masks
from flashtile.backends import Decoder, Kernel
from flashtile.problem import Problem

logger = logging.getLogger("flashtile")


@dataclass(frozen=True)
class Plan:
    """The choice for one Problem. `rejected` holds (backend/kernel, reason) of everything faster that was refused;
    `run` is the Kernel, or the Decoder of a call over a KV cache; `backward`: what the backward pass would choose,
    where `explain` was asked."""

    problem: Problem
    backend: str
    kernel: str
    config: Any
    rejected: tuple[tuple[str, str], ...]
    run: Any = field(repr=False, compare=False)
    backward: "Plan | None" = field(default=None, compare=False)

    def __str__(self) -> str:
        config = ", ".join(f"{name}={value}" for name, value in self.config._asdict().items())
        lines = [f"{_title(self.problem)}", f"  runs on  {self.backend}/{self.kernel} ({config})"]
        lines += [f"  refused  {name}: {reason}" for name, reason in self.rejected]
        return "\n".join([*lines, str(self.backward)] if self.backward else lines)


def _title(problem: Problem) -> str:
    lengths = f"{problem.seqlen_q}x{problem.seqlen_kv}"
    dims = f"{problem.headdim}" if problem.headdim == problem.headdim_v else f"{problem.headdim}/{problem.headdim_v}"
    dtype = str(problem.dtype).removeprefix("torch.")
    parts = [
        f"{'backward pass of ' if problem.backward else ''}attention{_kind(problem)}: "
        f"batch {problem.batch}, seqlen {lengths}",
        f"heads {problem.heads}/{problem.heads_kv}, headdim {dims}, {dtype} on {problem.device}",
        f"mask {masks.readable(problem.mask)}",
        *problem.modified,
    ]
    return ", ".join(parts)


def _kind(problem: Problem) -> str:
    if problem.cached is not None:
        return f" over a KV cache in pages of {problem.cached.page}" if problem.cached.page else " over a KV cache"
    return " (packed)" if problem.varlen else ""


def available() -> list[tuple[str, str | None]]:
    """(name, None or the reason why it cannot run here) of every backend, fastest first."""
    return [(name, backends.load(name).unavailable()) for name in backends.ORDER]


@lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str | None = None) -> Plan:
    """The fastest kernel that takes this Problem; with `backend`, the fastest of that backend only.

    Raises:
        NotImplementedError: none takes it; the message holds each one's reason.
    """
    rejected: list[tuple[str, str]] = []
    for name in backends.ORDER if backend is None else (backend,):
        module = backends.load(name)
        missing = module.unavailable()
        if missing is not None:
            rejected.append((name, missing))
            continue
        for kernel in module.KERNELS if problem.cached is None else module.DECODERS:
            reason = kernel.refuses(problem)
            if reason is None:
                chosen = Plan(problem, name, kernel.name, kernel.configure(problem), tuple(rejected), kernel)
                # A backend that is not for this machine is no news; a kernel that does not take the Problem is.
                if any("/" in refused for refused, _ in rejected):
                    logger.info("%s", chosen)
                return chosen
            rejected.append((f"{name}/{kernel.name}", reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise NotImplementedError(
        f"no backend takes {_title(problem)}: {reasons}. Leave out the option named, or the argument 'backend'."
    )


def kernel(plan: Plan) -> Kernel:
    """The kernel that a Plan names; all that run pass here."""
    run: Kernel = plan.run
    return run


def decoder(plan: Plan) -> Decoder:
    """The same for a call over a KV cache."""
    run: Decoder = plan.run
    return run


def quantizer(q: Tensor) -> Callable[..., Sequence[tuple[Tensor, Tensor]]]:
    """What rounds such tensors to 8 bits, the fastest."""
    for name in backends.ORDER:
        module = backends.load(name)
        if module.unavailable() is None:
            for candidate in module.QUANTIZERS:
                if candidate.refuses(q) is None:
                    run: Callable[..., Sequence[tuple[Tensor, Tensor]]] = candidate.quantize
                    return run
    raise NotImplementedError(f"no backend rounds tensors on {q.device.type} to 8 bits")


def eight_bits(device: torch.device) -> torch.dtype:
    """The 8-bit format with the most digits that a device multiplies, or the most usual where it multiplies none."""
    return torch.float8_e4m3fnuz if facts.arch(device).startswith("gfx94") else torch.float8_e4m3fn


def builds() -> int:
    """Kernels compiled so far, by all backends that can run here."""
    modules = map(backends.load, backends.ORDER)
    return sum(module.builds() for module in modules if module.unavailable() is None)
