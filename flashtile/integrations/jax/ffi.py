"""Foreign functions of XLA in Python: functions of PyTorch tensors that XLA calls on its own buffers and stream.

XLA's C interface (`xla/ffi/api/c_api.h`, which jaxlib ships) hands a handler one call frame: where the operands and
results lie, their shapes, the attributes, and on a GPU the stream. The structures below are the part of it that is
read here. Each has its size in front, and XLA promises that fields stay where they are, so ctypes is enough and nothing
needs a compiler. Operands and results are wrapped where they lie: no byte is copied, no array passes through the host.
"""

import ctypes
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import Tensor

Handler = Callable[[list[Tensor], list[Tensor], dict[str, Any]], None]
"""(operands, results to write to, what the attribute "told" said)."""

_METADATA = 1
"""The extension by which XLA asks for a handler's version, when it is registered."""

_INTERNAL = 13
"""XLA's code of an error that is none of its others."""

DTYPES = {
    1: torch.bool,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.uint8,
    10: torch.float16,
    11: torch.float32,
    12: torch.float64,
    16: torch.bfloat16,
}
"""XLA's numbers of data types (`XLA_FFI_DataType`)."""

_kept: list[Any] = []
"""Handlers are called for as long as the process lives."""


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("error_create", ctypes.c_void_p),
        ("error_get", ctypes.c_void_p),
        ("error_destroy", ctypes.c_void_p),
        ("handler_register", ctypes.c_void_p),
        ("stream_get", ctypes.c_void_p),
        ("between", ctypes.c_void_p * 12),
        ("device_ordinal_get", ctypes.c_void_p),
    )


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("entries", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _Span(ctypes.Structure):
    _fields_ = (("text", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("entries", ctypes.POINTER(ctypes.POINTER(_Span))),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


class _Error(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _Asked(ctypes.Structure):
    """A question about the call: the answer is a pointer or a number of 32 bits."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("answer", ctypes.c_void_p),
    )


_Entry = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
_Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def register(name: str, handler: Handler) -> None:
    """Makes `handler` the target of `jax.ffi.ffi_call(name, ...)` on the CPU and on NVIDIA's GPUs.

    A call has one attribute, `told`, JSON text. What the handler raises becomes the error of the XLA execution.
    """
    for platform, run in (("cpu", _on_host), ("CUDA", _on_gpu)):
        entry = _entry(handler, run)
        _kept.append(entry)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(entry), platform=platform)


def _entry(handler: Handler, run: Callable[[_Frame, Handler], None]) -> Any:
    def called(address: Any) -> int | None:
        frame = address.contents
        try:
            if frame.extension_start and frame.extension_start.contents.type == _METADATA:
                _tell_version(frame)
            else:
                with torch.no_grad():
                    run(frame, handler)
        except BaseException as error:  # nothing above catches what leaves a C callback
            return _failed(frame, f"{type(error).__name__}: {error}")
        return None

    return _Entry(called)


def _tell_version(frame: _Frame) -> None:
    """The version of the interface that XLA itself has: what is read of it here is the same in 0.3 and 0.4."""
    extension = ctypes.cast(frame.extension_start, ctypes.POINTER(_MetadataExtension)).contents
    metadata = extension.metadata.contents
    metadata.version.major = frame.api.contents.version.major
    metadata.version.minor = frame.api.contents.version.minor
    metadata.traits = 0


def _failed(frame: _Frame, message: str) -> int | None:
    made = _Error(ctypes.sizeof(_Error), None, message.encode(), _INTERNAL)
    found: int | None = _Function(frame.api.contents.error_create)(ctypes.addressof(made))
    return found


def _on_host(frame: _Frame, handler: Handler) -> None:
    operands, results = _tensors(frame, _host)
    handler(operands, results, _told(frame))


def _on_gpu(frame: _Frame, handler: Handler) -> None:
    """PyTorch's work goes to XLA's stream, behind what wrote the operands and before what reads the results."""
    api = frame.api.contents
    stream = _answer(frame, api.stream_get)
    device = torch.device("cuda", _answer(frame, api.device_ordinal_get) & 0xFFFFFFFF)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device)):
        operands, results = _tensors(frame, lambda buffer: _on_device(buffer, device))
        handler(operands, results, _told(frame))


def _answer(frame: _Frame, function: int) -> int:
    asked = _Asked(ctypes.sizeof(_Asked), None, frame.context, None)
    if _Function(function)(ctypes.addressof(asked)):
        raise RuntimeError("XLA knows no stream or device of the call")
    return asked.answer or 0


def _told(frame: _Frame) -> dict[str, Any]:
    span = frame.attributes.entries[0].contents
    told: dict[str, Any] = json.loads(ctypes.string_at(span.text, span.size))
    return told


def _tensors(frame: _Frame, wrap: Callable[[_Buffer], Tensor]) -> list[list[Tensor]]:
    """The operands and the results."""
    return [
        [wrap(buffers.entries[index].contents) for index in range(buffers.size)]
        for buffers in (frame.operands, frame.results)
    ]


def _shape(buffer: _Buffer) -> tuple[int, ...]:
    return tuple(buffer.dims[: buffer.rank])


def _host(buffer: _Buffer) -> Tensor:
    """The buffer as a tensor in the host's memory."""
    dtype, shape = DTYPES[buffer.dtype], _shape(buffer)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    there = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(buffer.data)
    return torch.frombuffer(there, dtype=dtype).reshape(shape)


class _Address:
    """A place on a GPU in the words that PyTorch takes; they know no bfloat16, so numbers pass as plain bits."""

    def __init__(self, address: int, shape: tuple[int, ...], size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": f"{'|' if size == 1 else '<'}i{size}",
            "data": (address, False),
            "version": 3,
        }


def _on_device(buffer: _Buffer, device: torch.device) -> Tensor:
    """The buffer as a tensor on the GPU that it lies on."""
    dtype, shape = DTYPES[buffer.dtype], _shape(buffer)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    bits: Tensor = torch.as_tensor(_Address(buffer.data, shape, dtype.itemsize), device=device)
    return bits.view(dtype)
