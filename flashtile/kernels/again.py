"""A whole pass, done again: where a call differs from an earlier one in addresses alone, there is nothing left to ask.

A tape knows what is launched; with what it is launched over, and what it makes, that is all of a pass.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from flashtile.kernels.arguments import pattern_of
from flashtile.kernels.tape import Tape, layouts_of
from flashtile.queues import counter


def tensors_of(given: Sequence[Any]) -> tuple[Tensor, ...]:
    """All tensors that there are, in order; `given`: such, None, or tuples of them."""
    lists = [each if isinstance(each, tuple) else () if each is None else (each,) for each in given]
    return tuple([tensor for tensors in lists for tensor in tensors])


class Again:
    """What was launched over `tensors_of(given)`, more tensors, and what was made, in this order; counts: and over a
    `counter`, last. All that was made is contiguous, and all of it written by the launches."""

    def __init__(self, given: Sequence[Any], made: Sequence[Tensor], counts: bool = False) -> None:
        self._pick = _pick(given)
        self._patterns = [pattern_of(tensor) for tensor in made]
        self._counter = given[0].device if counts else None
        self._tapes: dict[Any, Tape] = {}

    def note(self, tape: Tape, given: Sequence[Any], *more: Tensor) -> "Again":
        """The tape for tensors of these layouts."""
        self._tapes[_kind((*self._pick(given), *more), more)] = tape
        return self

    def __call__(self, given: Sequence[Any], *more: Tensor) -> list[Tensor] | None:
        """What is made; None: the tensors are of other layouts. Without `more` a call is known by its layouts."""
        tensors = (*self._pick(given), *more)
        tape = self._tapes.get(_kind(tensors, more))
        if tape is None:
            return None
        made = [*map(torch.empty_like, self._patterns)]
        if self._counter is None:
            tensors = (*tensors, *made)
        else:
            tensors = (*tensors, *made, counter(self._counter))
        tape.play(tensors, [tensor.data_ptr() for tensor in tensors])
        return made


def _kind(tensors: Sequence[Tensor], more: Sequence[Tensor]) -> Any:
    return layouts_of(tensors) if more else None


def _pick(given: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Tensor, ...]]:
    """`tensors_of`, for such as are given, and sooner where there are no lists."""
    if any(isinstance(each, tuple) and each for each in given):
        return tensors_of
    return itemgetter(*[place for place, each in enumerate(given) if isinstance(each, Tensor)])
