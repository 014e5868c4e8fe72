"""Traced functions: values, derivatives, keys, caching and refusals."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtile import attention, reference, trace

B, H, Q, K = 2, 3, 7, 9
INDEX = [
    torch.arange(n).view(shape)
    for n, shape in zip((B, H, Q, K), ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)), strict=True)
]


def modifiers() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """name -> (score_mod, its captured tensors that have gradients)."""
    torch.manual_seed(0)
    slopes, table, emb = torch.rand(H), torch.randn(H, Q + K), torch.randn(5, H)
    scale, rows, spd = torch.tensor(1.5), torch.randn(H, 4), torch.randint(0, 5, (B, Q, K))
    wide = torch.randn(B, H, Q, K)
    captured = [t.double().requires_grad_() for t in (slopes, table, emb, scale, rows, wide)]
    slopes, table, emb, scale, rows, wide = captured
    factor = 0.5
    return {
        "alibi": (lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(), [slopes]),
        "softcap": (lambda s, b, h, q, k: factor * torch.tanh(s / factor), []),
        "relative position": (lambda s, b, h, q, k: s + table[h, q - k + K], [table]),
        "chained index": (lambda s, b, h, q, k: s + table[h][q - k + K], [table]),
        "negative index": (lambda s, b, h, q, k: s + table[h, -1], [table]),
        "full bias": (lambda s, b, h, q, k: s + wide[b][h, q][k], [wide]),
        "graphormer": (lambda s, b, h, q, k: s + emb[spd[b, q, k], h], [emb]),
        "learned scale": (lambda s, b, h, q, k: s * scale, [scale]),
        "one table twice": (lambda s, b, h, q, k: s * slopes[h] + slopes[0], [slopes]),
        "branch": (lambda s, b, h, q, k: torch.where(q >= k, s * scale, s.square()), [scale]),
        "only a table": (lambda s, b, h, q, k: table[h, q], [table]),
        "ignores everything": (lambda s, b, h, q, k: torch.ones_like(s), []),
        "vectors inside": (lambda s, b, h, q, k: s + (rows[h] * s).sum(), [rows]),
        "sliced table": (lambda s, b, h, q, k: s + rows[:, 0][h], [rows]),
        "slice beside an index": (lambda s, b, h, q, k: s + rows[h, 1:].sum(), [rows]),
        "ellipsis": (lambda s, b, h, q, k: s + wide[b, ..., q, k].sum(), [wide]),
        "new axis": (lambda s, b, h, q, k: s * rows[h, None, 2].sum(), [rows]),
        "sum of one number": (lambda s, b, h, q, k: (s * slopes[h]).sum(), [slopes]),
        "largest of one number": (lambda s, b, h, q, k: s * q.max(), []),
        "reshaped number": (lambda s, b, h, q, k: s + q.reshape(()), []),
        "in place": (lambda s, b, h, q, k: s.clone().mul_(2).add_(slopes[h]), [slopes]),
        "cast to the score's type": (lambda s, b, h, q, k: s + slopes[h].to(s.dtype) * s.new_tensor(0.1), [slopes]),
        "distance": (lambda s, b, h, q, k: s - (q - k).to(s.dtype) * 0.1, []),
        "buckets": (lambda s, b, h, q, k: s + rows[h, torch.bucketize(q, torch.tensor([1, 3]))], [rows]),
    }


MAPPED = {"slice beside an index", "ellipsis", "new axis", "sum of one number", "largest of one number"}
ELEMENTWISE = set(modifiers()) - MAPPED - {"vectors inside", "reshaped number"}


def evaluated(function: Callable[..., Any], score: Tensor) -> Tensor:
    """The specification: the function itself, one index at a time under torch.vmap."""
    return reference._vmapped(function, score=True)(score, *(part.flatten() for part in INDEX))


@pytest.mark.parametrize("name", modifiers())
def test_values_and_derivatives_are_those_of_the_function(name: str) -> None:
    function, captured = modifiers()[name]
    lifted = trace.lift(function, "score")
    traced = trace.graph(lifted.key)
    assert traced.elementwise == (name in ELEMENTWISE)
    score = torch.randn(B, H, Q, K, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(B, H, Q, K, dtype=torch.float64)
    expected = evaluated(function, score).expand(score.shape)
    wanted = [tensor.requires_grad for tensor in lifted.tensors]
    with torch.no_grad():
        got = traced.evaluate(score, *INDEX, lifted.tensors).expand(score.shape)
        grad_score, grads = traced.derivative(score, *INDEX, lifted.tensors, grad, wanted)
    torch.testing.assert_close(got, expected)
    asked = [score, *captured]
    truth = torch.autograd.grad(
        (expected * grad).sum() + 0 * score.sum(), asked, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(grad_score, truth[0])
    for tensor, gradient in zip(captured, truth[1:], strict=True):
        position = next(i for i, lifted_tensor in enumerate(lifted.tensors) if lifted_tensor is tensor)
        torch.testing.assert_close(grads[position], gradient)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_capture_gradients_repeat_bit_for_bit(name: str) -> None:
    function, _ = modifiers()[name]
    lifted = trace.lift(function, "score")
    score, grad = torch.randn(B, H, Q, K), torch.randn(B, H, Q, K)
    wanted = [tensor.requires_grad for tensor in lifted.tensors]
    runs = [trace.graph(lifted.key).derivative(score, *INDEX, lifted.tensors, grad, wanted)[1] for _ in range(3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def scaled(factor: Any) -> Callable[..., Any]:
    return lambda s, b, h, q, k: s * factor


def test_equal_functions_share_a_graph_and_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trace.lift(scaled(7.25), "score")
    monkeypatch.setattr(trace, "_trace", lambda *_: pytest.fail("traced again"))
    assert trace.lift(scaled(7.25), "score").key == first.key


def test_a_changed_closure_is_seen() -> None:
    assert trace.lift(scaled(2.0), "score").key != trace.lift(scaled(3.0), "score").key
    array = np.ones(1)

    def through_numpy(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * float(array[0])

    before = trace.lift(through_numpy, "score").key
    array[0] = 2.0
    assert trace.lift(through_numpy, "score").key != before


def test_tensors_are_the_live_ones() -> None:
    one, other = torch.ones(H), torch.full((H,), 2.0)

    def over(x: Tensor, y: Tensor) -> Callable[..., Any]:
        return lambda s, b, h, q, k: s + x[h] * y[h]

    assert [t is one for t in trace.lift(over(one, one), "score").tensors] == [True]
    lifted = trace.lift(over(one, other), "score")
    assert {id(t) for t in lifted.tensors} == {id(one), id(other)}


def test_small_constants_made_inside_become_part_of_the_graph() -> None:
    lifted = trace.lift(lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 3.0])[h], "score")
    assert lifted.tensors == ()
    score = torch.zeros(B, H, Q, K)
    got = trace.graph(lifted.key).evaluate(score, *INDEX, ())
    assert got[:, :, 0, 0].tolist() == [[1, 2, 3]] * B
    other = trace.lift(lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 4.0])[h], "score")
    assert other.key != lifted.key


def test_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_ROUTES_KEPT", 4)
    monkeypatch.setattr(trace, "_routes", {})
    for value in range(9):
        trace.lift(scaled(value + 0.125), "score")
    assert len(trace._routes) == 4


def test_halves_and_numbers_promote_as_scalars_do() -> None:
    slopes, scale = torch.randn(H, dtype=torch.bfloat16), torch.randn(())
    lifted = trace.lift(lambda s, b, h, q, k: s + slopes[h] * scale, "score")
    got = trace.graph(lifted.key).evaluate(torch.zeros(B, H, Q, K), *INDEX, lifted.tensors)
    assert torch.equal(got[0, :, 0, 0], slopes.float() * scale)


@pytest.mark.parametrize("reduce", [torch.any, torch.all])
def test_masks_that_reduce_one_number(reduce: Callable[[Tensor], Tensor]) -> None:
    lifted = trace.lift(lambda b, h, q, k: reduce(q >= k), "mask")
    got = trace.graph(lifted.key).evaluate(None, *INDEX, lifted.tensors)
    assert torch.equal(got.expand(B, H, Q, K), (INDEX[2] >= INDEX[3]).expand(B, H, Q, K))


def test_changes_in_place_stay_inside() -> None:
    def growing(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = k < 5
        near &= q >= k
        q += 3
        return near | (q == k)

    lifted = trace.lift(growing, "mask")
    index = [part.clone() for part in INDEX]
    got = trace.graph(lifted.key).evaluate(None, *index, lifted.tensors)
    q, k = INDEX[2:]
    assert torch.equal(got.expand(B, H, Q, K), (((k < 5) & (q >= k)) | (q + 3 == k)).expand(B, H, Q, K))
    assert torch.equal(index[2], q)


HIDING = deque([torch.ones(())])


def test_small_tensors_without_a_path_are_live() -> None:
    values = []
    for value in (2.0, 3.0):
        HIDING[0].fill_(value)
        lifted = trace.lift(lambda s, b, h, q, k: s * HIDING[0], "score")
        values.append(float(trace.graph(lifted.key).evaluate(torch.ones(1, 1, 1, 1), *INDEX, lifted.tensors).max()))
    assert values == [2.0, 3.0]


class Small(torch.nn.Module):
    """A module that a modifier calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.factor = torch.nn.Parameter(torch.randn(4)), 2.0

    def forward(self, head: Tensor) -> Tensor:
        return self.table[head] * self.factor

    def modify(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + self.table[h] * self.factor


def test_modules_that_are_called_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small()

    def calling(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + small(h)

    key = trace.lift(calling, "score").key
    assert [tensor is small.table for tensor in trace.lift(calling, "score").tensors] == [True]
    small.factor = 5.0
    assert trace.lift(calling, "score").key != key
    monkeypatch.setattr(trace, "_trace", lambda *_: pytest.fail("traced again"))
    trace.lift(calling, "score")


def test_unknown_graph_is_named() -> None:
    with pytest.raises(ValueError, match="no-such-key"):
        trace.graph("no-such-key")


def gradients(call: Callable[[Tensor], Tensor], q: Tensor, captured: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(q), [q, *captured])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_see_captured_tensors_live(dynamic: bool) -> None:
    table = torch.randn(4, 64, requires_grad=True)

    def modify(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + table[h, q - k + 32]

    def loss(q: Tensor) -> Tensor:
        return attention(q, q, q, score_mod=modify, mask=lambda b, h, i, j: i >= j).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (17, 20):
        q = torch.randn(1, length, 4, 8, requires_grad=True)
        for step in range(2):
            for a, b in zip(gradients(loss, q, [table]), gradients(compiled, q, [table]), strict=True):
                torch.testing.assert_close(a, b)
            with torch.no_grad():
                table += step + 1.0


def with_table(table: Tensor, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s + table[h]


def with_keyword(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    return s + table[h]


@pytest.mark.parametrize("form", ["method", "partial", "keywords", "partial of an object"])
def test_methods_and_partials_compile_and_numbers_are_watched(form: str) -> None:
    small = Small()
    partials = {
        "partial": functools.partial(with_table, small.table),
        "keywords": functools.partial(with_keyword, table=small.table),
        "partial of an object": functools.partial(Small.modify, small),
    }
    modify = partials.get(form, small.modify)

    def loss(q: Tensor) -> Tensor:
        return attention(q, q, q, score_mod=modify).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 9, 4, 8, requires_grad=True)
    for factor in (2.0, 7.0):
        small.factor = factor
        for a, b in zip(gradients(compiled, q, [small.table]), gradients(loss, q, [small.table]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda score, b, h, q_idx, kv_idx: torch.where(kv_idx > q_idx, score, -torch.inf),
        lambda score, b, h, q_idx, kv_idx: score.clamp(-3.0, 3.0) * torch.tensor([0.5, 1.0]).sum(),
        lambda score, b, h, q_idx, kv_idx: score + torch.ones(3).cumsum(0)[h % 3] * torch.tensor(2.0),
    ],
)
def test_constants_follow_the_tile_to_its_device(function: Callable[..., Any]) -> None:
    """Traced for one device and run on another: PyTorch's "meta" stands for it."""
    lifted = trace.lift(function, "score")
    indices = [
        torch.arange(size, device="meta").view([-1 if place == dim else 1 for dim in range(4)])
        for place, size in enumerate((1, 2, 3, 4))
    ]
    score = torch.zeros(1, 2, 3, 4, device="meta")
    traced = trace.graph(lifted.key)
    assert traced.evaluate(score, *indices, lifted.tensors).device.type == "meta"
    grad, _ = traced.derivative(score, *indices, lifted.tensors, score, [False] * len(lifted.tensors))
    assert (grad.device.type, grad.shape) == ("meta", score.shape)
