"""What calls leave behind, where threads share it and processes inherit it: nothing wrong, nothing hung."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import masks, plan, recall, trace
from flashtile.forgetting import Made, make_room, marks, remembered


def test_the_oldest_go_first() -> None:
    known = dict.fromkeys(range(10))
    make_room(known, 4)
    assert list(known) == [7, 8, 9]
    make_room(known, 4)
    assert list(known) == [7, 8, 9]


def test_what_was_written_to_has_another_mark() -> None:
    a, b = torch.zeros(3), torch.zeros(3)
    before = marks((a, None, b))
    assert before == marks((a, None, b)) != marks((b, None, a))
    b += 1
    assert marks((a, None, b)) != before
    with torch.inference_mode():
        assert marks((a, torch.zeros(3))) is None
        assert marks((a, b)) == marks((a, b))


def test_what_was_made_of_tensors_lives_as_long_as_they_are_the_same() -> None:
    known: Made = {}
    a, b = torch.zeros(3), torch.zeros(3)

    def made(*tensors: Tensor) -> object:
        return remembered(known, "sum", tensors, object, 2)

    first = made(a, b)
    assert made(a, b) is first
    assert made(b, a) is not first
    a += 1
    assert made(a, b) is not first
    assert len(known) == 2, "the oldest has made room"
    del b
    assert known == {}
    with torch.inference_mode():
        unmarked = torch.zeros(3)
    assert made(unmarked) is not made(unmarked)
    assert known == {}


def test_threads_that_add_and_remove() -> None:
    known: dict[int, int] = {}

    def work(first: int) -> None:
        for number in range(20000):
            make_room(known, 8)
            known[first + number] = number
            known.pop(first + number - 3, None)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(0, 600_000, 100_000)))
    assert len(known) < 8 + 6


def _calls() -> list[Callable[[], Tensor]]:
    """Different ones, all of whose plans, graphs and masks are remembered somewhere."""
    tensors = torch.randn(3, 1, 40, 2, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(40) // 9
    table = torch.randn(2, generator=torch.Generator().manual_seed(2))

    def call(number: int) -> Tensor:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        mask = masks.document(ids) if number % 3 else masks.custom(lambda b, h, q, kv: (q - kv) % (number + 2) < 2)
        out = flashtile.attention(
            *leaves,
            mask=mask,
            score_mod=lambda score, b, h, q, kv: score * (1 + number) + table[h],
            softcap=number or None,
        )
        return torch.cat([out.flatten(), *(grad.flatten() for grad in torch.autograd.grad(out.sum(), leaves))])

    return [lambda number=number: call(number) for number in range(9)]  # type: ignore[misc]


def test_threads_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for so little that everything is forgotten all the time."""
    calls = _calls()
    wanted = [call() for call in calls]
    monkeypatch.setattr(trace, "_ROUTES_KEPT", 2)
    monkeypatch.setattr(recall, "_KEPT", 2)
    monkeypatch.setattr(trace, "_routes", {})
    monkeypatch.setattr(trace, "_composed", {})
    plan.choose.cache_clear()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: calls[number % 9](), range(54)))
    assert len(trace._routes) <= 2 + 6
    for number, result in enumerate(found):
        torch.testing.assert_close(result, wanted[number % 9], rtol=0, atol=0)


FORK = """
import os, sys, threading, time, warnings
import torch, flashtile
warnings.simplefilter("ignore")
torch.set_num_threads(1)
q = torch.randn(1, 30, 2, 8)
begun = threading.Event()

def slowly(score, b, h, q_idx, kv_idx):
    begun.set()
    time.sleep(1.0)
    return score + 1

tracing = threading.Thread(target=lambda: flashtile.attention(q, q, q, score_mod=slowly))
tracing.start()
begun.wait()
child = os.fork()
plain = flashtile.attention(q, q, q)
same = flashtile.attention(q, q, q, score_mod=lambda score, b, h, i, j: score + 2)
if not child:
    os._exit(0 if torch.allclose(plain, same, atol=1e-5) else 1)
tracing.join()
assert torch.allclose(plain, same, atol=1e-5)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_forked_while_a_thread_traces() -> None:
    """Data loaders fork. The child neither waits for a lock that nobody opens nor meets a half-patched PyTorch."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_forked_process_uses_what_was_remembered() -> None:
    code = """
import os, torch, flashtile
torch.set_num_threads(1)
q = torch.randn(1, 30, 2, 8)
call = lambda: flashtile.attention(q, q, q, mask=lambda b, h, i, j: (i - j) % 5 < 3, softcap=2.0)
wanted = call()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(call(), wanted) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
