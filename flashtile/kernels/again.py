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
from flashtile.problem import Inputs
from flashtile.queues import counter


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """All that there are, in order."""
    *plain, mask, score, scaled = inputs
    return (*[tensor for tensor in plain if tensor is not None], *mask, *score, *scaled)


class Again:
    """What was launched over `tensors_of(inputs)`, more tensors, and what was made, in this order; counts: and over a
    `counter`, last. All that was made is contiguous, and all of it written by the launches."""

    def __init__(self, inputs: Inputs, made: Sequence[Tensor], counts: bool) -> None:
        self._pick = _pick(inputs)
        self._patterns = [pattern_of(tensor) for tensor in made]
        self._counter = inputs.q.device if counts else None
        self._tapes: dict[Any, Tape] = {}

    def note(self, tape: Tape, inputs: Inputs, more: Sequence[Tensor] = ()) -> None:
        """One that serves all tensors of these layouts."""
        self._tapes[self._kind((*self._pick(inputs), *more), more)] = tape

    def __call__(self, inputs: Inputs, *more: Tensor) -> list[Tensor] | None:
        """What is made; None: the tensors are of other layouts. Without `more` a call is known by its layouts."""
        given = (*self._pick(inputs), *more)
        tape = self._tapes.get(self._kind(given, more))
        if tape is None:
            return None
        made = [*map(torch.empty_like, self._patterns)]
        tensors = (*given, *made) if self._counter is None else (*given, *made, counter(self._counter))
        tape.play(tensors, [tensor.data_ptr() for tensor in tensors])
        return made

    def _kind(self, given: Sequence[Tensor], more: Sequence[Tensor]) -> Any:
        return layouts_of(given) if more else None


def _pick(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """`tensors_of`, for such inputs, and sooner where they have no lists."""
    if any(inputs[-3:]):
        return tensors_of
    return itemgetter(*[place for place, tensor in enumerate(inputs[:-3]) if tensor is not None])
