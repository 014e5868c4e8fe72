"""The backends, fastest first, and the contract that each one fulfils.

A backend is a module `flashtile.backends.<name>` with five names: `unavailable() -> str | None` (why it cannot run on
this machine), `builds() -> int` (how many kernels it has compiled), `KERNELS`, a tuple of `Kernel`s, fastest first,
`DECODERS`, the same of `Decoder`s, for calls over a KV cache, and `QUANTIZERS`, of `Quantizer`s, which round to 8 bits.
The planner asks each in turn whether it takes a Problem; the first that gives no reason against it runs. No backend
imports another.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from flashtile.problem import CacheTensors, Inputs, Problem

ORDER: tuple[str, ...] = ("hopper", "portable", "pytorch")
"""Names of the backends, fastest first."""


class Gradients(NamedTuple):
    """What a backward pass returns: None for what `Problem.wanted` does not name."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    score: Sequence[Tensor | None] = ()


Memory = dict[Any, Any]
"""What earlier calls with an equal Problem left behind, so that the next one starts sooner; empty at first."""

AGAIN = "again"
"""Where a kernel may leave in a Memory what does a whole pass sooner, for other tensors of the same layouts.

Forward: again(inputs) -> [out, lse, ...]. Backward, where no gradients but those of q, k and v are wanted:
again(inputs, out, lse, grad_out) -> [dq, dk, dv, ...]. Decoding: again((q, k_cache, v_cache, *cache, alibi_slopes,
sinks)) -> [out, lse, ...]. Each may return None: the kernel is to be asked, for other tensors are one and the same than
before, or what was saved lies otherwise in memory.
"""


@dataclass(frozen=True)
class Kernel:
    """One way of computing attention.

    refuses(problem): the reason why this kernel cannot take the Problem, or None.
    configure(problem): the tile sizes and other tuning; never changes results beyond rounding.
    forward(inputs, problem, config, memory) -> (out, lse), contiguous, as `State` describes.
    backward(inputs, problem, config, out, lse, grad_out, grad_lse, memory) -> Gradients; either gradient may be None.
    configs(problem): all that such passes take, whatever their length; empty: one serves all.
    """

    name: str
    refuses: Callable[[Problem], str | None]
    configure: Callable[[Problem], Any]
    forward: Callable[[Inputs, Problem, Any, Memory], tuple[Tensor, Tensor]]
    backward: Callable[[Inputs, Problem, Any, Tensor, Tensor, Tensor | None, Tensor | None, Memory], Gradients]
    configs: Callable[[Problem], Sequence[Any]] = lambda problem: ()


@dataclass(frozen=True)
class Decoder:
    """One way of appending to a KV cache and attending over it; `refuses` and `configure` are as a `Kernel`'s.

    decode(inputs, cache, problem, config, memory) -> (out, lse), contiguous; the new rows of `cache` are written into
    inputs.k and inputs.v, in place. Everything was checked before, but what lies in tensors on a device.
    """

    name: str
    refuses: Callable[[Problem], str | None]
    configure: Callable[[Problem], Any]
    decode: Callable[[Inputs, CacheTensors, Problem, Any, Memory], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Quantizer:
    """One way of rounding q, k and v to 8-bit floats; refuses(q): the reason why it cannot take such tensors, or None.

    quantize(q, k, v, granularity, incoherent, dtype, seed) -> (data, scale) of each (see `flashtile.fp8.quantize`).
    """

    name: str
    refuses: Callable[[Tensor], str | None]
    quantize: Callable[..., Sequence[tuple[Tensor, Tensor]]]


def compiled(kernels: Sequence[Any]) -> int:
    """What Triton has compiled these kernels to: each keeps that itself, by device."""
    caches = (getattr(kernel, "device_caches", {}) for kernel in kernels)
    return sum(len(device[0]) for cache in caches for device in cache.values())


_loading = threading.RLock()
# A process that is forked while another thread imports would wait for that import for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release)


def load(name: str) -> ModuleType:
    """The backend module of that name."""
    from importlib import import_module

    with _loading:
        return import_module(f"flashtile.backends.{name}")
