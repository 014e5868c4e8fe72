"""Numbers that are zero when a launch begins."""

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
