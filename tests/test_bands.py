"""Functions that are windows in other words become windows; all others stay functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashtile
from flashtile import masks
from flashtile.mask_nodes import At, parse
from tests import oracle
from tests.problems import Feature, Shape, compose, dense

WIDTH = 5
TABLE = torch.arange(40)

Function = Callable[..., Any]

WINDOWS: dict[str, tuple[Function, str]] = {
    "causal": (lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, "causal(top_left)"),
    "causal_turned": (lambda b, h, q_idx, kv_idx: q_idx - kv_idx >= 0, "causal(top_left)"),
    "sliding": (
        lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx > q_idx - WIDTH),
        f"window({WIDTH - 1}, 0, top_left)",
    ),
    "both_ways": (lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() < WIDTH, "window(4, 4, top_left)"),
    "twice": (lambda b, h, q_idx, kv_idx: 2 * (kv_idx - q_idx) <= WIDTH, "window(-1, 2, top_left)"),
    "with_all": (
        lambda b, h, q_idx, kv_idx: q_idx.new_ones((), dtype=torch.bool) & (q_idx >= kv_idx),
        "causal(top_left)",
    ),
    "strict": (lambda b, h, q_idx, kv_idx: kv_idx < q_idx, "band(None, -1)"),
    "later": (lambda b, h, q_idx, kv_idx: (kv_idx - q_idx >= 3) & (kv_idx - q_idx < 9), "band(3, 8)"),
}

OTHERS: dict[str, Function] = {
    "padding": lambda b, h, q_idx, kv_idx: kv_idx < 7,
    "prefix": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < 7),
    "parity": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 2 == 0,
    "by_head": lambda b, h, q_idx, kv_idx: q_idx - kv_idx <= h,
    "anti_diagonal": lambda b, h, q_idx, kv_idx: q_idx + kv_idx <= 30,
    "table": lambda b, h, q_idx, kv_idx: (TABLE[q_idx] == TABLE[kv_idx]) & (kv_idx <= q_idx),
    "half": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) * 0.5 <= 3,
    "narrow": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).to(torch.int8) <= 3,
    "not": lambda b, h, q_idx, kv_idx: ~(kv_idx <= q_idx),
    "never": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx.new_zeros((), dtype=torch.bool)),
}


def _allowed(mask: masks.Mask, queries: int, keys: int) -> torch.Tensor:
    nought = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    at = At(nought, nought, torch.arange(queries)[:, None], torch.arange(keys)[None], keys - queries)
    return parse(mask.token).allows(at, mask.tensors).expand(1, 1, queries, keys)[0, 0]


def _asked(function: Function, queries: int, keys: int) -> torch.Tensor:
    nought = torch.zeros((), dtype=torch.int64)
    return torch.stack(
        [
            torch.stack([function(nought, nought, torch.tensor(i), torch.tensor(j)) for j in range(keys)])
            for i in range(queries)
        ]
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_in_other_words(name: str) -> None:
    function, words = WINDOWS[name]
    mask = masks.custom(function)
    assert masks.readable(mask.token) == words
    assert mask.tensors == ()


@pytest.mark.parametrize("name", OTHERS)
def test_all_others_stay_functions(name: str) -> None:
    assert '"custom"' in masks.custom(OTHERS[name]).token


_NUMBER = st.integers(-6, 6)


@st.composite
def _comparisons(draw: Any) -> Function:
    """A line in the distance beside a number, in some spelling, or two of them."""
    if draw(st.booleans()):
        first, second = draw(_comparisons()), draw(_comparisons())
        return lambda b, h, q_idx, kv_idx: first(b, h, q_idx, kv_idx) & second(b, h, q_idx, kv_idx)
    weight, shift, limit = draw(_NUMBER), draw(_NUMBER), draw(_NUMBER)
    compare = draw(st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt]))
    return draw(
        st.sampled_from(
            [
                lambda b, h, q_idx, kv_idx: compare(weight * kv_idx + shift, weight * q_idx - limit),
                lambda b, h, q_idx, kv_idx: compare(limit - (q_idx - kv_idx) * weight, shift + 0 * q_idx),
                lambda b, h, q_idx, kv_idx: compare((q_idx - kv_idx + shift).abs() + 0, limit + 0 * kv_idx),
                lambda b, h, q_idx, kv_idx: compare(-q_idx + shift, -(kv_idx + limit)),
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(_comparisons())
def test_what_is_recognised_says_the_same(function: Function) -> None:
    found = _allowed(masks.custom(function), 14, 11)
    assert torch.equal(found, _asked(function, 14, 11))


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("shape", [dense(1, 40, 40, 2, 2, 16), dense(2, 33, 50, 2, 1, 16)], ids=["square", "longer"])
def test_attention_with_such_functions(name: str, shape: Shape) -> None:
    function, _ = WINDOWS[name]
    feature = Feature(lambda t, s: {"mask": function}, lambda t, s: {"rule": function})
    oracle.check(compose(name, shape, (feature,), torch.float32))


def test_explain_names_the_window() -> None:
    q = torch.randn(1, 40, 2, 16)
    assert "window(4, 0, top_left)" in str(flashtile.explain(q, q, q, mask=WINDOWS["sliding"][0]))


def test_the_compiler_sees_the_window() -> None:
    def call(q: torch.Tensor) -> torch.Tensor:
        return flashtile.attention(q, q, q, mask=WINDOWS["sliding"][0])

    q = torch.randn(1, 40, 2, 16)
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(q), call(q))
