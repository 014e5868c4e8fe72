"""The queue of work (a CUDA stream) that launches of this moment go to, and what belongs to one of them."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_PACK = 64
LINE = 32
"""Numbers of 32 bits in a line of the cache: counters that are in use at once do not share one."""
_SPARE = 8192
"""Lines for graphs that are made at a time: one megabyte."""

_fresh: dict[Any, Iterator[Tensor]] = {}
_NONE: Iterator[Tensor] = iter(())
_standing: dict[Any, Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}
_lock = Lock()


def queue(device: torch.device) -> Any:
    """Memory that was used in a queue may be used again there, in order; others have their own."""
    return (device, torch._C._cuda_getCurrentRawStream(device.index)) if device.type == "cuda" else device


def capturing(device: torch.device | None = None) -> bool:
    """Whether what is launched now (None: on the current GPU) is not run, but written into a CUDA graph."""
    asked = torch.cuda.is_initialized() if device is None else device.type == "cuda"
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

    They are made by the dozen, for to make one takes the host as long as a launch. Each is given out once. A graph
    has its own, for it counts anew whenever it is replayed.
    """
    if capturing(device):
        return torch.zeros(1, dtype=torch.int32, device=device)
    here = queue(device)
    found = next(_fresh.get(here, _NONE), None)
    if found is None:
        # Of two threads that come here at once one keeps its pack, the other's is forgotten after its first number.
        made = apart(lambda: torch.zeros((_PACK, LINE), dtype=torch.int32, device=device))
        _fresh[here] = pack = iter(made.unbind())
        found = next(pack)
    return found


def standing_counters(count: int, device: torch.device) -> Tensor:
    """So many numbers, a `LINE` apart: int32, zero when the next launch begins, which leaves zeros behind. `count` > 0.

    A queue has its own, for launches in it come one after the other. What is written into a graph has its own too, for
    graphs may run beside each other; it is zero before the graph runs the first time, so that nothing need be launched
    in it to make it so. It was made by an earlier call that was no part of a graph and, as graphs may live on, is never
    taken back. If there is none of it, the graph fills some of its own whenever it is replayed.
    """
    if capturing(device):
        taken = _taken(count, device)
        return torch.zeros(count * LINE, dtype=torch.int32, device=device) if taken is None else taken
    if device.type == "cuda":
        _provide(device)
    here = queue(device)
    found = _standing.get(here)
    if found is None or len(found) < count * LINE:
        # Of two threads that come here at once both have what is zero, and one keeps it.
        _standing[here] = found = apart(lambda: torch.zeros(count * LINE, dtype=torch.int32, device=device))
    return found


def _provide(device: torch.device) -> None:
    """Makes lines for graphs, unless half of those that were made are left. The older ones stay where they are."""
    packs = _spare.get(device)
    if packs is None or len(packs[-1]) < _SPARE // 2 * LINE:
        made = apart(lambda: torch.zeros(_SPARE * LINE, dtype=torch.int32, device=device))
        with _lock:
            # What was taken of a pack is in graphs, but no tensor says so: its memory is kept by what is left of it.
            _spare.setdefault(device, []).append(made)


def _taken(count: int, device: torch.device) -> Tensor | None:
    """Of the newest lines for graphs, for good; None: there are not so many."""
    with _lock:
        packs = _spare.get(device, [])
        if not packs or len(packs[-1]) < count * LINE:
            return None
        taken, packs[-1] = packs[-1][: count * LINE], packs[-1][count * LINE :]
        return taken
