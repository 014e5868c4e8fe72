"""Calls whose q, k and v are one process's share of longer sequences: who carries them out.

`flashtile.distributed` names its schemes here; the operators and `request` know them by name only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flashtile import check
from flashtile.backends import Gradients
from flashtile.problem import Inputs, Options, Wanted


class Sharding(Protocol):
    """A scheme over certain processes. ranks: how many share a sequence, in equal parts; head_ranks: how many have
    shared out the heads, likewise."""

    ranks: int
    head_ranks: int

    def forward(self, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
        """(out, lse) of this process's queries; all tensors but q, k and v describe the whole."""
        ...

    def backward(
        self,
        inputs: Inputs,
        options: Options,
        wanted: Wanted,
        saved: tuple[Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None],
    ) -> Gradients:
        """This process's share of the gradients."""
        ...

    def failed(self, error: Exception) -> None:
        """Tells the other processes that this one refuses the call."""
        ...


_known: dict[str, Sharding] = {}


@dataclass(frozen=True)
class Current:
    """A stretch of code whose attention is sharded.

    attend: a call's (out, lse); None for one that is this process's own. running: whether calls are sharded just now.
    positions: of so many tokens of this process, where in the sequence each is; on the CPU. unanimous: whether all
    processes say yes; each of them must ask.
    """

    attend: Callable[..., Any]
    running: Callable[[], bool]
    positions: Callable[[int], Tensor]
    unanimous: Callable[[bool], bool]


current: Current | None = None
"""What `attention` and `attention_varlen` ask first; None: nobody. One for the process, for the backward pass runs in
threads of its own."""


def register(name: str, sharding: Sharding) -> None:
    """Makes a scheme known; an older one of that name gives way."""
    _known[name] = sharding


def of(name: str) -> Sharding:
    """The scheme of that name.

    Raises:
        ValueError: this process has none.
    """
    check.known_sharding(name, _known)
    return _known[name]


def standing_for_all(tensor: Tensor, name: str) -> Tensor:
    """A view of one number with the shape that all shares of q, k or v have together."""
    *batch, rows, heads, headdim = tensor.shape
    ranks, head_ranks = _ranks_of(name)
    return tensor.new_empty(()).expand(*batch, rows * ranks, heads * head_ranks, headdim)


def _ranks_of(name: str) -> tuple[int, int]:
    return of(name).ranks, of(name).head_ranks


# The compiler takes the numbers as constants (see `trace._constant_route`).
_ranks_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
