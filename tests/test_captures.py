"""What a function reaches, and how it is found again."""

import enum
import functools
import math
import operator
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtile import attention, captures

GLOBAL_TABLE = torch.arange(3.0)


class Mode(enum.Enum):
    PLAIN = 1


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(3))
        self.unused = torch.nn.Parameter(torch.zeros(5))

    def modify(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + self.table[h]

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + self.table[h]


class Callable3:
    """Neither function nor module; what it holds is read by its own code."""

    factor = 3

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __getitem__(self, index: Any) -> Tensor:
        return self.table[index]

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + self[h] * self.scaled()

    def scaled(self) -> Any:
        return self.factor * 2


def over(value: Any) -> Callable[..., Any]:
    return lambda score, b, h, q, k: (value, score)[1]


def from_global(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + GLOBAL_TABLE[h]


def two_tables(score: Tensor, table: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + table[h]


def tensors_of(function: Any) -> list[Tensor]:
    return [leaf.value for leaf in captures.leaves(function) if isinstance(leaf.value, Tensor)]


def reaching() -> dict[str, tuple[Any, Tensor]]:
    """name -> (function, a tensor that it captures)."""
    table, holder = torch.nn.Parameter(torch.ones(3)), Holder()

    def default(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, table: Tensor = table) -> Tensor:
        return score + table[h]

    def keyword(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, table: Tensor = table) -> Tensor:
        return score + table[h]

    return {
        "closure": (over(table), table),
        "global": (from_global, GLOBAL_TABLE),
        "default": (default, table),
        "list": (over([1, table]), table),
        "dict": (over({"t": table}), table),
        "nested function": (over(over(table)), table),
        "partial": (functools.partial(two_tables, table=table), table),
        "keyword default": (keyword, table),
        "dict with tuple keys": (over({(1, 2): table}), table),
        "list of modules": (over(torch.nn.ParameterList([table])), table),
        "callable object": (Callable3(table), table),
        "object with an index": (over(Callable3(table)), table),
        "partial of a method": (functools.partial(holder.modify), holder.table),
        "method": (holder.modify, holder.table),
        "module": (holder, holder.table),
    }


@pytest.mark.parametrize("name", reaching())
def test_tensors_are_reached_and_fetched_by_path(name: str) -> None:
    function, table = reaching()[name]
    found = [leaf for leaf in captures.leaves(function) if leaf.value is table]
    assert found
    assert captures.fetch(function, found[0].path) is table


def test_only_mentioned_attributes_are_reached() -> None:
    holder = Holder()
    assert all(tensor is not holder.unused for tensor in tensors_of(holder.modify))


def test_content_is_equal_for_equal_functions_and_tells_values_apart() -> None:
    def content(value: Any) -> Any:
        return captures.content(captures.leaves(over(value)))

    assert content(1.5) == content(1.5)
    for left, right in (
        (1, 2),
        (1, 1.0),
        (True, 1),
        (Mode.PLAIN, 1),
        (range(3), range(4)),
        (torch.ones(2), torch.ones(3)),
    ):
        assert content(left) != content(right)


def test_content_knows_which_tensors_are_one() -> None:
    one, other = torch.ones(3), torch.ones(3)
    same, apart = (captures.content(captures.leaves(over([one, second]))) for second in (one, other))
    assert same != apart


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.abs, torch.tan),
        (torch.Tensor.abs, torch.Tensor.tan),
        (torch.ops.aten.abs, torch.ops.aten.tan),
        (torch.ops.aten.abs.default, torch.ops.aten.tan.default),
        (torch.nn.functional.relu, torch.nn.functional.silu),
        (operator.add, operator.mul),
        (math, torch),
        (int, float),
    ],
)
def test_content_tells_library_functions_apart(one: Any, other: Any) -> None:
    def content(value: Any) -> Any:
        return captures.content(captures.leaves(over(value)))

    assert content(one) is not None
    assert content(one) == content(one)
    assert content(one) != content(other)


def test_library_functions_compute_what_they_are() -> None:
    q = torch.randn(1, 8, 1, 16)

    def result(function: Any) -> Tensor:
        return attention(q, q, q, score_mod=lambda score, b, h, q_idx, k_idx: function(score))

    for function in (torch.abs, torch.sin, torch.ops.aten.cos, torch.Tensor.exp):
        weights = torch.softmax(function(q[0, :, 0] @ q[0, :, 0].T / 4), -1)
        assert torch.allclose(result(function)[0, :, 0], weights @ q[0, :, 0], atol=1e-5)


@pytest.mark.parametrize("make", [lambda n: [n], lambda n: types.SimpleNamespace(width=n), lambda n: over(n)])
def test_content_knows_which_objects_are_one(make: Callable[[int], Any]) -> None:
    first, second = make(1), make(2)
    one, other = (captures.content(captures.leaves(over([first, second, last]))) for last in (first, second))
    assert one != other


SETTINGS = types.ModuleType("settings")
SETTINGS.width = 3


def from_module(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q - k < SETTINGS.width


def from_class(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q - k < Callable3.factor


def by_name(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * getattr(SETTINGS, "width")  # noqa: B009


@pytest.mark.parametrize(
    ("function", "owner", "name"),
    [
        (from_module, SETTINGS, "width"),
        (by_name, SETTINGS, "width"),
        (from_class, Callable3, "factor"),
        (Callable3(torch.ones(3)), Callable3, "factor"),
        (Callable3(torch.ones(3)).__call__, Callable3, "factor"),
        (over(from_class), Callable3, "factor"),
    ],
)
def test_content_sees_what_code_reads_of_modules_and_classes(
    function: Any, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = captures.content(captures.leaves(function))
    monkeypatch.setattr(owner, name, 17)
    assert before is not None
    assert captures.content(captures.leaves(function)) != before


def test_signs_of_zero_are_told_apart() -> None:
    assert captures.content(captures.leaves(over(0.0))) != captures.content(captures.leaves(over(-0.0)))


def test_modules_are_entered_only_where_they_are_called() -> None:
    holder = Holder()
    assert all(tensor is not holder.table for tensor in tensors_of(over(holder)))
    found = captures.leaves(over(holder), through_modules=True)
    assert any(leaf.value is holder.table for leaf in found)


@pytest.mark.parametrize("value", [np.ones(2), {1, 2}, deque([1]), {object(): 1}, [1].index])
def test_values_without_a_digest_have_no_content(value: Any) -> None:
    assert captures.content(captures.leaves(over(value))) is None


def test_recursive_functions_end() -> None:
    def itself(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        return itself

    assert captures.leaves(itself)
