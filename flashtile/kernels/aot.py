"""Kernels compiled ahead of time, on a machine without a GPU: from the arguments of a launch to a compiled kernel."""

from collections.abc import Iterator
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.kernels.storage import kept

Path = tuple[int, ...]

HOPPER = GPUTarget("cuda", 90, 32)


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What a launch with these arguments would compile, with the specialisation that a launch would choose.

    Tensors may lie on the meta device: only dtypes count, and pointers are taken to be aligned.
    """
    names = [parameter.name for parameter in kernel.params]
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, Any] = {}
    constants: dict[Path, Any] = {}
    attributes: dict[Path, list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = arguments[name]
        if name in constant:
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        if kernel.params[index].do_not_specialize:
            signature[name] = "i32"
            continue
        signature[name] = _type(value)
        for path, leaf in leaves(value, (index,)):
            if leaf is None or (type(leaf) is int and leaf == 1):
                constants[path] = leaf
            elif isinstance(leaf, Tensor) or (type(leaf) is int and leaf % 16 == 0):
                attributes[path] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return kind(kernel, signature, constants, attributes)


def _type(value: Any) -> Any:
    """The type of an argument in a signature: that of each field, for a tuple."""
    if isinstance(value, tuple):
        fields = [_type(field) for field in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    if value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, TensorDescriptor):
        shape = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_NAMES[str(value.base.dtype)]}[{shape}],{value.layout!r}>"
    if isinstance(value, Tensor):
        return "*" + _NAMES[str(value.dtype)]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


_NAMES = {
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
    "torch.float8_e4m3fn": "fp8e4nv",
    "torch.float8_e5m2": "fp8e5",
    "torch.float8_e4m3fnuz": "fp8e4b8",
    "torch.float8_e5m2fnuz": "fp8e5b16",
    "torch.uint8": "u8",
    "torch.int8": "i8",
    "torch.int16": "i16",
    "torch.bool": "i1",
    "torch.int32": "i32",
    "torch.int64": "i64",
}


def leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """What lies in nested tuples, each with its place."""
    if not isinstance(value, tuple):
        yield path, value
        return
    for index, field in enumerate(value):
        yield from leaves(field, (*path, index))


def build(kernel: Any, arguments: dict[str, Any], target: GPUTarget, **options: Any) -> Any:
    """The compiled kernel."""
    with kept():
        return triton.compile(source(kernel, arguments), target=target, options=options)
