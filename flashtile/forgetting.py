"""Room in what is remembered, where threads share it."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from flashtile.queues import apart

_T = TypeVar("_T")
Made = dict[Any, tuple[list[weakref.ref[Tensor]], Any]]
"""What was made of tensors, and of which."""


def make_room(known: dict[Any, Any], most: int) -> None:
    """Takes the oldest entries out, until there are fewer than `most`.

    Other threads add entries meanwhile, and weak references take some out whenever Python collects: an iterator over
    the dictionary would fail then, a list of its keys is made at once.
    """
    while len(known) >= most:
        for key in list(known)[: len(known) - most + 1]:
            known.pop(key, None)


def marks(tensors: Iterable[Tensor | None]) -> tuple[Any, ...] | None:
    """Which tensors these are and how often each was written to; None: one of them does not count that, as it was made
    in inference mode."""
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif tensor.is_inference():
            return None
        else:
            found.append((id(tensor), tensor._version))
    return tuple(found)


def remembered(known: Made, what: Any, tensors: Sequence[Tensor], make: Callable[[], _T], most: int) -> _T:
    """`make()`, or what it made before of the same tensors, unchanged since; forgotten once one of them is gone, or
    there are `most` others. Tensors that do not count how often they are written to are never known again."""
    marked = marks(tensors)
    if marked is None:
        return make()
    key = (what, marked)
    found = known.get(key)
    if found is None or any(ref() is not tensor for ref, tensor in zip(found[0], tensors, strict=True)):
        found = [weakref.ref(tensor, _Forget(known, key)) for tensor in tensors], apart(make)
        make_room(known, most)
        known[key] = found
    made: _T = found[1]
    return made


class _Forget:
    """Drops what was made of a tensor once that is gone. Holds the memory: the module may be gone too, at the end."""

    def __init__(self, known: Made, key: Any) -> None:
        self.known, self.key = known, key

    def __call__(self, _: Any) -> None:
        self.known.pop(self.key, None)
