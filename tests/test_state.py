"""States merge: any split of the keys gives the whole, whatever the gap between the parts."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashtile
from flashtile import State, merge
from flashtile.state import empty
from tests.oracle import assert_close, assert_equal_bits

DOUBLE = torch.float64


def _inputs(seqlen_kv: int = 60, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((2, 20, 4, 16), (2, seqlen_kv, 2, 16), (2, seqlen_kv, 2, 24))
    q, k, v = (torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes)
    return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> State:
    state = flashtile.attention(q, k, v, return_lse=True, **options)
    assert isinstance(state, State)
    return state


def _parts(q: Tensor, k: Tensor, v: Tensor, borders: list[int]) -> list[State]:
    edges = [0, *borders, k.shape[1]]
    return [_attend(q, k[:, begin:end], v[:, begin:end]) for begin, end in pairwise(edges)]


def _state(lse: Any, dtype: torch.dtype = torch.float32) -> State:
    """Random outputs (1, rows, 1, 3) with the given log-sum-exps (rows,)."""
    lse = torch.as_tensor(lse, dtype=dtype)
    return State(torch.randn(1, len(lse), 1, 3, dtype=dtype), lse.view(1, 1, -1))


@given(st.lists(st.integers(0, 60), max_size=4).map(sorted))
def test_any_split_merges_to_the_whole(borders: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = _inputs()
    whole, merged = _attend(q, k, v), merge(_parts(q, k, v, borders))
    assert_close(merged.out, whole.out, roundings=32)
    assert_close(merged.lse, whole.lse)


def test_gradients_flow_through_a_merge() -> None:
    """Through out and lse of both parts, a causal part beside a prefix that all see."""
    q, k, v = _inputs()
    grads = torch.randn(2, 20, 4, 24, dtype=DOUBLE), torch.randn(2, 4, 20, dtype=DOUBLE)
    whole = _attend(q, k, v, causal=True)
    parts = [_attend(q, k[:, :40], v[:, :40]), _attend(q, k[:, 40:], v[:, 40:], causal=True)]
    wanted = torch.autograd.grad([*whole], [q, k, v], grads)
    for one, other in zip(torch.autograd.grad([*merge(parts)], [q, k, v], grads), wanted, strict=True):
        assert_close(one, other, roundings=64)


def test_merge_is_associative_and_commutative() -> None:
    a, b, c = (_state(torch.randn(6, dtype=DOUBLE) * 5, DOUBLE) for _ in range(3))
    whole = merge([a, b, c])
    for other in (merge([merge([a, b]), c]), merge([a, merge([b, c])]), merge([c, a, b])):
        assert_close(other.out, whole.out)
        assert_close(other.lse, whole.lse)


@pytest.mark.parametrize("gap", [0.0, 1.0, 50.0, 90.0, 1e3, 1e30])
@pytest.mark.parametrize("base", [0.0, -1e3, 1e3])
def test_merge_is_stable_for_any_gap(gap: float, base: float) -> None:
    low, high = _state([base - gap]), _state([base])
    merged = merge([low, high])
    weight = torch.sigmoid(low.lse.double() - high.lse.double())[..., None]
    assert_close(merged.out, weight * low.out.double() + (1 - weight) * high.out.double())
    assert_close(merged.lse, torch.logaddexp(low.lse.double(), high.lse.double()))


def test_rows_that_see_nothing_are_neutral() -> None:
    seen = _state([0.5, -3.0, 700.0])
    for states in ([seen, empty(seen)], [empty(seen), seen], [empty(seen), seen, empty(seen)]):
        assert_equal_bits(merge(states), seen)
    nothing = merge([empty(seen), empty(seen)])
    assert_equal_bits(nothing, empty(seen))


def test_rows_that_see_nothing_pass_no_gradient() -> None:
    states = [empty(_state([0.0, 1.0])), empty(_state([0.0, 1.0]))]
    tensors = [tensor.requires_grad_() for state in states for tensor in state]
    merged = merge(states)
    finite = torch.where(merged.lse.isinf(), 0.0, merged.lse)
    for grad in torch.autograd.grad(merged.out.sum() + finite.sum(), tensors):
        assert_equal_bits([grad], [torch.zeros_like(grad)])


def test_gradcheck() -> None:
    a, b, c = (_state(torch.randn(3, dtype=DOUBLE) * 3, DOUBLE) for _ in range(3))
    tensors = [tensor.requires_grad_() for state in (a, b, c) for tensor in state]

    def merged(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(merge([(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]))

    assert torch.autograd.gradcheck(merged, tensors)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("where", ["out", "lse"])
def test_nan_stays_visible(part: int, where: str) -> None:
    states = [_state([0.0, 1.0]), _state([0.5, 0.2])]
    tensor = getattr(states[part], where)
    tensor.view(-1)[0] = torch.nan
    merged = merge(states)
    assert bool(merged.out[0, 0].isnan().any())
    assert bool(merged.out[0, 1].isfinite().all())
    assert bool(merged.lse[0, 0, 0].isnan()) == (where == "lse")


def test_dtypes() -> None:
    half = State(torch.randn(1, 2, 1, 3).bfloat16(), torch.randn(1, 1, 2))
    merged = merge([half, half])
    assert (merged.out.dtype, merged.lse.dtype) == (torch.bfloat16, torch.float32)
    assert_close(merged.out, half.out.double())
    assert_close(merged.lse, half.lse.double() + torch.tensor(2.0).log())


def test_packed_states_merge() -> None:
    q, k, v = _inputs()
    (first, second), whole = _parts(q, k, v, [25]), _attend(q, k, v)
    merged = merge([State(out[0], lse[0]) for out, lse in (first, second)])
    assert_close(merged.out, whole.out[0], roundings=32)
    assert_close(merged.lse, whole.lse[0])


def test_one_state_is_itself() -> None:
    state = _state([0.0, -torch.inf, 5.0])
    state.out[0, 1] = 0
    assert_equal_bits(merge([state]), state)


def test_float32_merge_is_as_good_as_attention() -> None:
    """Seven parts in float32 stay within the error of the whole in float32."""
    q, k, v = (tensor.detach().float() for tensor in _inputs(700))
    truth = flashtile.reference.attention(q, k, v)
    merged = merge(_parts(q, k, v, [100, 200, 300, 400, 500, 600]))
    assert_close(merged.out, truth.out)
    assert_close(merged.lse, truth.lse)
