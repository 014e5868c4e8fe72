"""Launches of compiled kernels through the CUDA driver: what Triton's launcher would pass, in memory that stays.

Between two launches of a tape only addresses differ. Triton's launcher looks at every argument again and makes every
descriptor anew, tens of microseconds of Python; here the parameters lie ready, and addresses are written over: those of
all launches into one table, which the parameters of each point into, and into the descriptors.
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from struct import Struct
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

Place = Callable[[Tensor], int | None]
"""Where a tensor stands among those that a tape is played for."""

MAP = 128
"""Bytes of a descriptor (CUtensorMap), which must begin at a multiple of 64."""


class Parameter(NamedTuple):
    """One of a kernel, as its PTX declares it: "b64", "f32", ... and how many bytes."""

    kind: str
    size: int


def parameters(ptx: str) -> list[Parameter]:
    """Those of the kernel in a text of PTX."""
    head = ptx[ptx.index(".entry") :]
    found = re.findall(_DECLARATION, head[: head.index("{")])
    return [Parameter(kind, int(count or 1) * int(kind.lstrip("bufs")) // 8) for kind, count in found]


_DECLARATION = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s[^,)]*?\w+(?:\[(\d+)\])?\s*[,)]"
"""Space, perhaps an alignment, a type, perhaps what a pointer points to, a name, perhaps a number of elements."""


def flattened(value: Any, path: tuple[int, ...], constants: Any) -> Iterator[Any]:
    """What is passed of an argument: of nested tuples the fields that the compiler does not know."""
    if isinstance(value, tuple):
        for index, field in enumerate(value):
            yield from flattened(field, (*path, index), constants)
    elif path not in constants:
        yield value


class Block:
    """The memory that the parameters of a launch lie in; `maps`: its descriptors, and whose address each one holds."""

    def __init__(
        self, values: Sequence[Any], declared: Sequence[Parameter], metas: Sequence[Any], place: Place, table: int
    ) -> None:
        """metas: what Triton knows of each descriptor's tiles; table: where the addresses of tensors lie, by place.

        Raises:
            LookupError: something is not as it should be; such a launch is left to Triton.
        """
        self.maps: list[tuple[Map, int]] = []
        self._kept: list[Any] = []
        self._metas = iter(metas)
        self._addresses: list[int] = []
        self._declared = iter(declared)
        self._place, self._table = place, table
        for value in values:
            self._add(value)
        # What Triton passes at the end, for kernels that need memory beside their arguments; these do not.
        rest = [*self._declared]
        if len(rest) > 2 or next(self._metas, None) is not None:
            raise LookupError("fewer arguments than parameters")
        for parameter in rest:
            self._number(ctypes.c_uint64(0), parameter)
        self.array = (ctypes.c_void_p * len(self._addresses))(*self._addresses)

    def _add(self, value: Any) -> None:
        if isinstance(value, TensorDescriptor):
            self.maps.append((self._map(value), self._found(value.base)))
            for size in value.shape:
                self._number(ctypes.c_int32(size), next(self._declared))
            for stride in value.strides:
                self._number(ctypes.c_int64(stride), next(self._declared))
            return
        parameter = next(self._declared, None)
        if parameter is None:
            raise LookupError("more arguments than parameters")
        if isinstance(value, Tensor):
            _fits(_ADDRESS, parameter)
            self._addresses.append(self._table + _ADDRESS * self._found(value))
        elif isinstance(value, float):
            self._number(ctypes.c_float(value), parameter)
        elif type(value) is int:
            self._number((ctypes.c_int32 if parameter.size == 4 else ctypes.c_int64)(value), parameter)
        else:
            raise LookupError(type(value).__name__)

    def _found(self, tensor: Tensor) -> int:
        found = self._place(tensor)
        if found is None:
            raise LookupError("a tensor of this launch alone")
        return found

    def _number(self, cell: Any, parameter: Parameter) -> None:
        _fits(ctypes.sizeof(cell), parameter)
        self._kept.append(cell)
        self._addresses.append(ctypes.addressof(cell))

    def _map(self, descriptor: TensorDescriptor) -> "Map":
        meta, parameter = next(self._metas, None), next(self._declared, None)
        if meta is None or parameter is None:
            raise LookupError("descriptors")
        _fits(MAP, parameter)
        made = Map(descriptor, meta)
        self._addresses.append(made.start)
        return made


_ADDRESS = 8


def _fits(size: int, parameter: Parameter) -> None:
    if size != parameter.size:
        raise LookupError(parameter.kind)


class Map:
    """The memory of a descriptor, made for one tensor. `word`: where its address lies; None: the driver knows alone."""

    def __init__(self, descriptor: TensorDescriptor, meta: Any) -> None:
        self._memory = ctypes.create_string_buffer(MAP + 64)
        self.start = -(-ctypes.addressof(self._memory) // 64) * 64
        encode(self.start, descriptor, meta)
        self.word = self._word(descriptor.base.data_ptr())

    def _word(self, address: int) -> Any:
        """The first word, if it is that which the driver itself writes another address into, and it alone: nobody
        promises what a descriptor looks like inside."""
        before = ctypes.string_at(self.start, MAP)
        for other in (address ^ _OTHER, address):
            self.replace(other)
            if ctypes.string_at(self.start, MAP) != other.to_bytes(_ADDRESS, "little") + before[_ADDRESS:]:
                self.replace(address)
                return None
        return ctypes.c_uint64.from_address(self.start)

    def replace(self, address: int) -> None:
        driver().cuTensorMapReplaceAddress(self.start, address)


_OTHER = 2**47 - 16
"""Bits in which addresses that are multiples of 16 may differ."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which, and its value in the first bytes of a union."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),  # grid, block, bytes of shared memory
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_EARLY = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: programs may begin before the kernel before has ended, and
wait for it where they say so."""


@cache
def driver() -> Any:
    """NVIDIA's, as ctypes calls it."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


def encode(address: int, descriptor: TensorDescriptor, meta: dict[str, Any]) -> None:
    """Writes a CUtensorMap, as Triton would."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if meta["fp4_padded"] or descriptor.padding != "zero":
        raise LookupError("padding")
    rank, element = len(descriptor.shape), meta["elem_size"]
    sizes = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))
    strides = (ctypes.c_uint64 * rank)(*(element * stride for stride in reversed(descriptor.strides[:-1])))
    box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
    steps = (ctypes.c_uint32 * rank)(*(1,) * rank)
    kind, swizzle = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["swizzle"]
    base = ctypes.c_void_p(descriptor.base.data_ptr())
    interleave, promotion, fill = 0, 2, 0  # none, 128 bytes into the L2 cache, zeros
    _checked(
        driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(address),
            *(kind, ctypes.c_uint32(rank), base, sizes, strides, box, steps, interleave, swizzle, promotion, fill),
        )
    )


_NO_CONTEXT = 201


def _bind(device: int) -> None:
    """Makes the device's context that of this thread, which has not asked CUDA for anything yet."""
    cuda, handle, context = driver(), ctypes.c_int(), ctypes.c_void_p()
    _checked(cuda.cuDeviceGet(ctypes.byref(handle), device))
    _checked(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    _checked(cuda.cuCtxSetCurrent(context))


def _checked(result: int) -> None:
    if result != 0:
        raise RuntimeError(f"the CUDA driver returned error {result}; an earlier kernel may have failed")


class Direct:
    """One launch, whose parameters lie ready; `passed`: to cuLaunchKernelEx, for `stream`."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], block: Block) -> None:
        # Kernels are unloaded with their object.
        self._kernel, self._block = kernel, block
        meta = kernel.metadata
        sizes = (ctypes.c_uint * 7)(*grid, 32 * meta.num_warps, 1, 1, meta.shared)
        early = ctypes.pointer(_Attribute(_EARLY, b"", 1))
        self._config = _Config(sizes, None, early, int(meta.launch_pdl))
        self.passed = (ctypes.addressof(self._config), kernel.function, ctypes.addressof(block.array), None)

    def aim(self, stream: int) -> None:
        """What is launched goes there from now on."""
        self._config.stream = stream


class Series:
    """Launches one after the other, ready for other addresses; `tensors`: how many have places among them."""

    def __init__(self, tensors: int) -> None:
        self._lock = Lock()
        self._launches: list[Direct] = []
        self._words: list[tuple[Any, int]] = []
        self._other_maps: list[tuple[Map, int]] = []
        self._stream = 0
        self._table = (ctypes.c_uint64 * tensors)()
        self._write = Struct(f"{tensors}Q").pack_into

    def add(self, kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], place: Place) -> bool:
        """One more launch of a compiled kernel, last; False: Triton must do it. So it is elsewhere than on NVIDIA's,
        where somebody watches launches, and where the kernel asks for more than arguments."""
        if torch.version.hip or not torch.cuda.is_available() or not hasattr(kernel, "asm"):
            return False
        meta = kernel.metadata
        alone = meta.num_ctas == 1 and not (meta.global_scratch_size or meta.profile_scratch_size)
        if not alone or meta.launch_cooperative_grid or watched():
            return False
        constants = kernel.src.constants
        values = [leaf for i, argument in enumerate(arguments) for leaf in flattened(argument, (i,), constants)]
        declared, table = parameters(kernel.asm["ptx"]), ctypes.addressof(self._table)
        try:
            block = Block(values, declared, meta.tensordesc_meta or (), place, table)
        except LookupError:
            return False
        for made, at in block.maps:
            if made.word is None:
                self._other_maps.append((made, at))
            else:
                self._words.append((made.word, at))
        self._launches.append(Direct(kernel, grid, block))
        return True

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launches all on the current device; addresses: of the tensors, by place."""
        launch = driver().cuLaunchKernelEx
        with self._lock:
            self._write(self._table, 0, *addresses)
            for word, place in self._words:
                word.value = addresses[place]
            for other, place in self._other_maps:
                other.replace(addresses[place])
            if stream != self._stream:
                self._aim(stream)
            for each in self._launches:
                result = launch(*each.passed)
                if result == _NO_CONTEXT:
                    _bind(torch.cuda.current_device())
                    result = launch(*each.passed)
                if result:
                    _checked(result)

    def _aim(self, stream: int) -> None:
        for each in self._launches:
            each.aim(stream)
        self._stream = stream


def watched() -> bool:
    """Whether somebody (a profiler) has asked Triton to be called at every launch."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))
