"""CUDA graphs, captured beside what else this process has loaded."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is launched inside.

    Kernels may be built meanwhile, which takes seconds. In PyTorch's default mode the capture is then broken by any
    thread that the driver forbids something, and JAX, which other tests load, has such threads; and in every mode by
    older graphs that Python's collector frees meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            yield graph
    finally:
        gc.enable()
