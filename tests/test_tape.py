"""Tapes: launches written down once and played for other tensors, with a kernel that only notes what it gets."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import hopper
from flashtile.backends.hopper import calls, launch
from flashtile.kernels.tape import Tape, perform
from flashtile.kernels.words import Rows, Stats
from flashtile.problem import Inputs, Options, describe
from tests.lengths import of_long_sequences


class Noting:
    """Stands for a compiled kernel: `kernel[grid](*arguments)`."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, int, int], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.seen.append((grid, arguments))


def _launches(kernel: Noting, a: Tensor, b: Tensor, more: Any = None) -> Callable[[Tape | None], None]:
    arguments = (Rows(a, 1, 2, 3), Stats(b, 4, 5), (7, (8, b, None), more), 0.5)

    def launch(tape: Tape | None) -> None:
        kernel[3, 1, 1](*arguments)
        if tape is not None:
            tape.record(kernel, 3, arguments)

    return launch


def test_played_for_other_tensors() -> None:
    kernel, memory = Noting(), dict[Any, Any]()
    for _ in range(3):
        a, b = torch.empty(4), torch.empty(6)
        perform(_launches(kernel, a, b), (a, b, None), memory)
        grid, (rows, stats, (seven, nested, _), half) = kernel.seen[-1]
        assert (grid, seven, half) == ((3, 1, 1), 7, 0.5)
        assert isinstance(rows, Rows)
        assert rows.pointer is a
        assert rows[1:] == (1, 2, 3)
        assert isinstance(stats, Stats)
        assert stats.pointer is b
        assert stats[1:] == (4, 5)
        assert nested[0] == 8
        assert nested[1] is b
        assert nested[2] is None
    assert len(memory) == 1


@pytest.mark.parametrize(
    "other",
    [torch.empty(8)[::2], torch.empty(4, dtype=torch.float64), torch.empty(5)[1:]],
    ids=["stride", "dtype", "alignment"],
)
def test_another_kind_of_tensor_has_another_tape(other: Tensor) -> None:
    kernel, memory = Noting(), dict[Any, Any]()
    for a in (torch.empty(4), other):
        b = torch.empty(6)
        perform(_launches(kernel, a, b), (a, b), memory, free=1)
    assert len(memory) == 2


def test_a_missing_tensor_is_no_other_one() -> None:
    kernel, memory = Noting(), dict[Any, Any]()
    a, b = torch.empty(4), torch.empty(6)
    for tensors in ((a, b, None), (a, b, b), (a, b), (a, None, None)):
        perform(_launches(kernel, a, b), tensors, memory)
    assert len(memory) == 4


def test_tensors_that_are_one_are_told_from_two() -> None:
    kernel, memory = Noting(), dict[Any, Any]()
    one = torch.empty(4)
    for a, b in ((one, one), (torch.empty(4), torch.empty(4)), (one, torch.empty(4))):
        perform(_launches(kernel, a, b), (a, b), memory)
        arguments = kernel.seen[-1][1]
        assert arguments[0].pointer is a
        assert arguments[1].pointer is b
    assert len(memory) == 2


def test_what_was_written_for_tensors_apart_is_played_for_one() -> None:
    """Not the other way round: nobody could tell then which of two a launch should get."""
    kernel, memory, one = Noting(), dict[Any, Any](), torch.empty(4)
    taped: list[bool] = []

    def perform_over(a: Tensor, b: Tensor) -> None:
        launches = _launches(kernel, a, b)
        perform(lambda tape: (taped.append(tape is not None), launches(tape))[1], (a, b), memory)  # type: ignore[func-returns-value]
        assert kernel.seen[-1][1][0].pointer is a
        assert kernel.seen[-1][1][1].pointer is b

    for _ in range(3):
        perform_over(torch.empty(4), torch.empty(4))
    assert taped == [False, True]
    perform_over(one, one)
    assert taped == [False, True]
    memory.clear()
    for _ in range(3):
        perform_over(one, one)
    perform_over(torch.empty(4), one)
    assert taped == [False, True] * 2 + [False]


def test_tensors_are_not_kept_alive() -> None:
    a, b = torch.empty(4), torch.empty(6)
    alive = [weakref.ref(a), weakref.ref(b)]
    memory = dict[Any, Any]()
    kernel = Noting()
    for _ in range(3):
        perform(_launches(kernel, a, b), (a, b), memory)
    kernel.seen.clear()
    del a, b
    assert len(memory) == 1
    assert [ref() for ref in alive] == [None, None]


def test_nor_what_descriptors_describe() -> None:
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], gl.bfloat16)
    tensor = torch.empty(32, 64, dtype=torch.bfloat16)
    alive, memory, kernel = weakref.ref(tensor), dict[Any, Any](), Noting()
    described = TensorDescriptor(tensor, [32, 64], [64, 1], [16, 64], layout)
    for _ in range(3):
        perform(_launches(kernel, tensor, tensor, described), (tensor, tensor), memory)
    assert isinstance(kernel.seen[-1][1][2][2], TensorDescriptor)
    kernel.seen.clear()
    del tensor, described
    assert len(memory) == 1
    assert alive() is None


def test_what_reads_another_tensor_is_never_played() -> None:
    """A copy that a launch made for itself is gone the next time."""
    kernel, memory = Noting(), dict[Any, Any]()
    for _ in range(3):
        a, b, copy = torch.empty(4), torch.empty(6), torch.empty(2)
        perform(_launches(kernel, a, b, (copy, 1)), (a, b), memory)
        assert kernel.seen[-1][1][2][2][0] is copy
    kernel.seen.clear()
    kept = weakref.ref(copy)
    del copy
    assert kept() is None


def test_descriptors_are_made_anew() -> None:
    """Of the same tiles, over the tensor of this time; the view that they were made of may differ from it."""
    kernel, memory = Noting(), dict[Any, Any]()
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], gl.bfloat16)

    def launches(tensor: Tensor) -> Callable[[Tape | None], None]:
        described = TensorDescriptor(tensor[0], [32, 64], [64, 1], [16, 64], layout)

        def launch(tape: Tape | None) -> None:
            kernel[1, 1, 1](described)
            if tape is not None:
                tape.record(kernel, 1, (described,))

        return launch

    for _ in range(3):
        tensor = torch.empty(1, 32, 64, dtype=torch.bfloat16)
        perform(launches(tensor), (tensor,), memory)
        (found,) = kernel.seen[-1][1]
        assert isinstance(found, TensorDescriptor)
        assert found.base.data_ptr() == tensor.data_ptr()
        assert (found.shape, found.strides, found.block_shape) == ([32, 64], [64, 1], [16, 64])
        assert found.layout == layout
    assert len(memory) == 1


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    """As hooks on saved tensors give them: a tape of transposed queries is not played for contiguous ones."""
    kernel, asked = Noting(), list[str]()

    def note(function: Any, programs: int, arguments: Any, options: dict[str, Any]) -> Noting:
        asked.append(function.fn.__name__)
        return kernel

    q = torch.randn(1, 2, 64, 64).bfloat16().transpose(1, 2)
    k, out, lse = q.contiguous(), q.contiguous(), torch.zeros(1, 2, 64)
    back: Any = describe(Inputs(q, k, k), Options(scale=0.1, out_dtype=torch.bfloat16), backward=True)
    machine, memory, config = calls.Machine(note, 132), dict[Any, Any](), hopper.configure(back)
    for saved, launched in ((q, 3), (q, 3), (q, 0), (q.contiguous(), 3), (q, 0)):
        asked.clear()
        inputs = Inputs(saved, k.clone(), k.clone())
        launch.backward(inputs, back, config, out.clone(), lse.clone(), out.clone(), None, machine, memory)  # type: ignore[arg-type]
        assert len(asked) == launched


def test_hopper_launches_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call of a kind, forward and backward, gives the kernels what a first one would, but for addresses."""
    of_long_sequences(monkeypatch)
    kernel = Noting()
    asked: list[str] = []
    played: list[int] = []

    def note(function: Any, programs: int, arguments: Any, options: dict[str, Any]) -> Noting:
        asked.append(function.fn.__name__)
        return kernel

    machine = calls.Machine(note, 132)
    problem = describe(
        Inputs(*(torch.empty(1, 64, 2, 64, dtype=torch.bfloat16),) * 3), Options(scale=0.1, out_dtype=torch.bfloat16)
    )
    config: Any = hopper.configure(problem)
    back = describe(
        Inputs(*(torch.empty(1, 64, 2, 64, dtype=torch.bfloat16),) * 3),
        Options(scale=0.1, out_dtype=torch.bfloat16),
        backward=True,
    )
    memories: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for _ in range(4):
        inputs = Inputs(*(torch.randn(1, 64, 2, 64).bfloat16() for _ in range(3)))
        out, lse = launch.forward(inputs, problem, config, machine, memories[0])
        gradients = launch.backward(inputs, back, hopper.configure(back), out, lse, out, None, machine, memories[1])
        played.append(len(kernel.seen))
        if kernel.seen:
            forward, before, through, after = (arguments for _, arguments in kernel.seen)
            assert [each.base.data_ptr() for each in forward[:4]] == [t.data_ptr() for t in (*inputs[:3], out)]
            assert before[0].pointer is out
            assert [each.base.data_ptr() for each in through[5:7]] == [gradients.k.data_ptr(), gradients.v.data_ptr()]
            assert after[1].pointer is gradients.q
        kernel.seen.clear()
    assert asked == 2 * ["forward_kernel", "before_kernel", "backward_kernel", "after_kernel"]
    assert played == [0, 0, 4, 4]
