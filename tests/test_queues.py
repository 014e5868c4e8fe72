"""Numbers that are zero when a launch begins."""

import inspect
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile import queues

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_fresh", {})


def test_every_counter_is_zero_and_given_out_once() -> None:
    found = []
    for _ in range(3 * queues._PACK // 2):
        counter = queues.counter(CPU)
        assert counter[0] == 0
        assert counter.data_ptr() % 16 == 0
        counter += 1
        found.append(counter)
    assert len({counter.data_ptr() for counter in found}) == len(found)


def test_a_graph_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is filled by the graph, whenever that is replayed."""
    filled: list[Any] = []
    make = torch.zeros
    monkeypatch.setattr(queues, "capturing", lambda device: True)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **how: filled.append(sizes) or make(*sizes, **how))
    first, second = queues.counter(CPU), queues.counter(CPU)
    assert filled == [(1,), (1,)]
    assert first.data_ptr() != second.data_ptr()
    assert queues._fresh == {}


def test_streams_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for stream in (1, 2):
        monkeypatch.setattr(queues, "queue", lambda device, stream=stream: (device, stream))
        found[stream] = queues.counter(CPU)
    assert found[1].untyped_storage().data_ptr() != found[2].untyped_storage().data_ptr()


def test_what_is_kept_while_a_function_is_warmed_up_is_made_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's warm-up gives the memory of its own thread back to the graph."""
    states = SimpleNamespace(WARMUP=object(), EXECUTION=object())
    manager = SimpleNamespace(path_state=states.WARMUP)
    found: dict[int, Any] = {threading.get_ident(): manager}
    trees = SimpleNamespace(
        ExecutionState=states, get_manager=lambda device, create_if_none_exists: found.get(threading.get_ident())
    )
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    for name, value in {"is_initialized": True, "current_device": 0, "current_stream": "stream"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    assert queues.apart(threading.get_ident) != threading.get_ident()
    # What is made may keep something itself.
    assert queues.apart(lambda: queues.apart(lambda: queues.counter(CPU)))[0] == 0
    manager.path_state = states.EXECUTION
    assert queues.apart(threading.get_ident) == threading.get_ident()
    found.clear()
    assert queues.apart(threading.get_ident) == threading.get_ident()


def test_pytorch_has_what_is_asked() -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees", exc_type=ImportError)
    assert "create_if_none_exists" in inspect.signature(trees.get_manager).parameters
    assert trees.ExecutionState.WARMUP is not trees.ExecutionState.RECORDING
    assert "path_state" in inspect.getsource(trees.CUDAGraphTreeManager.run_eager)
    assert "beginAllocateCurrentThreadToPool" in inspect.getsource(trees._use_cuda_memory_pool_manager)
