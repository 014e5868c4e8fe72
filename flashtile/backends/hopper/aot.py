"""Kernels compiled ahead of time, on a machine without a GPU: from the arguments of a launch to a compiled kernel."""

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TARGET = GPUTarget("cuda", 90, 32)
_NAMES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.int32": "i32"}


def source(kernel: Any, arguments: Sequence[Any]) -> GluonASTSource:
    """What a launch with these arguments, all positional, would compile."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else _type(value)
        if parameter.is_constexpr:
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return GluonASTSource(kernel, signature, constants, attributes)


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        shape = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_NAMES[str(value.base.dtype)]}[{shape}],{value.layout!r}>"
    if isinstance(value, Tensor):
        return "*" + _NAMES[str(value.dtype)]
    return "fp32" if isinstance(value, float) else "i32"


def build(kernel: Any, arguments: Sequence[Any], **options: Any) -> Any:
    """The compiled kernel, for sm_90a."""
    return triton.compile(source(kernel, arguments), target=TARGET, options=options)
