"""What a rank of a ring holds at most beside what it is given. Kernels, messages and numbers are left out, so that long
sequences cost nothing: a kernel allocates what the Hopper's does, its results, and dQ in float32 meanwhile."""

import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flashtile import parts, sums
from flashtile.distributed.ring import Ring
from flashtile.parts import Inputs, Options, Wanted

HEADS, HEADDIM = 16, 128
CAUSAL = '["causal","bottom_right"]'


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """One that was there before."""
        self.known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _forward(part: parts.Local) -> tuple[Tensor, Tensor]:
    q = part.inputs.q
    out = q.new_empty(*q.shape[:-1], part.inputs.v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _backward(part: parts.Local, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = part.inputs.q, part.inputs.k, part.inputs.v
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v))
    sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    del sums
    return dq, dk, dv


@pytest.fixture(autouse=True)
def hollow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that only allocate, merges that only take place, messages that only have memory."""
    monkeypatch.setattr(parts, "forward", _forward)
    monkeypatch.setattr(parts, "backward", _backward)
    monkeypatch.setattr(sums, "merge", lambda *_: None)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [])
    yield
    dist.destroy_process_group()


def peaks(tokens: int, ranks: int, rank: int, heads_kv: int = HEADS) -> tuple[float, float]:
    """Of the forward pass, and of the backward pass with what that saved, in tensors of `tokens` x HEADS x HEADDIM
    numbers."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    scheme = Ring(dist.group.WORLD, None, "zigzag")
    q, k, v, grad = (
        torch.empty(1, tokens // ranks, heads, HEADDIM, dtype=torch.bfloat16, device="meta")
        for heads in (HEADS, heads_kv, heads_kv, HEADS)
    )
    inputs, options = Inputs(q, k, v), Options(mask=CAUSAL, out_dtype=q.dtype)
    with mock.patch.object(scheme, "_ask"), Live() as live:
        for tensor in (q, k, v, grad):
            live.ignore(tensor)
        saved = scheme.forward(inputs, options)
        forward, live.peak = live.peak, live.now
        gradients = scheme.backward(inputs, options, Wanted(), saved, (grad, None))
        assert gradients.q.shape == q.shape
    unit = tokens * HEADS * HEADDIM * q.element_size()
    return forward / unit, live.peak / unit


def _share(tokens: int, ranks: int, heads_kv: int = HEADS) -> float:
    """The largest peak of a rank's two passes over that of one device."""
    return max(max(peaks(tokens, ranks, rank, heads_kv)) for rank in (0, ranks - 1)) / max(
        peaks(tokens, 1, 0, heads_kv)
    )


def test_one_device_holds_its_results_and_a_float32_sum() -> None:
    forward, backward = peaks(2**16, 1, 0)
    assert forward == pytest.approx(1, abs=0.02)
    assert backward == pytest.approx(1 + 3 + 2, abs=0.02)


@pytest.mark.parametrize(
    ("tokens", "ranks", "most"),
    [
        (2**15, 2, 0.46),
        (2**16, 2, 0.46),
        (2**17, 2, 0.46),
        (2**18, 2, 0.46),
        (2**17, 4, 0.32),
        (2**18, 4, 0.26),
        (2**18, 8, 0.16),
        (2**20, 8, 0.13),
    ],
)
def test_a_rank_holds_its_share(tokens: int, ranks: int, most: float) -> None:
    assert _share(tokens, ranks) < most


def test_heads_that_share_keys_are_taken_together() -> None:
    assert _share(2**17, 2, heads_kv=4) < 0.5


def test_keys_of_two_neighbours_at_most() -> None:
    """Beside them the output in float32 and in its own type, and a part."""
    forward, _ = peaks(2**16, 8, 0)
    assert forward < (2 * 2 + 2 + 1 + 1) / 8
