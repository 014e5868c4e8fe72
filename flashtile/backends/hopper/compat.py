"""Every name that moves between the releases of Triton, 3.6 to 3.9: the kernels import them from here alone."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.8 renamed the copies, and added the adding store; 3.9 dropped the older names.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def _reduce_add(descriptor: Any, coordinates: Any, source: Any, _semantic: Any = None) -> None:
    from triton._C.libtriton import ir

    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )


tma_add = getattr(tma, "async_atomic_add", None) or _reduce_add
tma_store_wait = tma.store_wait

# Of the warps of one role. Triton 3.7 renamed it.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def view_as(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory with another shape and layout. Triton 3.9 made the method public."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


__all__ = ["gl", "mbarrier", "thread_barrier", "tma_add", "tma_load", "tma_store", "tma_store_wait", "view_as"]
