"""A Hopper GPU for the Gluon kernels' launches: their PTX in `tools.ptx_emulation`, on CPU tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper import aot
from flashtile.backends.hopper.launch import Machine
from tools.ptx_emulation import TensorMap, emulate_kernel


class Emulated:
    """Runs every launch under one schedule; `complaints`: what the emulator found suspicious, over all launches.

    processors: persistent programs; fewer than there are tiles, so that some take several.
    """

    def __init__(self, schedule: dict[str, Any], processors: int = 2) -> None:
        self.schedule = schedule
        self.complaints: list[str] = []
        self.machine = Machine(self._launch, processors)

    def _launch(self, kernel: Any, programs: int, given: Sequence[Any], options: dict[str, Any]) -> None:
        compiled = aot.build(kernel, given, **options)
        maps = iter(compiled.metadata.tensordesc_meta)
        constant = [parameter.is_constexpr for parameter in kernel.params]
        values = [value for value, is_constant in zip(given, constant, strict=True) if not is_constant]
        bound = [_map(value, next(maps)) if isinstance(value, TensorDescriptor) else _plain(value) for value in values]
        report = emulate_kernel(compiled, (programs, 1, 1), bound, **self.schedule)
        self.complaints += report.warnings


def _map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    return TensorMap.from_meta(_memory(descriptor.base), meta, shape=descriptor.shape, strides=descriptor.strides)


def _plain(value: Any) -> Any:
    return _memory(value) if isinstance(value, Tensor) else value


def _memory(tensor: Tensor) -> np.ndarray:
    """All that lies behind the first element of a tensor, shared with it; bfloat16 as its bits."""
    behind = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    flat = tensor.as_strided((behind,), (1,))
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype is torch.bfloat16 else flat.numpy()
