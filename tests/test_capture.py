"""What may be done beside a capture, without a GPU: a driver and a stream that only say what is asked of them."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from flashtile import masks
from flashtile.kernels import capture, visits
from flashtile.problem import Inputs, Options, describe


class _Driver:
    """Keeps the mode of the thread, 0 at first: CU_STREAM_CAPTURE_MODE_GLOBAL."""

    mode = 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        pointed = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))
        self.mode, pointed[0] = pointed[0], self.mode
        return 0


@pytest.mark.parametrize("captured", [True, False])
def test_the_mode_is_relaxed_for_a_while(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    driver = _Driver()
    monkeypatch.setattr(capture, "driver", lambda: driver)
    monkeypatch.setattr(capture, "capturing", lambda: captured)

    def load() -> None:
        with capture.relaxed():
            assert driver.mode == (2 if captured else 0)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        load()
    assert driver.mode == 0


def _listed(mask: masks.Mask) -> tuple[Inputs, Any]:
    inputs = Inputs(*(torch.empty(1, 300, 2, 16, dtype=torch.bfloat16),) * 3, mask=mask.tensors)
    return inputs, describe(inputs, Options(mask=mask.token, scale=0.1, out_dtype=torch.bfloat16))


def test_lists_that_graphs_read_are_made_aside_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, problem = _listed(masks.chunk(100))
    other, of_tensors = _listed(masks.document(torch.arange(300) // 70))
    outside = visits.of(inputs, problem, 64, 32, False)
    times = []

    @contextmanager
    def aside(device: torch.device) -> Iterator[None]:
        times.append(device)
        yield

    monkeypatch.setattr(visits, "_in_graphs", {})
    monkeypatch.setattr(visits, "capturing", lambda device: True)
    monkeypatch.setattr(capture, "aside", aside)
    assert visits.listed(inputs, problem)
    assert not visits.listed(other, of_tensors), "what tensors hold may change between replays"
    inside = visits.of(inputs, problem, 64, 32, False)
    monkeypatch.setattr(visits, "_known", {})
    assert visits.of(inputs, problem, 64, 32, False) is inside
    assert len(times) == 1
    assert inside.tiles is not outside.tiles
    for name in ("counts", "tiles", "order"):
        torch.testing.assert_close(getattr(inside, name), getattr(outside, name), rtol=0, atol=0)
