"""Room in what is remembered, where threads share it."""

from typing import Any


def make_room(known: dict[Any, Any], most: int) -> None:
    """Takes the oldest entries out, until there are fewer than `most`.

    Other threads add entries meanwhile, and weak references take some out whenever Python collects: an iterator over
    the dictionary would fail then, a list of its keys is made at once.
    """
    while len(known) >= most:
        for key in list(known)[: len(known) - most + 1]:
            known.pop(key, None)
