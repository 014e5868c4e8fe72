"""A whole pass, done again: where a call differs from an earlier one in addresses alone, there is nothing left to ask.

A tape knows what is launched; with what it is launched over, and what it makes, that is all of a pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from flashtile.kernels.arguments import pattern_of
from flashtile.kernels.tape import Tape, layouts_of, twins_of
from flashtile.queues import counter


def tensors_of(given: Sequence[Any]) -> tuple[Tensor, ...]:
    """All tensors that there are, in order; `given`: such, None, or tuples of them."""
    lists = [each if isinstance(each, tuple) else () if each is None else (each,) for each in given]
    return tuple([tensor for tensors in lists for tensor in tensors])


class Again:
    """What was launched over `tensors_of(given)`, more tensors, and what was made, in this order; counts: and over a
    `counter`, last. All that was made is contiguous; fills: what it holds before; None: anything, all is written."""

    def __init__(
        self, given: Sequence[Any], made: Sequence[Tensor], counts: bool = False, fills: Sequence[float | None] = ()
    ) -> None:
        self._pick = _pick(given)
        self._makers = [_maker(tensor, fill) for tensor, fill in zip_longest(made, fills)]
        self._counter = given[0].device if counts else None
        self._tapes: dict[Any, Tape] = {}

    def note(self, tape: Tape, given: Sequence[Any], *more: Tensor) -> "Again":
        """The tape for tensors of these layouts."""
        tensors = (*self._pick(given), *more)
        twins = twins_of([tensor.data_ptr() for tensor in tensors])
        kind = layouts_of(tensors) if more else ()
        self._tapes[kind + twins] = tape
        return self

    def __call__(self, given: Sequence[Any], *more: Tensor) -> list[Tensor] | None:
        """What is made; None: it is not known what is launched over such tensors. Without `more` their layouts are."""
        tensors = (*self._pick(given), *more)
        addresses = [tensor.data_ptr() for tensor in tensors]
        kind = layouts_of(tensors) if more else ()
        tape = self._tapes.get(kind) or self._tapes.get(kind + twins_of(addresses))
        if tape is None:
            return None
        made = [make() for make in self._makers]
        others = made if self._counter is None else [*made, counter(self._counter)]
        tape.play((*tensors, *others), [*addresses, *[tensor.data_ptr() for tensor in others]])
        return made


def _maker(tensor: Tensor, fill: float | None) -> Callable[[], Tensor]:
    """Of other tensors like this one."""
    pattern = pattern_of(tensor)
    if fill is None:
        return partial(torch.empty_like, pattern)
    return partial(torch.full_like, pattern, fill) if fill else partial(torch.zeros_like, pattern)


def _pick(given: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Tensor, ...]]:
    """`tensors_of`, for such as are given, and sooner where there are no lists."""
    if any(isinstance(each, tuple) and each for each in given):
        return tensors_of
    return itemgetter(*[place for place, each in enumerate(given) if isinstance(each, Tensor)])
