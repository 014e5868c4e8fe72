"""Launches that are played again: the next call of the same kind differs from the last one in addresses alone.

Triton's own launch looks at every argument to find out which compiled kernel it needs, 30 microseconds of Python or
more for each. A tape keeps that kernel, its grid and its arguments, with places where a call's tensors go.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.kernels.direct import Series, watched

Filler = Callable[[Sequence[Any]], Any]


def prepared(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to this device, whichever is current, and kernels get memory for the descriptors they make."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    return current(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to this device, whichever is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


Grid = tuple[int, int, int]


def grid_of(programs: int | Grid) -> Grid:
    """A number of programs is one side of a grid."""
    return (programs, 1, 1) if isinstance(programs, int) else programs


class Tape:
    """What was launched for some tensors, in order; `tensors`: all that may be others the next time, on one device.

    whole: nothing else was read or written; what is not may not be played.
    """

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        self._device = device
        self._count = len(tensors)
        self._places = {tensor.data_ptr(): i for i, tensor in enumerate(tensors) if tensor is not None}
        self._launches: list[tuple[Any, list[Any], list[tuple[int, Filler]]]] = []
        self._ready: Series | None = Series(len(tensors))
        self.whole = True

    def record(self, kernel: Any, programs: int | Grid, arguments: Sequence[Any]) -> None:
        """A launch of a compiled kernel; `arguments`: all that its function names, in that order."""
        fillers = [(i, self._filler(argument)) for i, argument in enumerate(arguments)]
        open_places = [(i, filler) for i, filler in fillers if filler is not None]
        # No tensor of this time is kept alive.
        constants = [None if filler else argument for argument, (_, filler) in zip(arguments, fillers, strict=True)]
        if self._ready and not self._ready.add(kernel, grid_of(programs), arguments, self._place):
            self._ready = None
        self._launches.append((kernel[grid_of(programs)], constants, open_places))

    def _place(self, tensor: Tensor) -> int | None:
        return self._places.get(tensor.data_ptr())

    def _filler(self, argument: Any) -> Filler | None:
        """Makes the argument for other tensors; None: it holds none."""
        if isinstance(argument, Tensor):
            place = self._place(argument)
            self.whole = self.whole and place is not None
            return None if place is None else lambda tensors: tensors[place]
        if isinstance(argument, TensorDescriptor):
            return self._described(argument)
        if not isinstance(argument, tuple):
            return None
        inner = [self._filler(field) for field in argument]
        if not any(inner):
            return None
        kind, plain = type(argument), [(None if f else field, f) for field, f in zip(argument, inner, strict=True)]
        if inner[0] is not None and not any(inner[1:]):
            first, rest = inner[0], argument[1:]
            return lambda tensors: tuple.__new__(kind, (first(tensors), *rest))
        return lambda tensors: tuple.__new__(kind, [field if fill is None else fill(tensors) for field, fill in plain])

    def _described(self, descriptor: TensorDescriptor) -> Filler | None:
        """Of the copy engine's tiles: the same ones of another tensor."""
        base = self._filler(descriptor.base)
        if base is None:
            return None
        # Without its base: no tensor of this time is kept alive.
        fields = {name: value for name, value in vars(descriptor).items() if name != "base"}

        def filled(tensors: Sequence[Any]) -> TensorDescriptor:
            # What the constructor checks was checked the first time.
            other = object.__new__(TensorDescriptor)
            vars(other).update(fields, base=base(tensors))
            return other

        return filled

    def play(self, tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> None:
        """The same launches over other tensors of the same shapes, strides, dtypes and alignment."""
        if len(addresses) != self._count:
            raise RuntimeError(f"a tape of {self._count} tensors is played over {len(addresses)}")
        index, ready = self._device.index, self._ready
        if ready is not None and not watched():
            stream = torch._C._cuda_getCurrentRawStream(index)
            if torch._C._cuda_getDevice() == index:
                ready(addresses, stream)
            else:
                with torch.cuda.device(index):
                    ready(addresses, stream)
            return
        with prepared(self._device):
            for launch, constants, fillers in self._launches:
                arguments = constants.copy()
                for i, fill in fillers:
                    arguments[i] = fill(tensors)
                launch(*arguments)


_NOWHERE = nullcontext()
_PLACES = range(2**20)
_SEEN = object()


def layouts_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What tells tensors of the same shapes apart, beside their addresses."""
    return tuple([t if t is None else (t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors])


def twins_of(addresses: Sequence[int]) -> tuple[int, ...]:
    """Which tensors are one and the same; nothing, if none are. A tape that was written for tensors apart serves twins
    too, not so the other way: nobody could tell which of two a launch should get."""
    there = [address for address in addresses if address]
    if len(set(there)) == len(there):
        return ()
    return tuple(map({0: -1}.setdefault, addresses, _PLACES))


def perform(
    launches: Callable[[Tape | None], None],
    tensors: Sequence[Tensor | None],
    memory: dict[Any, Any] | None,
    free: int = 0,
) -> Tape | None:
    """`launches`, which writes what it does to the tape it is given; or the tape of an earlier time, from `memory`.

    The second time writes it: what is called once has no use for a tape.

    `tensors`: all that the launches read and write and that may be others the next time; the first is not None. All
    that come with one memory are of the same shapes and devices, and but for the first `free` of the same strides,
    dtypes and alignment, and as many as before are the same ones missing.

    Returns:
        The tape, if there is one by now.
    """
    if memory is None or tensors[0] is None:
        launches(None)
        return None
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    kind = (len(addresses), addresses.count(0), *layouts_of(tensors[:free]))
    tape = memory.get(kind)
    if not isinstance(tape, Tape):
        kind += twins_of(addresses)
        tape = memory.get(kind)
    if isinstance(tape, Tape):
        tape.play(tensors, addresses)
    else:
        recorded = Tape(tensors, tensors[0].device) if tape is _SEEN else None
        launches(recorded)
        if kind not in memory:
            memory[kind] = _SEEN
        elif recorded is not None:
            # One that is not whole is not kept, for it holds the tensors that it should not have read.
            memory[kind] = tape = recorded if recorded.whole else None
    return tape if isinstance(tape, Tape) else None
