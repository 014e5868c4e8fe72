"""Launches without Triton's launcher: parameters as the machine code wants them, looked at without a GPU."""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import hopper
from flashtile.backends.hopper import calls, launch
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
    monkeypatch.setattr(direct, "driver", _Driver)
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
        table = (ctypes.c_uint64 * 8)()
        start = ctypes.addressof(table)
        block = direct.Block(values, declared, compiled.metadata.tensordesc_meta or (), lambda tensor: 7, start)
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
                assert address == start + 7 * 8
            elif isinstance(value, float):
                assert ctypes.c_float.from_address(address).value == pytest.approx(value)
            else:
                kind = ctypes.c_int32 if parameter.size == 4 else ctypes.c_int64
                assert kind.from_address(address).value == value
        assert len([*cells]) <= 2
        assert [place for _, place in block.maps] == [7] * (len(encoded) - before)
        seen.append(kernel.fn.__name__)

    q, k, v = (torch.zeros(1, 256, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    inputs, rest = build(q, k, v, Arguments(**options))
    problem: Any = describe(inputs, rest, backward=backward)
    machine = calls.Machine(check, 4)
    for config in hopper.configs(problem):
        seen.clear()
        if backward:
            launch.backward(inputs, problem, config, torch.zeros_like(q), torch.zeros(1, 2, 256), q, None, machine)
            assert seen == ["before_kernel", "backward_kernel", "query_kernel" if config.queries else "after_kernel"]
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
            direct.Block(values, declared, (), lambda tensor: 0, 0)
    with pytest.raises(LookupError):
        direct.Block([tensor], words, (), lambda tensor: None, 0)
    assert encoded == []


class _Driver:
    """What a launch of so many parameters asks of the CUDA driver, noted. turned: its descriptors hold addresses with
    the halves of their first word exchanged."""

    def __init__(self, *results: int, parameters: int = 0, turned: bool = False) -> None:
        self.results, self.parameters, self.turned = [*results], parameters, turned
        self.contexts: list[int] = []
        self.launched: list[tuple[Any, ...]] = []
        self.replaced: list[tuple[int, int]] = []

    def cuLaunchKernelEx(self, config: int, function: int, array: int, extra: Any) -> int:
        """The structures of CUDA 12's cuda.h, read by hand."""
        sizes = [ctypes.c_uint32.from_address(config + 4 * place).value for place in range(7)]
        stream, attributes = (ctypes.c_uint64.from_address(config + offset).value for offset in (32, 40))
        early = ctypes.c_uint32.from_address(config + 48).value
        if early:
            kind, allowed = (ctypes.c_int32.from_address(attributes + offset).value for offset in (0, 8))
            assert (early, kind, allowed) == (1, 6, 1)
        pointers = (ctypes.c_void_p * self.parameters).from_address(array)
        values = [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]
        self.launched.append((function, sizes, stream, values, bool(early)))
        return self.results.pop(0) if self.results else 0

    def cuDeviceGet(self, _handle: Any, device: int) -> int:
        self.contexts.append(device)
        return 0

    def cuDevicePrimaryCtxRetain(self, _context: Any, _handle: Any) -> int:
        return 0

    def cuCtxSetCurrent(self, _context: Any) -> int:
        return 0

    def cuTensorMapReplaceAddress(self, tensor_map: int, address: int) -> int:
        self.replaced.append((tensor_map, address))
        halves = (address << 32 | address >> 32) % 2**64
        ctypes.c_uint64.from_address(tensor_map).value = halves if self.turned else address
        return 0


class _Compiled:
    """A compiled kernel, as far as launches look."""

    function = 4711

    class metadata:
        num_warps, shared, launch_pdl = 12, 1000, False
        num_ctas, global_scratch_size, profile_scratch_size, launch_cooperative_grid = 1, 0, 0, False
        tensordesc_meta: tuple[Any, ...] = ()

    class src:
        constants: ClassVar[dict[Any, Any]] = {}

    asm: ClassVar = {"ptx": f".entry k({', '.join(['.param .u64 a'] * 5)}) {{"}


class _Early(_Compiled):
    """One that may begin before the kernel before it has ended."""

    class metadata(_Compiled.metadata):
        launch_pdl = True


class _Describing(_Compiled):
    """One whose first argument is a descriptor."""

    class metadata(_Compiled.metadata):
        tensordesc_meta: tuple[Any, ...] = ({},)

    asm: ClassVar = {
        "ptx": ".entry k(.param .align 64 .b8 a[128], .param .u32 b, .param .u32 c, .param .u64 d, .param .u64 e) {"
    }


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> _Driver:
    made = _Driver()
    monkeypatch.setattr(direct, "driver", lambda: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return made


@pytest.mark.parametrize("compiled", [_Compiled, _Early])
def test_launches_write_addresses_alone(compiled: Any, driver: _Driver) -> None:
    """All of a series read the same table."""
    driver.parameters = 5
    a, b = torch.zeros(4), torch.zeros(4)
    places = {a.data_ptr(): 0, b.data_ptr(): 2}
    series = direct.Series(3)
    for arguments in ([b, a, 2**40], [a, a, 1]):
        assert series.add(compiled, (33, 1, 1), arguments, lambda tensor: places[tensor.data_ptr()])
    sizes, early = [33, 1, 1, 384, 1, 1, 1000], compiled is _Early
    for first, middle, last in ([16, 32, 48], [64, 80, 96]):
        series([first, middle, last], 7)
        assert driver.launched == [
            (4711, sizes, 7, [last, first, 2**40, 0, 0], early),
            (4711, sizes, 7, [first, first, 1, 0, 0], early),
        ]
        driver.launched.clear()


@pytest.mark.parametrize("turned", [False, True], ids=["known", "unknown"])
def test_descriptors_get_addresses(turned: bool, driver: _Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into their first word, where the driver writes them too; a driver that does otherwise is asked every time."""

    def encode(start: int, descriptor: TensorDescriptor, meta: Any) -> None:
        ctypes.memset(start, 0x77, direct.MAP)
        driver.cuTensorMapReplaceAddress(start, descriptor.base.data_ptr())

    driver.parameters, driver.turned = 1, turned
    monkeypatch.setattr(direct, "encode", encode)
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], gl.bfloat16)
    described = TensorDescriptor(torch.zeros(32, 64).bfloat16(), [32, 64], [64, 1], [16, 64], layout)
    series = direct.Series(2)
    assert series.add(_Describing, (1, 1, 1), [described], lambda tensor: 1)
    (start, _), *_ = driver.replaced
    written = ctypes.c_uint64.from_address(start)
    for address in (2**46 + 48, 16):
        driver.replaced.clear()
        series([0, address], 7)
        assert driver.replaced == ([(start, address)] if turned else [])
        halves = (address << 32 | address >> 32) % 2**64
        assert driver.launched[-1][3][0] == written.value == (halves if turned else address)
        assert ctypes.string_at(start + 8, direct.MAP - 8) == b"\x77" * (direct.MAP - 8)


def _series() -> direct.Series:
    series = direct.Series(1)
    assert series.add(_Compiled, (1, 1, 1), [1, 2, 3], lambda tensor: 0)
    return series


def test_an_error_of_the_driver_is_raised(driver: _Driver) -> None:
    driver.results = [719]
    with pytest.raises(RuntimeError, match="719"):
        _series()([16], 0)


def test_a_fresh_thread_gets_the_context(driver: _Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.results = [201]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    _series()([16], 0)
    assert driver.contexts == [3]
    assert len(driver.launched) == 2


def test_every_stream_gets_its_launches(driver: _Driver) -> None:
    series = _series()
    for stream in (0, 7, 7, 0, 9):
        series([16], stream)
    assert [launched[2] for launched in driver.launched] == [0, 7, 7, 0, 9]


def test_hooks_of_profilers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not direct.watched()
    monkeypatch.setattr(direct.knobs.runtime.launch_enter_hook, "calls", [print])
    assert direct.watched()
