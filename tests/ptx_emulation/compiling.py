"""Kernels compiled ahead of time, and the names that move between releases of Triton."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.8 renamed these, and added the adding store.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def _add(descriptor: Any, corner: Any, source: Any, _semantic: Any = None) -> None:
    from triton._C.libtriton import ir

    corner = _semantic._convert_to_ir_values(corner, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, corner, source.handle)


tma_add = getattr(tma, "async_atomic_add", None) or _add

_GLUON_TYPES = {
    "bf16": gl.bfloat16,
    "fp16": gl.float16,
    "fp32": gl.float32,
    "fp8e4nv": gl.float8e4nv,
    "fp8e5": gl.float8e5,
}


def descriptor(dtype: str, *block: int) -> str:
    """The type of a tensor descriptor."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), _GLUON_TYPES[dtype])
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{layout!r}>"


def compiled(kernel: Any, types: dict[str, str], arch: int = 90, aligned: bool = False, **given: Any) -> Any:
    """A compiled kernel; `given`: its constants by name, and options in lower case. Aligned: all but constants are."""
    options = {name: given.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in given}
    signature = {**types, **dict.fromkeys(given, "constexpr")}
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    constants = {(places[name],): value for name, value in given.items()}
    attributes = {(places[name],): [["tt.divisibility", 16]] for name in types} if aligned else {}
    source = GluonASTSource if hasattr(kernel, "is_gluon") and kernel.is_gluon() else ASTSource
    ordered = {name: signature[name] for name in kernel.arg_names}
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source(kernel, ordered, constants, attributes), target=target, options=options)
