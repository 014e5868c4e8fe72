"""A Hopper GPU for the Gluon kernels' launches: their PTX in `tools.ptx_emulation`, on CPU tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile import plan
from flashtile.backends import hopper
from flashtile.backends.hopper import calls
from flashtile.backends.hopper.calls import Machine
from flashtile.kernels import aot
from flashtile.kernels.tape import Grid, grid_of
from tools.ptx_emulation import TensorMap, emulate_kernel


class Emulated:
    """Runs every launch under one schedule; `complaints`: what the emulator found suspicious, over all launches.

    processors: persistent programs; fewer than there are tiles, so that some take several.
    """

    def __init__(self, schedule: dict[str, Any], processors: int = 2) -> None:
        self.schedule = schedule
        self.complaints: list[str] = []
        self.machine = Machine(self._launch, processors)

    def _launch(self, kernel: Any, programs: int | Grid, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        bound = {parameter.name: argument for parameter, argument in zip(kernel.params, arguments, strict=True)}
        compiled = aot.build(kernel, bound, aot.HOPPER, **options)
        constants = aot.source(kernel, bound).constants
        maps = iter(compiled.metadata.tensordesc_meta or ())
        values = [
            _map(leaf, next(maps)) if isinstance(leaf, TensorDescriptor) else plain(leaf)
            for index, value in enumerate(bound.values())
            for path, leaf in aot.leaves(value, (index,))
            if path not in constants
        ]
        report = emulate_kernel(compiled, grid_of(programs), values, **self.schedule)
        self.complaints += report.warnings


@contextmanager
def emulated(schedule: dict[str, Any], processors: int = 2) -> Iterator[Emulated]:
    """The backend "hopper" takes CPU tensors and runs under one schedule."""
    there = Emulated(schedule, processors)
    plan.choose.cache_clear()
    with (
        patch.object(hopper, "unavailable", lambda: None),
        patch.object(hopper, "DEVICE", "cpu"),
        patch.object(calls, "DEVICE", there.machine),
    ):
        yield there
    plan.choose.cache_clear()


def _map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    return TensorMap.from_meta(_memory(descriptor.base), meta, shape=descriptor.shape, strides=descriptor.strides)


def plain(value: Any) -> Any:
    """An argument as the emulator takes it."""
    return _memory(value) if isinstance(value, Tensor) else value


def _memory(tensor: Tensor) -> np.ndarray:
    """All that lies behind the first element of a tensor, shared with it; bfloat16 and 8-bit floats as their bits."""
    behind = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    flat = tensor.as_strided((behind,), (1,))
    if flat.dtype.is_floating_point and flat.dtype.itemsize == 1:
        return flat.view(torch.uint8).numpy()
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype is torch.bfloat16 else flat.numpy()
