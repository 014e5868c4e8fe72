"""What a thread that captures a CUDA graph may do beside it.

A capture writes down what is launched. It forbids what needs the driver to allocate or to wait, and is broken by it:
kernels that are loaded, tensors that the host reads. A thread that says that it knows better may do both, as long as
it keeps to another stream.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flashtile.kernels.direct import driver
from flashtile.queues import capturing

_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


def possible_aside() -> bool:
    """Whether `aside` is at hand: it asks NVIDIA's driver."""
    return torch.version.hip is None


@contextmanager
def relaxed() -> Iterator[None]:
    """Kernels may be loaded inside, whether a graph is captured or not."""
    if not capturing() or not possible_aside():
        yield
        return
    exchange, mode = driver().cuThreadExchangeStreamCaptureMode, ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        # The driver has put the mode of before in its place.
        exchange(ctypes.byref(mode))


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is launched inside is no part of the graph, and done at the end; the host may read its results."""
    with relaxed():
        stream = _free_stream(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """One that is not captured: PyTorch deals its streams out in turn, that of the capture among them."""
    while True:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if not capturing():
                return stream
