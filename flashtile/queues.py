"""The queue of work (a CUDA stream) that launches of this moment go to, and what belongs to one of them."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_PACK = 256
_LINE = 32
"""Numbers of 32 bits in a line of the cache: counters that are in use at once do not share one."""

_fresh: dict[Any, Iterator[Tensor]] = {}
_NONE: Iterator[Tensor] = iter(())


@cache
def _on_gpu(device: torch.device) -> bool:
    """PyTorch takes longer to spell a device's type than to look a device up."""
    return device.type == "cuda"


def queue(device: torch.device) -> Any:
    """Memory that was used in a queue may be used again there, in order; others have their own."""
    return (device, torch._C._cuda_getCurrentRawStream(device.index)) if _on_gpu(device) else device


def capturing(device: torch.device | None = None) -> bool:
    """Whether what is launched now (None: on the current GPU) is not run, but written into a CUDA graph."""
    asked = torch.cuda.is_initialized() if device is None else _on_gpu(device)
    return asked and torch.cuda.is_current_stream_capturing()


def apart(make: Callable[[], _T]) -> _T:
    """What `make` makes, to be kept: in memory that belongs to nobody else.

    While PyTorch warms up a compiled function (`torch.compile(mode="reduce-overhead")`) whatever its thread allocates
    comes from the pool of the graph to be, and nothing but the function's outputs may be left there. Another thread's
    memory does not.
    """
    if not _warming_up():
        return make()
    stream = torch.cuda.current_stream()

    def elsewhere() -> _T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(elsewhere).result()


def _warming_up() -> bool:
    """Whether this thread's memory on the current GPU may come from the pool of a graph that is not captured yet."""
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or not torch.cuda.is_initialized():
        return False
    manager = trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return manager is not None and manager.path_state is trees.ExecutionState.WARMUP


def counter(device: torch.device) -> Tensor:
    """A number that is zero when the next launch begins: int32, at the start of its own memory.

    They are made by the hundred, for to make one takes the host as long as a launch. Each is given out once. A graph
    has its own, for it counts anew whenever it is replayed.
    """
    if capturing(device):
        return torch.zeros(1, dtype=torch.int32, device=device)
    here = queue(device)
    found = next(_fresh.get(here, _NONE), None)
    if found is None:
        # Of two threads that come here at once one keeps its pack, the other's is forgotten after its first number.
        made = apart(lambda: torch.zeros((_PACK, _LINE), dtype=torch.int32, device=device))
        _fresh[here] = pack = iter(made.unbind())
        found = next(pack)
    return found
