"""A look at a function says what a walk over it would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import glance, trace

TABLE = torch.randn(8)
FACTOR = 2.0


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Functions that were walked."""
    found: list[Any] = []
    route = trace._route
    monkeypatch.setattr(trace, "_route", lambda function, kind: found.append(function) or route(function, kind))
    monkeypatch.setattr(glance, "_known", {})
    return found


def _holding(table: Tensor, factor: float) -> Callable[..., Tensor]:
    return lambda score, b, h, q_idx, kv_idx, shift=1: score * factor + table[kv_idx] + shift


def test_a_function_is_walked_once(walks: list[Any]) -> None:
    function = _holding(torch.randn(8), 3.0)
    first, second = (trace.lift(function, "score") for _ in range(2))
    assert len(walks) == 1
    assert (first.key, first.tensors[0]) == (second.key, second.tensors[0])


def test_the_same_code_over_other_tensors_is_known(walks: list[Any]) -> None:
    factor = 3.0
    tables = [torch.randn(8) for _ in range(3)]
    lifted = [trace.lift(_holding(table, factor), "score") for table in tables]
    assert len(walks) == 1
    assert [lift.tensors[0] is table for lift, table in zip(lifted, tables, strict=True)] == 3 * [True]


def test_whatever_differs_is_walked(walks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(8)

    def reading(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * FACTOR + TABLE[kv_idx] + table[kv_idx]

    count = len({trace.lift(reading, "score").key})
    for change in (
        lambda: monkeypatch.setitem(globals(), "FACTOR", 5.0),
        lambda: monkeypatch.setitem(globals(), "TABLE", torch.randn(9)),
        lambda: monkeypatch.setitem(globals(), "TABLE", torch.randn(8).double()),
        lambda: monkeypatch.setitem(globals(), "TABLE", table),
    ):
        change()
        trace.lift(reading, "score")
        count += 1
        assert len(walks) == count
    assert [tensor is table for tensor in trace.lift(reading, "score").tensors] == [True]


class Settings:
    factor = 2.0


def test_what_holds_more_is_always_walked(walks: list[Any]) -> None:
    settings, factors = Settings(), [2.0]

    def by_object(score: Tensor, *_: Tensor) -> Tensor:
        return score * settings.factor

    def by_list(score: Tensor, *_: Tensor) -> Tensor:
        return score * factors[0]

    def by_function(score: Tensor, *indices: Tensor) -> Tensor:
        return by_list(score, *indices)

    functions = (by_object, by_list, by_function)
    before = [trace.lift(function, "score").key for function in functions]
    settings.factor = factors[0] = 7.0
    after = [trace.lift(function, "score").key for function in functions]
    assert len(walks) == 2 * len(functions)
    assert not set(before) & set(after)


def test_kinds_of_functions_are_told_apart(walks: list[Any]) -> None:
    def either(*arguments: Tensor) -> Tensor:
        return arguments[-2] >= arguments[-1]

    trace.lift(either, "mask")
    with pytest.raises(TypeError, match="boolean"):
        trace.lift(either, "score")
