"""What a function reaches, and how it is found again."""

import enum
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtile import captures

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
    table, holder = torch.ones(3), Holder()

    def default(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, table: Tensor = table) -> Tensor:
        return score + table[h]

    return {
        "closure": (over(table), table),
        "global": (from_global, GLOBAL_TABLE),
        "default": (default, table),
        "list": (over([1, table]), table),
        "dict": (over({"t": table}), table),
        "nested function": (over(over(table)), table),
        "partial": (functools.partial(two_tables, table=table), table),
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


@pytest.mark.parametrize("value", [np.ones(2), {1, 2}])
def test_values_without_a_digest_have_no_content(value: Any) -> None:
    assert captures.content(captures.leaves(over(value))) is None


def test_recursive_functions_end() -> None:
    def itself(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        return itself

    assert captures.leaves(itself)
