"""The queue of work (a CUDA stream) that launches of this moment go to, and what belongs to one of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PACK = 64
_LINE = 32
"""Numbers of 32 bits in a line of the cache: counters that are in use at once do not share one."""

_fresh: dict[Any, Iterator[Tensor]] = {}
_NONE: Iterator[Tensor] = iter(())


def queue(device: torch.device) -> Any:
    """Memory that was used in a queue may be used again there, in order; others have their own."""
    return (device, torch._C._cuda_getCurrentRawStream(device.index)) if device.type == "cuda" else device


def capturing(device: torch.device | None = None) -> bool:
    """Whether what is launched now (None: on the current GPU) is not run, but written into a CUDA graph."""
    asked = torch.cuda.is_initialized() if device is None else device.type == "cuda"
    return asked and torch.cuda.is_current_stream_capturing()


def counter(device: torch.device) -> Tensor:
    """A number that is zero when the next launch begins: int32, at the start of its own memory.

    They are made by the dozen, for to make one takes the host as long as a launch. Each is given out once. A graph
    has its own, for it counts anew whenever it is replayed.
    """
    if capturing(device):
        return torch.zeros(1, dtype=torch.int32, device=device)
    here = queue(device)
    found = next(_fresh.get(here, _NONE), None)
    if found is None:
        # Of two threads that come here at once one keeps its pack, the other's is forgotten after its first number.
        _fresh[here] = pack = iter(torch.zeros((_PACK, _LINE), dtype=torch.int32, device=device).unbind())
        found = next(pack)
    return found
