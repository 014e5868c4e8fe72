"""Room in what is remembered, where threads share it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


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
