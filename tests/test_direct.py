"""Launches without Triton's launcher: parameters as the machine code wants them, looked at without a GPU."""

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import hopper
from flashtile.backends.hopper import launch
from flashtile.kernels import aot, direct
from flashtile.problem import describe
from flashtile.request import Arguments, build


def test_declarations_of_all_forms() -> None:
    ptx = """
    .visible .entry kernel(
        .param .u64 .ptr .global .align 16 kernel_param_0,
        .param .align 64 .b8 kernel_param_1[128],
        .param .u32 kernel_param_2,
        .param .f32 kernel_param_3,
        .param .b64 kernel_param_4
    )
    .reqntid 128 {
        .reg .b32 %r<4>;
    """
    assert direct.parameters(ptx) == [("u64", 8), ("b8", 128), ("u32", 4), ("f32", 4), ("b64", 8)]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """(where, of what) descriptors were written; there is no driver here that could."""
    found: list[tuple[int, Tensor]] = []
    monkeypatch.setattr(direct, "encode", lambda address, descriptor, meta: found.append((address, descriptor.base)))
    return found


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 5.0, "sinks": torch.ones(2)}], ids=str)
def test_every_parameter_gets_its_argument(
    options: dict[str, Any], backward: bool, encoded: list[tuple[int, Tensor]]
) -> None:
    """Bytes of each, in order: numbers as they were given, addresses and descriptors where the tape will look."""
    seen: list[str] = []

    def check(kernel: Any, programs: int, arguments: Sequence[Any], given: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        compiled = aot.build(kernel, dict(zip(names, arguments, strict=True)), aot.HOPPER, **given)
        constants = compiled.src.constants
        values = [leaf for i, each in enumerate(arguments) for leaf in direct.flattened(each, (i,), constants)]
        declared = direct.parameters(compiled.asm["ptx"])
        before = len(encoded)
        block = direct.Block(values, declared, compiled.metadata.tensordesc_meta or (), lambda tensor: 7)
        assert len(block.array) == len(declared)
        cells = iter(zip(block.array, declared, strict=True))
        maps = iter(encoded[before:])
        for value in values:
            address, parameter = next(cells)
            if isinstance(value, TensorDescriptor):
                assert (address, value.base) == next(maps)
                assert address % 64 == 0
                sizes = [ctypes.c_int32.from_address(next(cells)[0]).value for _ in value.shape]
                strides = [ctypes.c_int64.from_address(next(cells)[0]).value for _ in value.strides]
                assert (sizes, strides) == ([*value.shape], [*value.strides])
            elif isinstance(value, Tensor):
                assert ctypes.c_uint64.from_address(address).value == value.data_ptr()
            elif isinstance(value, float):
                assert ctypes.c_float.from_address(address).value == pytest.approx(value)
            else:
                kind = ctypes.c_int32 if parameter.size == 4 else ctypes.c_int64
                assert kind.from_address(address).value == value
        assert len([*cells]) <= 2
        assert {place for _, place in (*block.pointers, *block.maps)} == {7}
        seen.append(kernel.fn.__name__)

    q, k, v = (torch.zeros(1, 256, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    inputs, rest = build(q, k, v, Arguments(**options))
    problem: Any = describe(inputs, rest, backward=backward)
    machine = launch.Machine(check, 4)
    config: Any = hopper.configure(problem)
    if backward:
        launch.backward(inputs, problem, config, torch.zeros_like(q), torch.zeros(1, 2, 256), q, None, machine)
        assert seen == ["before_kernel", "backward_kernel", "after_kernel"]
    else:
        launch.forward(inputs, problem, config, machine)
        assert seen == ["forward_kernel"]


def test_what_is_not_understood_is_left_to_triton(encoded: list[tuple[int, Tensor]]) -> None:
    words = [direct.Parameter("u64", 8)] * 2
    tensor = torch.zeros(4)
    for values, declared in (
        ([tensor, 3, 4], words),
        ([tensor], [*words, *words]),
        ([tensor, 0.5], words),
        ([tensor, "text"], words),
    ):
        with pytest.raises(LookupError):
            direct.Block(values, declared, (), lambda tensor: 0)
    with pytest.raises(LookupError):
        direct.Block([tensor], words, (), lambda tensor: None)
    assert encoded == []


class _Driver:
    """What a launch asks of the CUDA driver, noted."""

    def __init__(self, *results: int) -> None:
        self.results = [*results]
        self.contexts: list[int] = []
        self.launched: list[tuple[Any, ...]] = []
        self.replaced: list[tuple[int, int]] = []

    def cuLaunchKernel(self, function: int, *rest: Any) -> int:
        *sizes, stream, array, _extra = rest
        addresses = [ctypes.c_uint64.from_address(address).value for address in array]
        self.launched.append((function, sizes, stream, addresses))
        return self.results.pop(0) if self.results else 0

    def cuLaunchKernelEx(self, reference: Any, function: int, array: Any, extra: Any) -> int:
        """The structures of CUDA 12's cuda.h, read by hand."""
        start = ctypes.addressof(reference._obj)
        sizes = [ctypes.c_uint32.from_address(start + 4 * place).value for place in range(7)]
        stream, attributes = (ctypes.c_uint64.from_address(start + offset).value for offset in (32, 40))
        assert ctypes.c_uint32.from_address(start + 48).value == 1
        kind, allowed = (ctypes.c_int32.from_address(attributes + offset).value for offset in (0, 8))
        assert (kind, allowed) == (6, 1)
        return self.cuLaunchKernel(function, *sizes, stream, array, extra)

    def cuDeviceGet(self, _handle: Any, device: int) -> int:
        self.contexts.append(device)
        return 0

    def cuDevicePrimaryCtxRetain(self, _context: Any, _handle: Any) -> int:
        return 0

    def cuCtxSetCurrent(self, _context: Any) -> int:
        return 0

    def cuTensorMapReplaceAddress(self, tensor_map: int, address: int) -> int:
        self.replaced.append((tensor_map, address))
        return 0


class _Compiled:
    """A compiled kernel, as far as launches look."""

    function = 4711

    class metadata:
        num_warps, shared, launch_pdl = 12, 1000, False


class _Early(_Compiled):
    """One that may begin before the kernel before it has ended."""

    class metadata(_Compiled.metadata):
        launch_pdl = True


@pytest.mark.parametrize("compiled", [_Compiled, _Early])
def test_a_launch_writes_addresses_alone(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver()
    monkeypatch.setattr(direct, "driver", lambda: driver)
    a, b = torch.zeros(4), torch.zeros(4)
    places = {a.data_ptr(): 0, b.data_ptr(): 2}
    declared = [direct.Parameter("u64", 8)] * 5
    block = direct.Block([b, a, 2**40], declared, (), lambda tensor: places[tensor.data_ptr()])
    launched = direct.Direct(compiled, 33, block)
    for addresses in ([16, 32, 48], [64, 80, 96]):
        launched(addresses, 7)
    sizes = [33, 1, 1, 384, 1, 1, 1000]
    assert driver.launched == [(4711, sizes, 7, [48, 16, 2**40, 0, 0]), (4711, sizes, 7, [96, 64, 2**40, 0, 0])]


def test_an_error_of_the_driver_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "driver", lambda: _Driver(719))
    block = direct.Block([], [], (), lambda tensor: 0)
    with pytest.raises(RuntimeError, match="719"):
        direct.Direct(_Compiled, 1, block)([], 0)


def test_a_fresh_thread_gets_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver(201)
    monkeypatch.setattr(direct, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    direct.Direct(_Compiled, 1, direct.Block([], [], (), lambda tensor: 0))([], 0)
    assert driver.contexts == [3]
    assert len(driver.launched) == 2


def test_hooks_of_profilers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not direct.watched()
    monkeypatch.setattr(direct.knobs.runtime.launch_enter_hook, "calls", [print])
    assert direct.watched()
